"""Headers of weights: what lies in a file, without reading a tensor."""

import json
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
