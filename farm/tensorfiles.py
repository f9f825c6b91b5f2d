"""What lies in a file of weights, read from its header alone: safetensors and GGUF.

Reads no tensor, imports no torch. A file that is cut off, or is no such file, is a ModelCardError that names it.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from farm.errors import ModelCardError

MAX_HEADER_BYTES = 100_000_000
"""The longest JSON header that safetensors itself takes."""
SAFETENSORS_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Type -> bits a weight takes."""
GGUF_ALIGNMENT = 32
"""Where a file does not say otherwise (`general.alignment`), data begins at a multiple of this."""
MAX_SIDES = 64
"""Of a tensor, in torch; GGML has at most four."""
MAX_STRING_BYTES = 2**24
"""No key, name or value of a denoiser's GGUF header is longer; a broken length is not read as one."""

GGUF_TYPES = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    30: (1, 2),  # BF16
}
"""Tensor type -> (weights a block, bytes a block), as GGML lays them out; those that diffusers dequantises."""
GGUF_NAMES = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0"},
    **{10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16"},
}
GGUF_VALUES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a metadata value by its type; strings (8) and arrays (9) say their own length."""
GGUF_STRING, GGUF_ARRAY, GGUF_UINT32 = 8, 9, 4
USUAL_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
AGAIN, OTHER = "fetch the weights again", "choose another file of this model"


def without_copies(files: Sequence[Path]) -> list[Path]:
    """Of a part's files that no index names, return the one of the usual name, or all where there is none: authors put the same
    weights beside it, named for other programs."""
    return [file for file in files if file.name in USUAL_NAMES] or list(files)


@dataclass(frozen=True, slots=True)
class TensorHead:
    """One tensor by its header; `nbytes` as it is stored, `dtype` in the file's own word (BF16, Q4_K)."""

    name: str
    shape: tuple[int, ...]
    nbytes: int
    dtype: str = ""

    @property
    def elements(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


def read_heads(model: str, path: Path) -> tuple[TensorHead, ...]:
    """Return the tensors of a file, by its name's ending: .gguf, else safetensors. Raises ModelCardError."""
    if path.suffix == ".gguf":
        return _reading(model, path, "GGUF", _gguf)
    return _reading(model, path, "safetensors", _safetensors)


def _reading(
    model: str, path: Path, kind: str, read: Callable[[BinaryIO, int], tuple[tuple[TensorHead, ...], int]]
) -> tuple[TensorHead, ...]:
    broken = f"model {model}: {path} is cut off or not a {kind} file; {AGAIN}"
    try:
        if path.exists() and not path.is_file():
            raise ModelCardError(f"model {model}: {path} is no regular file; name one")
        size = path.stat().st_size
        with path.open("rb") as file:
            heads, end = read(file, size)
    except _HeaderError as exc:
        raise ModelCardError(f"model {model}: {path} {exc}; {exc.advice}") from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as exc:
        raise ModelCardError(broken) from exc
    if size < end:
        raise ModelCardError(broken)
    return heads


class _HeaderError(Exception):
    """Raised for a header that can be read and says what cannot be."""

    def __init__(self, text: str, advice: str = AGAIN):
        super().__init__(text)
        self.advice = advice


def _safetensors(file: BinaryIO, size: int) -> tuple[tuple[TensorHead, ...], int]:
    """8 bytes of length, a JSON header, then the data that it describes."""
    length = struct.unpack("<Q", file.read(8))[0]
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError("header longer than the file")
    tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    heads, places = [], []
    for name, tensor in tensors.items():
        dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        if not _are_sizes(shape) or len(shape) > MAX_SIDES:
            raise _HeaderError(f"gives {_shown(name)} the shape {_shown(shape)}, which is none")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise _HeaderError(f"gives {_shown(name)} the data_offsets {_shown(offsets)}, which are no place")
        if not isinstance(dtype, str) or dtype not in SAFETENSORS_BITS:
            raise _HeaderError(f"holds {_shown(name)} as {_shown(dtype)}, which is no type of safetensors", OTHER)
        head = TensorHead(name, tuple(shape), offsets[1] - offsets[0], dtype)
        if head.elements * SAFETENSORS_BITS[dtype] != head.nbytes * 8:
            raise _HeaderError(f"has {head.nbytes:,} bytes for {_shown(name)}, {dtype} of shape {_shown(shape)}")
        heads.append(head)
        places.append((offsets[0], offsets[1], name))
    return tuple(heads), 8 + length + _end(places)


def _gguf(file: BinaryIO, size: int) -> tuple[tuple[TensorHead, ...], int]:
    """Magic, version, two counts, metadata, tensor heads, then the data, aligned (GGUF versions 2 and 3)."""
    magic, version, tensors, values = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError("no GGUF of version 2 or 3")
    alignment = GGUF_ALIGNMENT
    for _ in range(values):
        key, kind = _string(file), _number(file, "<I")
        value = _value(file, kind)
        if key == b"general.alignment" and kind == GGUF_UINT32:
            alignment = struct.unpack("<I", value)[0]
    if not alignment:
        raise _HeaderError("has a general.alignment of 0")
    heads, places = [], []
    for _ in range(tensors):
        name = _string(file).decode("utf-8")
        sides = _number(file, "<I")
        if sides > MAX_SIDES:
            raise _HeaderError(f"gives {_shown(name)} {sides:,} sides, which no tensor has")
        shape = struct.unpack(f"<{sides}Q", file.read(8 * sides))[::-1]
        kind, offset = _number(file, "<I"), _number(file, "<Q")
        if kind not in GGUF_TYPES:
            raise _HeaderError(f"holds {name:.60} as GGUF tensor type {kind}, which diffusers does not read", OTHER)
        weights, nbytes = GGUF_TYPES[kind]
        if not all(shape) or math.prod(shape) % weights:
            raise _HeaderError(f"gives {_shown(name)} the shape {_shown(shape)}, which {GGUF_NAMES[kind]} cannot have")
        heads.append(TensorHead(name, shape, math.prod(shape) // weights * nbytes, GGUF_NAMES[kind]))
        places.append((offset, offset + heads[-1].nbytes, name))
    return tuple(heads), -(-file.tell() // alignment) * alignment + _end(places)


def _shown(value: object) -> str:
    return f"{value!r:.60}"


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _end(places: list[tuple[int, int, str]]) -> int:
    """Return where the data of the last tensor ends; no two may lie in one place."""
    end = 0
    for first, last, name in sorted(places):
        if first < end:
            raise _HeaderError(f"lays {_shown(name)} over the data of another tensor")
        end = max(end, last)
    return end


def _value(file: BinaryIO, kind: int) -> bytes:
    if kind == GGUF_STRING:
        return _string(file)
    if kind == GGUF_ARRAY:
        of, count = _number(file, "<I"), _number(file, "<Q")
        if of in GGUF_VALUES:
            return _exactly(file, GGUF_VALUES[of] * count)
        for _ in range(count):
            _value(file, of)
        return b""
    return _exactly(file, GGUF_VALUES[kind])


def _string(file: BinaryIO) -> bytes:
    return _exactly(file, _number(file, "<Q"))


def _number(file: BinaryIO, layout: str) -> int:
    number: int = struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
    return number


def _exactly(file: BinaryIO, count: int) -> bytes:
    if count > MAX_STRING_BYTES:
        raise ValueError("a length beyond anything that is written")
    data = file.read(count)
    if len(data) < count:
        raise ValueError("the file ends")
    return data
