"""Provenance: what made a picture, written inside its file, so that the file alone can be rendered again.

Three blocks: AUTOMATIC1111's `parameters` text, which viewers read; JSON, which `farm reproduce` reads; and XMP with
IPTC's digital source type. They hold only what decides the pixels, no time, job or renderer: equal images, equal files.

| | parameters | JSON | XMP |
|---|---|---|---|
| PNG | text `parameters` | text `farm` | iTXt `XML:com.adobe.xmp` |
| JPEG | EXIF UserComment | APP4 segments `farm`, since one segment holds 64 KiB | APP1 |
| WebP | EXIF UserComment | in the XMP, as `farm:provenance` | XMP chunk |
"""

import hashlib
import io
import json
import re
import struct
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from pydantic import ValidationError

from farm.errors import NewerVersionError, PictureError
from farm.modelcard import RenderParams
from farm.plan import Numerics

VERSION = 1
Format = Literal["png", "webp", "jpeg"]
SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
DEFAULT_QUALITY = 95
NAMESPACE = "urn:diffusion-farm:provenance"

_USER_COMMENT = 0x9286
_EXIF_IFD = 0x8769
_UNICODE = b"UNICODE\0"
_XMP_KEY = "XML:com.adobe.xmp"
_APP4 = b"\xff\xe4"
_APP4_NAME = b"farm\0"
_APP4_BYTES = 65_000
_JPEG_COMMENT_END = 7_000
"""Characters kept of either end of a text that EXIF in one JPEG segment cannot hold: up to four bytes each."""
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made one picture. `model` is what of its card decides a pixel; `pixels_sha256` is of the raw RGB bytes.

    `format` and `quality` are those of the file, `plan` the digest of the plan that it was rendered under.
    """

    index: int
    key: str | None
    prompt: str
    seed: int
    params: RenderParams
    model: dict[str, Any]
    numerics: Numerics
    plan: str
    format: Format
    quality: int | None
    pixels_sha256: str

    def to_json(self) -> str:
        """Return ASCII JSON, sorted, without blanks: equal provenance is equal text. Lone surrogates survive."""
        fields = {
            "version": VERSION,
            "index": self.index,
            "key": self.key,
            "prompt": self.prompt,
            "seed": self.seed,
            "params": self.params.model_dump(mode="json"),
            "model": self.model,
            "numerics": self.numerics.model_dump(mode="json"),
            "plan": self.plan,
            "format": self.format,
            "quality": self.quality,
            "pixels_sha256": self.pixels_sha256,
        }
        return json.dumps(fields, ensure_ascii=True, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str) -> "Provenance":
        """Parse `to_json`. Raises PictureError for what does not parse, NewerVersionError for a newer farm's."""
        broken = f"{where}: its provenance is damaged; use the file as the farm stored it, or `farm pull` it again"
        try:
            fields = json.loads(text)
            version = fields.pop("version")
            if isinstance(version, int) and version > VERSION:
                raise NewerVersionError(
                    f"{where}: its provenance has version {version}, this farm reads up to {VERSION}; upgrade this farm"
                )
            parsed = cls(
                **fields | {"params": RenderParams(**fields["params"]), "numerics": Numerics(**fields["numerics"])}
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError) as exc:
            raise PictureError(broken) from exc
        texts = (parsed.prompt, parsed.plan, parsed.pixels_sha256, parsed.key or "")
        numbers = (parsed.index, parsed.seed, parsed.quality or 0)
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(isinstance(number, int) for number in numbers)
            or not isinstance(parsed.model, dict)
        ):
            raise PictureError(broken)
        return parsed

    def parameters(self) -> str:
        """Return AUTOMATIC1111's text; control characters and lone surrogates, which no viewer shows, become U+FFFD."""
        params = self.params
        details = {
            "Steps": params.num_inference_steps,
            "Sampler": "Euler",
            "CFG scale": f"{params.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{params.width}x{params.height}",
            "Model": _quoted(str(self.model.get("name"))),
            "Version": _quoted(f"diffusers {self.numerics.versions.get('diffusers', 'unknown')}"),
        }
        lines = [self.prompt]
        if params.negative_prompt:
            lines.append(f"Negative prompt: {params.negative_prompt}")
        lines.append(", ".join(f"{name}: {value}" for name, value in details.items()))
        return _UNPRINTABLE.sub("\ufffd", "\n".join(lines))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def pixels_sha256(pixels: np.ndarray) -> str:
    """Return the sha256 of the raw RGB bytes, rows from the top."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def encode_picture(pixels: np.ndarray, provenance: Provenance) -> bytes:
    """Return the file of a picture, height x width x 3 uint8, with its provenance inside. Equal input, equal bytes."""
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    text = provenance.to_json()
    if provenance.format == "png":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", provenance.parameters())
        chunks.add_text("farm", text)
        chunks.add_itxt(_XMP_KEY, _xmp(None))
        image.save(file, "PNG", pnginfo=chunks)
    elif provenance.format == "jpeg":
        comment = provenance.parameters()
        if len(comment) > 2 * _JPEG_COMMENT_END:
            comment = f"{comment[:_JPEG_COMMENT_END]} … {comment[-_JPEG_COMMENT_END:]}"
        image.save(
            file,
            "JPEG",
            quality=provenance.quality or DEFAULT_QUALITY,
            subsampling="4:4:4",
            exif=_exif(comment),
            xmp=_xmp(None).encode(),
            extra=_segments(text.encode("ascii")),
        )
    else:
        image.save(
            file,
            "WEBP",
            quality=provenance.quality or DEFAULT_QUALITY,
            exif=_exif(provenance.parameters()),
            xmp=_xmp(text).encode(),
        )
    return file.getvalue()


def _exif(comment: str) -> Image.Exif:
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + comment.encode("utf-16-be")
    return exif


def _xmp(provenance: str | None) -> str:
    inside = f"<farm:provenance>{escape(provenance)}</farm:provenance>" if provenance else ""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' xmlns:farm="{NAMESPACE}"'
        f' Iptc4xmpExt:DigitalSourceType="{SYNTHETIC}">{inside}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    )


def _segments(data: bytes) -> bytes:
    """Cut data into JPEG APP4 segments: name, number from 1, count (two bytes each, big-endian), a piece."""
    pieces = [data[i : i + _APP4_BYTES] for i in range(0, len(data), _APP4_BYTES)]
    segments = b""
    for number, piece in enumerate(pieces, start=1):
        body = _APP4_NAME + struct.pack(">HH", number, len(pieces)) + piece
        segments += _APP4 + struct.pack(">H", len(body) + 2) + body
    return segments


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A picture file as it was read: its pixels, height x width x 3 uint8, and what it says of itself."""

    pixels: np.ndarray
    provenance: Provenance


def read_picture(source: Path | bytes) -> PictureFile:
    """Read a picture and its provenance. Raises PictureError, or NewerVersionError where a newer farm wrote it."""
    where = str(source) if isinstance(source, Path) else "picture"
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except OSError as exc:
        raise PictureError(f"{where}: cannot be read: {exc.strerror}; check the path") from exc
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            pixels = np.asarray(image.convert("RGB"))
            text = _provenance_text(image)
    except UnidentifiedImageError as exc:
        raise PictureError(f"{where}: is not a PNG, JPEG or WebP file; give a picture that the farm rendered") from exc
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as exc:
        raise PictureError(f"{where}: is damaged: {exc}; `farm pull` it again") from exc
    if text is None:
        raise PictureError(
            f"{where}: carries no provenance of the farm's; use the file as the farm stored it (editors and chats "
            f"strip such data)"
        )
    return PictureFile(pixels, Provenance.from_json(text, where))


def read_provenance(source: Path | bytes) -> Provenance:
    """Read a picture's provenance. Raises as `read_picture` does."""
    return read_picture(source).provenance


def _provenance_text(image: ImageFile.ImageFile | Image.Image) -> str | None:
    if isinstance(image, PngImagePlugin.PngImageFile):
        found = image.text.get("farm")
        return str(found) if found is not None else None
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        pieces = {}
        count = 0
        for name, body in image.applist:
            if name == "APP4" and body.startswith(_APP4_NAME):
                start = len(_APP4_NAME) + 4
                number, count = struct.unpack(">HH", body[len(_APP4_NAME) : start])
                pieces[number] = body[start:]
        if not pieces:
            return None
        return b"".join(pieces.get(number, b"") for number in range(1, count + 1)).decode("ascii", "replace")
    xmp = image.info.get("xmp")
    if not xmp:
        return None
    try:
        root = ET.fromstring(xmp.decode("utf-8").strip("\0") if isinstance(xmp, bytes) else xmp)
    except (ET.ParseError, UnicodeDecodeError):
        return None
    found_element = root.find(f".//{{{NAMESPACE}}}provenance")
    return None if found_element is None else found_element.text or ""
