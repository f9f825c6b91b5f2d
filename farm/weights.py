"""Where a card's weights lie on this machine, brought here where they are not; and which weights they are.

A source is a folder, a hub id or a prefix in a bucket. What the hub's client has in its cache and what was copied from a
bucket is taken without asking the network, once the revision is known. Knows nothing of what is in the files; imports no
torch.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from farm.cardparts import PACKAGE, Source, WeightsFile
from farm.errors import ModelCardError, NumericsError, StoreError, StoreFullError, StoreUnavailableError
from farm.hub import cached, commit_of, fetch
from farm.mirror import Report, mirror, revision_of, weights_in
from farm.modelcard import ModelCard
from farm.settings import Settings, load_settings
from farm.storage.base import ObjectInfo, ObjectStore
from farm.storage.opening import open_store

AnySource = TypeVar("AnySource", bound=Source)

_WHOLE_FILE_BYTES = 64 * 2**20
_MODEL_FOLDERS = {"denoiser": ("transformer", "unet"), "decoder": ("vae",)}
"""Where diffusers' layout keeps the part that a card can replace."""


def locate(card: ModelCard, *, settings: Settings | None = None, report: Report | None = None) -> Path:
    """Return the folder with a card's model; see `locate_source`. Of a part that the card replaces only the settings are
    brought here."""
    return locate_source(card, card.source, settings=settings, report=report)


def locate_file(
    card: ModelCard, file: WeightsFile, *, settings: Settings | None = None, report: Report | None = None
) -> Path:
    """Return one file of weights of a card, a denoiser or an adapter; see `locate_source`."""
    return locate_source(card, file, settings=settings, report=report) / file.file


def locate_source(
    card: ModelCard, source: Source, *, settings: Settings | None = None, report: Report | None = None
) -> Path:
    """Return the folder with the weights of one of a card's sources, bringing them here where they are not.

    `settings`: this process's own where left out. Raises ModelCardError where they cannot be had, NumericsError where they
    are others than those the card was planned with, StoreUnavailableError and StoreFullError.
    """
    if source.hub is not None:
        file = source.file if isinstance(source, WeightsFile) else None
        return fetch(
            card.name,
            source.hub,
            source.revision,
            file=file,
            left_out=_left_out(card, source),
            code=_code(card, source),
            report=report,
        )
    if source.s3 is not None:
        return _mirrored(card, source, settings or load_settings(), report)
    folder = source_folder(source)
    if isinstance(source, WeightsFile) and not (folder / source.file).is_file():
        raise ModelCardError(f"model {card.name}: {folder / source.file} is not there; fetch it, or mend the card")
    _refuse_other(card, source, _folder_revision(card, source, folder), str(folder))
    return folder


def source_folder(source: Source) -> Path:
    """Return the folder that a source's `path` names. Raises ModelCardError if it is not there."""
    if source.path is None:
        raise ModelCardError("a source without a path, a hub id or a bucket has no weights; mend the card")
    folder = Path(source.path)
    if source.path.startswith(PACKAGE):
        package, _, inside = source.path.removeprefix(PACKAGE).partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelCardError(f"path {source.path}: there is no package {package}; install it, or mend the card")
        folder = Path(spec.submodule_search_locations[0]) / inside
    try:
        there = folder.is_dir()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        there = False
    if not there:
        raise ModelCardError(f"path {source.path}: {folder} is not a folder; put the weights there, or mend the card")
    return folder


def pinned(card: ModelCard, *, settings: Settings | None = None) -> ModelCard:
    """Return the card with the revision that each of its sources has now: a commit, or a digest.

    The digest of a folder is over names, sizes and contents of what lies in it, but for dot files and dot folders; of a file
    above 64 MiB only the first and the last MiB are read, so that planning is quick. That of a prefix in a bucket is over
    names, sizes and etags. `settings`: this process's own where left out. Raises ModelCardError, StoreUnavailableError.
    """
    found: dict[str, object] = {"source": _pinned(card, card.source, settings)} if card.source.given else {}
    if card.denoiser is not None:
        found["denoiser"] = _pinned(card, card.denoiser, settings)
    if card.decoder is not None:
        found["decoder"] = _pinned(card, card.decoder, settings)
    if card.adapters:
        found["adapters"] = tuple(_pinned(card, adapter, settings) for adapter in card.adapters)
    return card.model_copy(update=found) if found else card


def are_here(card: ModelCard, *, settings: Settings | None = None) -> bool:
    """Whether all of a card's weights are on this machine, as far as can be told without the network or reading them."""
    return all(_is_here(card, source, settings) for source in sources_of(card).values())


def sources_of(card: ModelCard) -> dict[str, Source]:
    """Return every source of a card that names a place, by what it gives the model."""
    sources: dict[str, Source | None] = {"model": card.source, "denoiser": card.denoiser, "decoder": card.decoder}
    sources |= {f"adapter {adapter.name}": adapter for adapter in card.adapters}
    return {name: source for name, source in sources.items() if source is not None and source.given}


def missing_folder(card: ModelCard) -> str | None:
    """Return the first path of a card's sources that is not on this machine, None where there is none."""
    for source in sources_of(card).values():
        if source.path is not None and not _is_here(card, source, None):
            return source.path
    return None


def export(settings: Settings) -> None:
    """Let `locate` in this process find weights by these settings: a renderer's come from who started it, not from where it
    runs. A folder for copies that is this node's own stays, and so does what the node says of code that it may run."""
    for name in ("s3_endpoint", "s3_region", "s3_addressing"):
        if name in settings.model_fields_set and (value := getattr(settings, name)) is not None:
            os.environ[f"FARM_{name.upper()}"] = str(value)
    if "weights" in settings.model_fields_set:
        os.environ.setdefault("FARM_WEIGHTS", str(settings.weights))
    if "remote_code" in settings.model_fields_set and "remote_code" not in load_settings().model_fields_set:
        os.environ["FARM_REMOTE_CODE"] = json.dumps(settings.remote_code)


def _left_out(card: ModelCard, source: Source) -> tuple[str, ...]:
    """Patterns of weights in the model's folder that the card has others for."""
    replaced = [name for name in _MODEL_FOLDERS if getattr(card, name) is not None] if source is card.source else []
    return tuple(f"{folder}/*.safetensors" for name in replaced for folder in _MODEL_FOLDERS[name])


def _code(card: ModelCard, source: Source) -> tuple[str, ...]:
    """Python files of a source that the card pins; no others are brought here."""
    return tuple(card.code) if source is card.source else ()


def _pinned(card: ModelCard, source: AnySource, settings: Settings | None) -> AnySource:
    if source.hub is not None:
        revision = commit_of(card.name, source.hub, source.revision)
    elif source.s3 is not None:
        revision = revision_of(_objects(card, source, _bucket(source, settings or load_settings())))
    else:
        revision = _folder_revision(card, source, source_folder(source))
    return source.model_copy(update={"revision": revision})


def _is_here(card: ModelCard, source: Source, settings: Settings | None) -> bool:
    if source.hub is not None:
        file = source.file if isinstance(source, WeightsFile) else None
        code = _code(card, source)
        return cached(source.hub, source.revision, file=file, left_out=_left_out(card, source), code=code) is not None
    if source.s3 is not None:
        copies = _copies(source, settings or load_settings())
        wanted = _name(source.revision) if source.revision else "*"
        folders = [path for path in copies.glob(wanted) if path.is_dir() and not path.suffix]
        return any(all((folder / file).is_file() for file in _code(card, source)) for folder in folders)
    try:
        folder = source_folder(source)
    except ModelCardError:
        return False
    return not isinstance(source, WeightsFile) or (folder / source.file).is_file()


def _mirrored(card: ModelCard, source: Source, settings: Settings, report: Report | None) -> Path:
    copies = _copies(source, settings)
    if source.revision is not None and (copies / _name(source.revision)).is_dir():
        return copies / _name(source.revision)
    store = _bucket(source, settings)
    objects = _objects(card, source, store)
    revision = revision_of(objects)
    _refuse_other(card, source, revision, str(source.s3))
    try:
        return mirror(store, objects, copies / _name(revision), report=report)
    except (StoreUnavailableError, StoreFullError):
        raise
    except StoreError as exc:
        raise ModelCardError(f"model {card.name}: its weights cannot be copied: {exc.message}") from exc
    except OSError as exc:
        raise ModelCardError(
            f"model {card.name}: its weights cannot be copied to {copies}: {exc.strerror or exc}; see to that folder, or "
            "name another in FARM_WEIGHTS"
        ) from exc


def _objects(card: ModelCard, source: Source, store: ObjectStore) -> tuple[ObjectInfo, ...]:
    """What a source in a bucket consists of; at least one object."""
    objects: tuple[ObjectInfo, ...] = ()
    try:
        if isinstance(source, WeightsFile):
            if (info := store.head(source.file)) is not None:
                objects = (info,)
        else:
            objects = weights_in(store, left_out=_left_out(card, source), code=_code(card, source))
    except StoreUnavailableError:
        raise
    except StoreError as exc:
        raise ModelCardError(f"model {card.name}: its weights cannot be looked at: {exc.message}") from exc
    if not objects:
        what = f"{source.s3}/{source.file} is not there" if isinstance(source, WeightsFile) else f"{source.s3} has none"
        raise ModelCardError(f"model {card.name}: weights are looked for in a bucket and {what}; mend the card")
    return objects


def _bucket(source: Source, settings: Settings) -> ObjectStore:
    return open_store(str(source.s3), settings)


def _copies(source: Source, settings: Settings) -> Path:
    """The folder with the copies of one prefix: named for people, and for no other prefix."""
    url = str(source.s3).rstrip("/")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", url.removeprefix("s3://"))[-60:]
    return settings.weights.expanduser() / f"{slug}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def _name(revision: str) -> str:
    return revision.removeprefix("sha256:")[:32]


def _refuse_other(card: ModelCard, source: Source, here: str, where: str) -> None:
    if source.revision not in (None, here):
        raise NumericsError(
            f"model {card.name}: the plan was made with weights {source.revision}, {where} holds {here}; put the old weights "
            f"back to go on with this run, or give the job a new name to render it anew"
        )


def _folder_revision(card: ModelCard, source: Source, folder: Path) -> str:
    digest = hashlib.sha256()
    files = [folder / source.file] if isinstance(source, WeightsFile) else _visible_files(folder)
    try:
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
            with file.open("rb") as data:
                if size <= _WHOLE_FILE_BYTES:
                    digest.update(data.read())
                else:
                    digest.update(data.read(2**20))
                    data.seek(-(2**20), 2)
                    digest.update(data.read())
    except OSError as exc:
        raise ModelCardError(
            f"{exc.filename}: cannot be read: {exc.strerror}; check the weights of {card.name}"
        ) from exc
    return f"sha256:{digest.hexdigest()}"


def _visible_files(folder: Path) -> Sequence[Path]:
    """Files below a folder, sorted; not what editors, git and the hub's client keep under names with a dot."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
