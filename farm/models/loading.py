"""From a card's source to loaded parts: find the folder, check its files, load safetensors into torch modules.

Never runs code that comes with weights, never reads pickles, and never asks the network where the source is a folder.
What is missing or broken is a ModelCardError that names the file.
"""

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from farm.errors import ModelCardError, NumericsError
from farm.modelcard import ModelCard, pinned, source_folder

T = TypeVar("T")

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
MAX_HEADER_BYTES = 100_000_000


def locate(card: ModelCard) -> Path:
    """Return the folder with a card's weights, downloading a hub id at its revision where it is not cached.

    Raises NumericsError where the folder holds other weights than those the card was planned with.
    """
    folder = source_folder(card.source)
    if folder is not None:
        planned = card.source.revision
        here = pinned(card).source.revision
        if planned not in (None, here):
            raise NumericsError(
                f"model {card.name}: the plan was made with weights {planned}, {folder} holds {here}; put the old weights "
                f"back to go on with this run, or give the job a new name to render it anew"
            )
        return folder
    if card.source.hub is None:
        raise ModelCardError(f"model {card.name}: its source needs a path or a hub id; mend the card")
    return _download(card.name, card.source.hub, card.source.revision)


def _download(model: str, hub: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    with suppress(LocalEntryNotFoundError):
        return Path(snapshot_download(hub, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=True))
    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=list(HUB_FILES)))
    except (HTTPError, HFValidationError, OSError) as exc:
        raise ModelCardError(
            f"model {model}: {hub} at revision {revision or 'main'} cannot be fetched from the hub: {exc}; check "
            f"the network, the id, the revision and HF_TOKEN"
        ) from exc


def part_bytes(card: ModelCard, folder: Path, part: str, *, itemsize: int) -> int:
    """Return the bytes of a part's weights at `itemsize` bytes an element, from the files' headers alone.

    Raises ModelCardError for a part without files, a shard that its index names and is not there, or a cut-off file.
    """
    where = folder / part
    files = sorted(where.glob("*.safetensors"))
    for index in where.glob("*.safetensors.index.json"):
        named = set(_json(card, index).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise ModelCardError(
                f"model {card.name}: {where / missing[0]} is not there, {len(missing)} of {len(named)} files missing; "
                f"fetch the weights again"
            )
        files = [file for file in files if file.name in named]
    if not files:
        raise ModelCardError(
            f"model {card.name}: {where} has no .safetensors file; fetch the weights again (pickles are not read)"
        )
    _json(card, where / "config.json")
    return sum(_elements(card, file) for file in files) * itemsize


def _json(card: ModelCard, path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelCardError(f"model {card.name}: {path} cannot be read: {exc}; fetch the weights again") from exc
    if not isinstance(loaded, dict):
        raise ModelCardError(f"model {card.name}: {path} is not a JSON object; fetch the weights again")
    return loaded


def _elements(card: ModelCard, path: Path) -> int:
    """Count the elements in a safetensors file: 8 bytes of length, a JSON header, then the data that it describes."""
    broken = f"model {card.name}: {path} is cut off or not a safetensors file; fetch the weights again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ModelCardError(broken)
            tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        elements = 0
        for tensor in tensors.values():
            count = 1
            for side in tensor["shape"]:
                count *= side
            elements += count
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelCardError(broken) from exc
    if size < 8 + length + end:
        raise ModelCardError(broken)
    return elements


def load_part(card: ModelCard, folder: Path, part: str, load: Callable[[], T]) -> T:
    """Call `load` and turn what it raises about files and shapes into a ModelCardError that names the part."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as exc:
        line = " ".join(str(exc).split())[:300]
        raise ModelCardError(
            f"model {card.name}: {folder / part} cannot be loaded: {type(exc).__name__}: {line}; fetch the weights "
            f"again, or mend the card"
        ) from exc
