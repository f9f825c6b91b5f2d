"""What lies in a file of weights, read from its header alone: safetensors and GGUF.

Reads no tensor, imports no torch. A file that is cut off, or is no such file, is a ModelCardError that names it.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from farm.errors import ModelCardError

MAX_HEADER_BYTES = 100_000_000
"""The longest JSON header that safetensors itself takes."""
GGUF_ALIGNMENT = 32
"""Where a file does not say otherwise (`general.alignment`), data begins at a multiple of this."""
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
    broken = f"model {model}: {path} is cut off or not a {kind} file; fetch the weights again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            heads, end = read(file, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, _UnknownTypeError) as exc:
        if isinstance(exc, _UnknownTypeError):
            raise ModelCardError(f"model {model}: {path} holds {exc}; choose another file of this model") from exc
        raise ModelCardError(broken) from exc
    if size < end:
        raise ModelCardError(broken)
    return heads


class _UnknownTypeError(Exception):
    """Raised for a tensor whose layout diffusers does not read."""


def _safetensors(file: BinaryIO, size: int) -> tuple[tuple[TensorHead, ...], int]:
    """8 bytes of length, a JSON header, then the data that it describes."""
    length = struct.unpack("<Q", file.read(8))[0]
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError("header longer than the file")
    tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    heads = tuple(
        TensorHead(
            name, tuple(tensor["shape"]), tensor["data_offsets"][1] - tensor["data_offsets"][0], str(tensor["dtype"])
        )
        for name, tensor in tensors.items()
    )
    return heads, 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)


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
    heads, end = [], 0
    for _ in range(tensors):
        name = _string(file).decode("utf-8")
        sides = _number(file, "<I")
        shape = struct.unpack(f"<{sides}Q", file.read(8 * sides))[::-1]
        kind, offset = _number(file, "<I"), _number(file, "<Q")
        if kind not in GGUF_TYPES:
            raise _UnknownTypeError(f"{name} as GGUF tensor type {kind}, which diffusers does not read")
        weights, nbytes = GGUF_TYPES[kind]
        heads.append(TensorHead(name, shape, math.prod(shape) // weights * nbytes, GGUF_NAMES[kind]))
        end = max(end, offset + heads[-1].nbytes)
    return tuple(heads), -(-file.tell() // alignment) * alignment + end


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
