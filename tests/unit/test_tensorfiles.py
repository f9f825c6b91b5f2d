"""Headers of weights: what lies in a file, without reading a tensor."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from farm.errors import ModelCardError
from farm.tensorfiles import TensorHead, read_heads

gguf = pytest.importorskip("gguf", reason="the extra for GGUF is not installed")


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(str(path), "qwen_image")
    writer.add_array("tokens", ["a", "bb"])
    writer.add_array("sizes", [1, 2, 3])
    writer.add_uint32("answer", 42)
    quantised = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blocks.0.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("norm.weight", np.ones(6, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], *, itemsize: int = 2) -> Path:
    """A file of zeros: bfloat16, or float32."""
    heads, end = {}, 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * itemsize
        dtype = {2: "BF16", 4: "F32"}[itemsize]
        heads[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    header = json.dumps({"__metadata__": {"format": "pt"}, **heads}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    return path


def test_a_gguf_file_tells_its_tensors_and_their_bytes(tmp_path: Path) -> None:
    heads = read_heads("m", write_gguf(tmp_path / "m.gguf"))
    assert heads == (TensorHead("blocks.0.weight", (4, 64), 4 * 36, "Q4_0"), TensorHead("norm.weight", (6,), 24, "F32"))
    assert [head.elements for head in heads] == [256, 6]


def test_a_safetensors_file_tells_its_tensors_and_their_bytes(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a.weight": (2, 3), "scale": ()})
    assert read_heads("m", path) == (TensorHead("a.weight", (2, 3), 12, "BF16"), TensorHead("scale", (), 2, "BF16"))


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_a_file_that_is_cut_off_is_named(tmp_path: Path, ending: str) -> None:
    whole = write_gguf(tmp_path / "w.gguf") if ending == "gguf" else None
    whole = whole or write_safetensors(tmp_path / "w.safetensors", {"a": (100,)})
    data = whole.read_bytes()
    for length in (len(data) - 33, 40, 7, 0):
        cut = tmp_path / f"cut.{ending}"
        cut.write_bytes(data[:length])
        kind = "GGUF" if ending == "gguf" else "safetensors"
        with pytest.raises(ModelCardError, match=rf"^model m: .*cut\.{ending} is cut off or not a {kind} file; fetch"):
            read_heads("m", cut)


def test_a_length_that_no_header_has_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + struct.pack("<Q", 2**60) + bytes(100))
    with pytest.raises(ModelCardError, match="not a GGUF file"):
        read_heads("m", path)


def test_a_tensor_of_a_type_that_diffusers_does_not_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    head = struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 32, 99, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + head + bytes(100))
    with pytest.raises(ModelCardError, match="holds w as GGUF tensor type 99, which diffusers does not read; choose"):
        read_heads("m", path)


def header(tensors: object, size: int = 0) -> bytes:
    text = tensors.encode() if isinstance(tensors, str) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def tensor(dtype: object = "BF16", shape: object = (2,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ("[" * 200_000, " is cut off or not a safetensors file; fetch the weights again"),
        ({"w": 5}, " is cut off or not a safetensors file; fetch the weights again"),
        ({"w": tensor(offsets=[0])}, " gives 'w' the data_offsets [0], which are no place; fetch the weights again"),
        ({"w": tensor(offsets=[-4, 0])}, " gives 'w' the data_offsets [-4, 0], which are no place; fetch"),
        ({"w": tensor(offsets=[4, 0])}, " gives 'w' the data_offsets [4, 0], which are no place; fetch"),
        ({"w": tensor(offsets=[0, 4.0])}, " gives 'w' the data_offsets [0, 4.0], which are no place; fetch"),
        ({"w": tensor(shape="abc")}, " gives 'w' the shape 'abc', which is none; fetch the weights again"),
        ({"w": tensor(shape=[-2])}, " gives 'w' the shape [-2], which is none; fetch the weights again"),
        ({"w": tensor(shape=[True, 2])}, " gives 'w' the shape [True, 2], which is none; fetch the weights again"),
        ({"w": tensor(shape=[1] * 65)}, " gives 'w' the shape [1, 1"),
        ({"w": tensor(shape=[3])}, " has 4 bytes for 'w', BF16 of shape [3]; fetch the weights again"),
        (
            {"w": tensor(dtype="\x1b[31m")},
            r" holds 'w' as '\x1b[31m', which is no type of safetensors; choose another file of this model",
        ),
        ({"w": tensor(dtype=[])}, " holds 'w' as [], which is no type of safetensors; choose"),
        (
            {"a": tensor(), "b": tensor(offsets=[2, 6])},
            " lays 'b' over the data of another tensor; fetch the weights again",
        ),
    ],
)
def test_a_safetensors_header_that_cannot_be_is_refused(tmp_path: Path, tensors: object, said: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(header(tensors, size=16))
    with pytest.raises(ModelCardError) as caught:
        read_heads("m", path)
    assert caught.value.message.startswith(f"model m: {path}{said}")


def gguf_tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    sides = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name.encode() + sides + struct.pack("<IQ", kind, offset)


def gguf_value(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("values", "tensors", "said"),
    [
        ([gguf_value("general.alignment", 4, bytes(4))], [], " has a general.alignment of 0; fetch the weights again"),
        ([gguf_value("a", 9, struct.pack("<IQ", 9, 1) * 100_000)], [], " is cut off or not a GGUF file; fetch"),
        ([], [gguf_tensor("w", (0, 0), 0, 0)], " gives 'w' the shape (0, 0), which F32 cannot have; fetch"),
        ([], [gguf_tensor("w", (33,), 2, 0)], " gives 'w' the shape (33,), which Q4_0 cannot have; fetch"),
        ([], [gguf_tensor("w", (1,) * 65, 0, 0)], " gives 'w' 65 sides, which no tensor has; fetch"),
        (
            [],
            [gguf_tensor("a", (32,), 0, 0), gguf_tensor("b", (32,), 0, 96)],
            " lays 'b' over the data of another tensor; fetch the weights again",
        ),
    ],
)
def test_a_gguf_header_that_cannot_be_is_refused(
    tmp_path: Path, values: list[bytes], tensors: list[bytes], said: str
) -> None:
    path = tmp_path / "m.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    path.write_bytes(head + b"".join(values) + b"".join(tensors) + bytes(1024))
    with pytest.raises(ModelCardError) as caught:
        read_heads("m", path)
    assert caught.value.message.startswith(f"model m: {path}{said}")


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_a_pipe_is_not_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"m.{ending}"
    os.mkfifo(path)
    with pytest.raises(ModelCardError, match=r"^model m: .* is no regular file; name one$"):
        read_heads("m", path)
