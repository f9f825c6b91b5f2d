"""Look a model's files over by their headers: what each part weighs, and what is wrong with it.

Reads no tensor and loads nothing, so tens of gigabytes are looked over in a moment. What is wrong is said, not raised, part
by part: a file that is cut off, a shard that is not there, a pickle under another name, code that is not as it was pinned.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import FarmError, ModelCardError
from farm.modelcard import ModelCard
from farm.needs import folders_of
from farm.pinnedcode import read_file
from farm.settings import Settings
from farm.tensorfiles import TensorHead, read_heads, without_copies
from farm.weights import are_here, locate_file, locate_source, sources_of
from farm.yamlfile import shown

_TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
TOKENIZERS: dict[str, dict[str, tuple[str, ...]]] = {
    "z-image": {"tokenizer": ("tokenizer",)},
    "qwen-image": {"tokenizer": ("tokenizer",)},
    "newbie": {
        "tokenizer": ("tokenizer", "text_encoder"),
        "clip_tokenizer": ("clip_tokenizer", "tokenizer_2", "clip_model", "text_encoder_2"),
    },
}
"""Family -> tokenizer -> folders of which the first that has one is taken."""
SCHEDULED = ("z-image", "qwen-image")
"""Families that read the settings of their scheduler from the model's folder."""
WEIGHTY = ("transformer", "unet", "vae", "vqvae", "movq", "text_encoder", "image_encoder")
"""How the parts of a pipeline begin that have weights."""
LIBRARIES = ("diffusers", "transformers")
MAX_SETTINGS_BYTES = 64 * 2**20
AGAIN = "fetch the weights again"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How files that Python unpickles begin: torch's archives, and bare pickles."""


@dataclass(frozen=True, slots=True)
class PartReport:
    """One part of a model. `size_bytes`: of its tensors; `dtypes`: how many weights are of which kind, the most first."""

    name: str
    files: int
    size_bytes: int
    dtypes: tuple[tuple[str, int], ...]
    faults: tuple[str, ...]


def check_weights(card: ModelCard, settings: Settings) -> Iterator[PartReport]:
    """Yield each part of a model whose weights are here. Raises ModelCardError where they are not."""
    if not are_here(card, settings=settings):
        raise ModelCardError(
            f"model {card.name}: its weights are not all on this machine; fetch them with `farm models pull {card.name}`"
        )
    sources = sources_of(card)
    if "model" in sources:
        yield from _model(card, settings)
    if card.denoiser is not None:
        yield _file(card, "denoiser", locate_file(card, card.denoiser, settings=settings))
    if card.decoder is not None:
        yield _folder(card, "decoder", locate_source(card, card.decoder, settings=settings))
    for adapter in card.adapters:
        yield _file(card, f"adapter {adapter.name}", locate_file(card, adapter, settings=settings))
    if card.code:
        yield _code(card, locate_source(card, card.source, settings=settings))


def _model(card: ModelCard, settings: Settings) -> Iterator[PartReport]:
    folder = locate_source(card, card.source, settings=settings)
    if faults := tuple(_layout_faults(card, folder)):
        yield PartReport("model", 0, 0, (), faults)
    try:
        parts = folders_of(card, folder)
    except (FarmError, ValueError, RecursionError) as exc:
        if not faults:
            yield PartReport("model", 0, 0, (), (exc.message if isinstance(exc, FarmError) else str(exc),))
        return
    for part, names in parts.items():
        if getattr(card, part, None) is None:  # the card gives no other
            for name in names:
                yield _folder(card, name, folder / name)


def _layout_faults(card: ModelCard, folder: Path) -> Iterator[str]:
    """Say what a family needs of a model's folder besides weights, and is not there."""
    kinds = _TOKENIZER[:1] if card.family == "newbie" else _TOKENIZER
    for names in TOKENIZERS.get(card.family, {}).values():
        if not any(file.is_file() for name in names for kind in kinds for file in (folder / name).glob(kind)):
            yield f"{folder / names[0]} has no tokenizer; {AGAIN}"
    if card.family in SCHEDULED:
        yield from _settings_faults(folder / "scheduler" / "scheduler_config.json")
    if card.family != "diffusers":
        return
    index, fault = _settings(folder / "model_index.json")
    if fault is not None:
        yield fault
        return
    kind = index.get("_class_name")
    if isinstance(kind, list) and kind:
        yield from _unpinned(card, folder, "", kind)
    elif not isinstance(kind, str):
        yield f"{folder / 'model_index.json'} names no pipeline as its _class_name; {AGAIN}"
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        replaced = (card.denoiser and name.startswith(WEIGHTY[:2])) or (card.decoder and name.startswith(WEIGHTY[2:5]))
        if not name.isidentifier():
            yield f"{folder / 'model_index.json'} names a part {shown(name)}, which no folder is called; {AGAIN}"
            continue
        yield from _unpinned(card, folder, name, entry)
        if not any((folder / name).glob("*")):
            yield f"{folder / name}, which model_index.json names, is not there or empty; {AGAIN}"
        elif name.startswith(WEIGHTY) and not replaced and not any((folder / name).glob("*.safetensors")):
            yield f"{folder / name} has no .safetensors file; {AGAIN}"


def _unpinned(card: ModelCard, folder: Path, part: str, entry: list[Any]) -> Iterator[str]:
    """Say where a class, [module, name], is neither diffusers' nor transformers', nor of code that the card pins."""
    module = str(entry[0])
    if module in LIBRARIES or _is_pipeline(module) or {f"{part}/{module}.py", f"{module}.py"} & card.code.keys():
        return
    what = f"as its {part} " if part else ""
    yield (
        f"{folder / 'model_index.json'} names {what}code, {shown(module)}, that the card does not pin, and it is not run: pin it "
        "(`code`) once it is read, or choose another model"
    )


def _is_pipeline(module: str) -> bool:
    """Whether it is one of diffusers' own pipelines, without loading those."""
    spec = importlib.util.find_spec("diffusers")
    places = [Path(place) / "pipelines" for place in (spec.submodule_search_locations or ()) if spec] if spec else []
    return module.isidentifier() and any(
        (place / module).is_dir() or (place / f"{module}.py").is_file() for place in places
    )


def _settings_faults(file: Path) -> list[str]:
    fault = _settings(file)[1]
    return [] if fault is None else [fault]


def _settings(file: Path) -> tuple[dict[str, Any], str | None]:
    """Return what a JSON file of settings says, and what is wrong with it."""
    if not file.exists():
        return {}, f"{file} is not there; {AGAIN}"
    if not file.is_file():
        return {}, f"{file} is no regular file; name one"
    try:
        with file.open("rb") as opened:
            loaded = json.loads(opened.read(MAX_SETTINGS_BYTES))
    except (OSError, ValueError, RecursionError) as exc:
        said = "nested too deep" if isinstance(exc, RecursionError) else exc
        return {}, f"{file} cannot be read: {said}; {AGAIN}"
    if not isinstance(loaded, dict):
        return {}, f"{file} is not a JSON object; {AGAIN}"
    return loaded, None


def _folder(card: ModelCard, name: str, folder: Path) -> PartReport:
    """Look over one part's folder: those files that its index names where it has one, else every safetensors file."""
    files = sorted(folder.glob("*.safetensors"))
    faults: list[str] = []
    named: dict[str, str] = {}
    for index in sorted(folder.glob("*.safetensors.index.json")):
        found, fault = _settings(index)
        weight_map = found.get("weight_map")
        if fault is None and isinstance(weight_map, dict) and all(isinstance(one, str) for one in weight_map.values()):
            named |= weight_map
        else:
            said = f" ({fault.removeprefix(f'{index} ').removesuffix(f'; {AGAIN}')})" if fault else ""
            faults.append(f"{index} is no index of weights{said}; {AGAIN}")
    if named:
        shards = sorted(set(named.values()))
        there = {file.name for file in files}
        faults += [f"{folder / shard} is not there; fetch the weights again" for shard in shards if shard not in there]
        files = [file for file in files if file.name in shards]
    else:
        files = without_copies(files)
    if not files and not faults:
        pickled = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLES]
        only = f", only {pickled[0]}, and pickles are not read" if pickled else ""
        faults.append(f"{folder} has no .safetensors file{only}; fetch the weights again")
    faults += _settings_faults(folder / "config.json")
    reports = [_file(card, name, file) for file in files]
    for file, report in zip(files, reports, strict=True):
        faults += report.faults
        if named and not report.faults:
            faults += _strangers(card, file, named)
    dtypes: Counter[str] = Counter()
    for report in reports:
        dtypes.update(dict(report.dtypes))
    return PartReport(
        name, len(files), sum(report.size_bytes for report in reports), tuple(dtypes.most_common()), tuple(faults)
    )


def _code(card: ModelCard, folder: Path) -> PartReport:
    """Hold the code that a card pins against its hashes; none of it is run."""
    faults, size_bytes = [], 0
    for name in card.code:
        try:
            size_bytes += len(read_file(card, folder, name))
        except ModelCardError as exc:
            faults.append(exc.message.removeprefix(f"model {card.name}: "))
    return PartReport("code", len(card.code), size_bytes, (), tuple(faults))


def _strangers(card: ModelCard, file: Path, named: dict[str, str]) -> list[str]:
    """Say which tensors the index has in this file and the file has not."""
    missing = {name for name, shard in named.items() if shard == file.name} - {
        head.name for head in read_heads(card.name, file)
    }
    if not missing:
        return []
    first = min(missing)
    return [f"{file} lacks {len(missing)} tensors of its index, {first} first; fetch it again"]


def _file(card: ModelCard, name: str, file: Path) -> PartReport:
    try:
        if file.exists() and not file.is_file():
            return PartReport(name, 1, 0, (), (f"{file} is no regular file; name one",))
        with file.open("rb") as opened:
            head = opened.read(8)
        if head.startswith(_PICKLED) and not _is_length(head, file):
            return PartReport(name, 1, 0, (), (f"{file} is a pickle, whatever it is called; take another file",))
        heads = read_heads(card.name, file)
    except OSError as exc:
        return PartReport(name, 0, 0, (), (f"{file} cannot be read: {exc.strerror or exc}; see to it",))
    except ModelCardError as exc:
        return PartReport(name, 1, 0, (), (exc.message.removeprefix(f"model {card.name}: "),))
    faults = () if heads else (f"{file} has no tensors; {AGAIN}",)
    return PartReport(name, 1, sum(head.nbytes for head in heads), _dtypes(heads), faults)


def _is_length(head: bytes, file: Path) -> bool:
    """Whether these bytes can be the length of a safetensors header: the same bytes may begin a pickle."""
    return 0 < int.from_bytes(head, "little") <= file.stat().st_size - 8


def _dtypes(heads: Iterable[TensorHead]) -> tuple[tuple[str, int], ...]:
    counted: Counter[str] = Counter()
    for head in heads:
        counted[head.dtype] += head.elements
    return tuple(counted.most_common())
