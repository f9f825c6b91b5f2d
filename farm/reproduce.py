"""Render a picture again from its own provenance, and say how near the result is.

The image is rendered alone, while it was rendered in a batch: batch mates may change the lowest bits of floats, and so
a few pixels by one level. Other versions or another device may change more; both are said.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from farm.engine import Engine, Picture
from farm.errors import PictureError
from farm.modelcard import ModelCard
from farm.plan import ImageSpec, Numerics, card_identity
from farm.provenance import PictureFile, Provenance, encode_picture, pixels_sha256, read_picture
from farm.versions import installed


@dataclass(frozen=True, slots=True)
class Reproduction:
    """How a new rendering compares. `max_difference`: of 255 levels; `differing`: share of pixels that differ at all.

    `notes` say what was not as it had been: versions, device, weights, batch.
    """

    provenance: Provenance
    pixels: np.ndarray
    identical: bool
    max_difference: int
    differing: float
    notes: tuple[str, ...]


EngineOf = Callable[[ModelCard, Numerics], Engine]
"""Makes an engine that is not loaded yet; `reproduce` loads and unloads it."""


def reproduce(picture: PictureFile, card: ModelCard, *, engine: EngineOf, device: str = "cpu") -> Reproduction:
    """Render the picture again with this machine's versions on `device`, and compare pixels.

    `card` is this machine's card of the name in the provenance, pinned. Raises what loading and rendering raise, and
    PictureError where the new rendering is no picture.
    """
    provenance = picture.provenance
    numerics, notes = _numerics_here(provenance.numerics, device)
    if card_identity(card, provenance.numerics.device) != provenance.model:
        changed = sorted(
            name
            for name, value in (provenance.model | card_identity(card, provenance.numerics.device)).items()
            if (provenance.model.get(name), card_identity(card, provenance.numerics.device).get(name)) != (value, value)
        )
        notes.append(f"the model is not the one it was rendered with: {', '.join(changed)} differ")
    if numerics.batch > 1:
        notes.append("rendered alone; a batch of its own day may have changed the lowest bits")
    spec = ImageSpec(
        index=provenance.index,
        row=0,
        key=provenance.key,
        prompt=provenance.prompt,
        seed=provenance.seed,
        params=provenance.params,
        carry={},
    )
    drawn: list[Picture] = []
    renderer = engine(card, numerics)
    try:
        renderer.load()
        renderer.render([spec], on_picture=drawn.append)
    finally:
        renderer.unload()
    if drawn[0].nan:
        raise PictureError(f"image {spec.index} came out as no finite numbers here; see `farm doctor` for this device")
    return compare(picture, drawn[0].pixels, notes=tuple(notes))


def compare(picture: PictureFile, pixels: np.ndarray, *, notes: tuple[str, ...] = ()) -> Reproduction:
    """Compare newly rendered pixels with a picture's; those of a lossy file after the same loss."""
    provenance = picture.provenance
    if pixels.shape == picture.pixels.shape and pixels_sha256(pixels) == provenance.pixels_sha256:
        return Reproduction(provenance, pixels, True, 0, 0.0, notes)
    if pixels.shape != picture.pixels.shape:
        raise PictureError(
            f"the file is {picture.pixels.shape[1]}x{picture.pixels.shape[0]} and its provenance says "
            f"{pixels.shape[1]}x{pixels.shape[0]}; it was resized or cropped since"
        )
    seen = pixels
    if provenance.format != "png":
        seen = read_picture(encode_picture(pixels, provenance)).pixels
    difference = np.abs(seen.astype(np.int16) - picture.pixels.astype(np.int16)).max(axis=2)
    return Reproduction(provenance, pixels, False, int(difference.max()), float((difference > 0).mean()), notes)


def _numerics_here(planned: Numerics, device: str) -> tuple[Numerics, list[str]]:
    """Return the numerics of this machine, and how they differ from the planned ones."""
    notes = []
    here = {}
    for package, then in sorted(planned.versions.items()):
        now = here[package] = installed(package)
        if now != then:
            notes.append(f"{package} was {then} and is {now} here")
    kind = "cuda" if device.startswith("cuda") else "cpu"
    if kind != planned.device:
        notes.append(f"it was rendered on {planned.device} and this is {kind}")
    return planned.model_copy(update={"versions": here, "device": kind}), notes
