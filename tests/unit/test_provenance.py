"""What stands inside picture files, and that it comes out as it went in."""

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from farm.errors import NewerVersionError, PictureError
from farm.provenance import Provenance, encode_picture, pixels_sha256, read_picture, read_provenance
from tests.drawing import numerics, spec

FORMATS = ("png", "jpeg", "webp")
ODD = [
    "a red circle",
    "emoji 🎨🦊, 漢字, \u202eright to left",
    "lone \ud83d surrogates \udfff",
    "controls \x00\x01\x1b\x7f\ufffe\uffff and\nlines\r\n\tand <xml> & ]]> \"quotes\" 'too'",
    "word 漢🦊 " * 12_500,
]
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def provenance(prompt: str = "a red circle", **changes: Any) -> Provenance:
    fields: dict[str, Any] = {
        "index": 7,
        "key": "row/7 ü",
        "prompt": prompt,
        "seed": 2**32 - 1,
        "params": spec(0, negative_prompt="blurry", guidance_scale=2.5).params,
        "model": {"name": "sketch", "family": "z-image", "hub": None, "revision": "sha256:00", "path": None},
        "numerics": numerics(),
        "plan": "f" * 64,
        "format": "png",
        "quality": None,
        "pixels_sha256": pixels_sha256(PIXELS),
    }
    return Provenance(**fields | changes)


def parameters_of(data: bytes) -> str:
    image = Image.open(io.BytesIO(data))
    if image.format == "PNG":
        return str(image.info["parameters"])
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment.startswith(b"UNICODE\0")
    return str(comment[8:].decode("utf-16-be"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prompt", ODD, ids=["plain", "unicode", "surrogates", "controls", "100 kB"])
def test_provenance_comes_out_of_a_file_as_it_went_in(form: Any, prompt: str) -> None:
    written = provenance(prompt, format=form)
    assert read_provenance(encode_picture(PIXELS, written)) == written


@pytest.mark.parametrize("form", FORMATS)
def test_viewers_find_the_parameters_text(form: Any) -> None:
    assert parameters_of(encode_picture(PIXELS, provenance("a red circle, 漢字 🎨", format=form))) == (
        "a red circle, 漢字 🎨\n"
        "Negative prompt: blurry\n"
        "Steps: 3, Sampler: Euler, CFG scale: 2.5, Seed: 4294967295, Size: 64x64, Model: sketch, "
        f"Version: diffusers {numerics().versions['diffusers']}"
    )


def test_parameters_show_what_cannot_be_shown_as_a_mark_and_keep_lines() -> None:
    first = provenance("a\x00b\ud83dc\nd").parameters().splitlines()
    assert first[:2] == ["a\ufffdb\ufffdc", "d"]


def test_a_long_prompt_keeps_both_ends_of_its_parameters_in_a_jpeg() -> None:
    text = parameters_of(encode_picture(PIXELS, provenance(ODD[-1], format="jpeg")))
    assert text.startswith("word 漢🦊 word")
    assert " … " in text
    assert "Seed: 4294967295" in text


@pytest.mark.parametrize("form", FORMATS)
def test_xmp_says_that_the_picture_is_synthetic(form: Any) -> None:
    image = Image.open(io.BytesIO(encode_picture(PIXELS, provenance(format=form))))
    packet = image.info["XML:com.adobe.xmp" if form == "png" else "xmp"]
    described = ET.fromstring(packet).find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert described is not None
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    assert described.attrib[name] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


@pytest.mark.parametrize("form", FORMATS)
def test_equal_pictures_are_equal_files(form: Any) -> None:
    assert encode_picture(PIXELS, provenance(format=form)) == encode_picture(PIXELS.copy(), provenance(format=form))


def test_a_png_has_the_very_pixels_and_quality_has_its_effect() -> None:
    assert np.array_equal(read_picture(encode_picture(PIXELS, provenance())).pixels, PIXELS)
    for form in ("jpeg", "webp"):
        small, large = (len(encode_picture(PIXELS, provenance(format=form, quality=q))) for q in (30, 100))
        assert small < large


def plain_png(**texts: str) -> bytes:
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def test_files_that_are_not_ours_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"nowhere\.png: cannot be read: No such file"):
        read_picture(tmp_path / "nowhere.png")
    with pytest.raises(PictureError, match="is not a PNG, JPEG or WebP file"):
        read_picture(b"GIF89a")
    with pytest.raises(PictureError, match="carries no provenance of the farm's"):
        read_picture(plain_png(parameters="a cat\nSteps: 20"))
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "WEBP", xmp=b"<x:no xml")
    with pytest.raises(PictureError, match="carries no provenance"):
        read_picture(file.getvalue())


def test_damaged_files_and_blocks_are_refused() -> None:
    whole = encode_picture(PIXELS, provenance())
    with pytest.raises(PictureError, match="is damaged"):
        read_picture(whole[: len(whole) // 2])
    for text in ("{", "[]", "{}", '{"version": 1}', '{"version": 1, "params": 3}'):
        with pytest.raises(PictureError, match="its provenance is damaged"):
            read_picture(plain_png(farm=text))
    fields = json.loads(provenance().to_json())
    for wrong in ({"prompt": 3}, {"seed": "1"}, {"extra": 1}, {"model": []}, {"numerics": {"device": "abacus"}}):
        with pytest.raises(PictureError, match="its provenance is damaged"):
            read_picture(plain_png(farm=json.dumps(fields | wrong)))


def test_a_newer_farms_block_is_refused_as_such() -> None:
    fields = json.loads(provenance().to_json())
    with pytest.raises(NewerVersionError, match="its provenance has version 2, this farm reads up to 1"):
        read_picture(plain_png(farm=json.dumps(fields | {"version": 2, "news": True})))


def test_the_block_names_no_job_run_or_time() -> None:
    fields = set(json.loads(provenance().to_json()))
    assert not fields & {"job", "run", "renderer", "created_at", "attempt"}
