"""Judge whether a picture shows what a prompt asks for: background, colours, count, places and shapes, each by itself.

Owns how pixels become things. Knows no model and needs no torch, so a picture of any origin can be judged. A shape is
right only where it fits the ideal outline of its kind; a blob that resembles it most is not enough.

    python -m farm.sketch.judge --drawings            # how often the judge is right about the drawings themselves
    python -m farm.sketch.judge "a red circle" a.png  # judge one picture
"""

import argparse
import itertools
import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from farm.sketch.drawing import COLOURS, SHAPES, draw, outline, sample
from farm.sketch.language import Request, Wanted, caption, read

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], dtype=np.float32)
# Colours of the palette lie 75 or more apart; a pixel counts as a thing's from about half of the least distance on.
_GROUND_TOLERANCE = 34.0
_COLOUR_TOLERANCE = 45.0
_LEAST_AREA = 12
_LEAST_FIT = 0.86
_LEAST_OFFSET = 8.0
_OVERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Found:
    """One thing seen in a picture; `fit` is its overlap (from 0 to 1) with the ideal outline of `shape`."""

    colour: str
    shape: str
    fit: float
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows; `background` is None where the border is of no one colour."""

    background: str | None
    things: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is right in a picture; None where the prompt asks for nothing of the kind."""

    background: bool | None
    colours: bool | None
    count: bool | None
    places: bool | None
    shapes: bool | None

    @property
    def everything(self) -> bool:
        return all(getattr(self, field.name) is not False for field in fields(self))


def judge(picture: Image.Image, request: Request) -> Verdict:
    """Judge a 64x64 picture against what a prompt asks for."""
    seen = look(picture)
    wanted = request.things
    pairing = _pair_up(wanted, seen.things)
    places = None
    if request.relation is not None:
        places = pairing is not None and _stands(pairing[0], pairing[1], request.relation)
    return Verdict(
        background=None if request.background is None else seen.background == request.background,
        colours=_colours_match(wanted, pairing),
        count=len(seen.things) == len(wanted) if wanted else None,
        places=places,
        shapes=_shapes_match(wanted, pairing),
    )


def look(picture: Image.Image) -> Seen:
    """Find the background and the things of a picture, from left to right."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    ring = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    # The pixel that is nearest to all others: a mean or a median of two colours would be neither.
    central = ring[np.linalg.norm(ring[:, None] - ring[None], axis=-1).mean(axis=1).argmin()]
    alike = np.linalg.norm(ring - central, axis=1) < _GROUND_TOLERANCE
    ground = np.median(ring[alike], axis=0)
    background = _name(ground) if alike.mean() >= 0.9 else None
    mask = np.linalg.norm(pixels - ground, axis=-1) > _GROUND_TOLERANCE
    things = [_identify(pixels, ground, component) for component in _components(mask)]
    return Seen(background, tuple(sorted(things, key=lambda thing: (thing.x, thing.y))))


def _name(colour: np.ndarray) -> str | None:
    """The palette's name for a colour, or None for a colour that is far from all."""
    distances = np.linalg.norm(_PALETTE - colour, axis=1)
    nearest = int(distances.argmin())
    return _NAMES[nearest] if distances[nearest] < _COLOUR_TOLERANCE else None


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected areas of a mask without the specks."""
    waiting = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    components = []
    while waiting:
        edge = [waiting.pop()]
        area = list(edge)
        while edge:
            y, x = edge.pop()
            reached = waiting & {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)}
            waiting -= reached
            edge += reached
            area += reached
        if len(area) >= _LEAST_AREA:
            component = np.zeros_like(mask)
            component[tuple(np.array(area).T)] = True
            components.append(component)
    return components


def _identify(pixels: np.ndarray, ground: np.ndarray, component: np.ndarray) -> Found:
    # Edge pixels are mixtures with the background: the colour is that of the half which differs from it most.
    difference = np.linalg.norm(pixels - ground, axis=-1)
    core = component & (difference >= np.median(difference[component]) * 0.98)
    colour = np.median(pixels[core], axis=0)
    axis = colour - ground
    near = _grown(component)
    coverage = np.clip(((pixels - ground) @ axis) / max(float(axis @ axis), 1.0), 0, 1) * near
    rows, columns = np.mgrid[: pixels.shape[0], : pixels.shape[1]] + 0.5
    area = float(coverage.sum())
    if area < 1:
        return Found("unknown", "unknown", 0.0, float(columns[component].mean()), float(rows[component].mean()))
    x, y = float((coverage * columns).sum() / area), float((coverage * rows).sum() / area)
    shape, fit = max(((kind, _fit(coverage, kind, area=area, x=x, y=y)) for kind in SHAPES), key=lambda pair: pair[1])
    return Found(_name(colour) or "unknown", shape if fit >= _LEAST_FIT else "unknown", round(fit, 3), x, y)


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels next to it."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    grown = np.zeros_like(mask)
    for down, right in itertools.product(range(3), range(3)):
        grown |= padded[down : down + height, right : right + width]
    return grown


def _fit(coverage: np.ndarray, kind: str, *, area: float, x: float, y: float) -> float:
    """Overlap over union of a soft mask and the ideal shape of its area around its centre of mass."""
    centre_x, centre_y, unit_area = _MOMENTS[kind]
    radius = (area / unit_area) ** 0.5
    height, width = coverage.shape
    canvas = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    corners = outline(kind, x=x - radius * centre_x, y=y - radius * centre_y, radius=radius)
    ImageDraw.Draw(canvas).polygon(
        [(px * _OVERSAMPLING - 0.5, py * _OVERSAMPLING - 0.5) for px, py in corners], fill=255
    )
    ideal = np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float32) / 255
    return float(np.minimum(coverage, ideal).sum() / np.maximum(coverage, ideal).sum())


def _moments(kind: str) -> tuple[float, float, float]:
    """The centre of mass and the area of a unit shape, by the shoelace formula."""
    corners = np.array(outline(kind, x=0.0, y=0.0, radius=1.0))
    following = np.roll(corners, -1, axis=0)
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    area = cross.sum() / 2
    centre = ((corners + following) * cross[:, None]).sum(axis=0) / (6 * area)
    return float(centre[0]), float(centre[1]), abs(float(area))


_MOMENTS = {kind: _moments(kind) for kind in SHAPES}


def _pair_up(wanted: tuple[Wanted, ...], found: tuple[Found, ...]) -> tuple[Found, ...] | None:
    """The found things in the order of the wanted ones, as they agree best, or None for another number of them."""
    if not wanted or len(wanted) != len(found):
        return None

    def agreement(order: tuple[Found, ...]) -> int:
        return sum(
            2 * (want.colour in (None, thing.colour)) + (want.shape == thing.shape)
            for want, thing in zip(wanted, order, strict=True)
        )

    return max(itertools.permutations(found), key=agreement)


def _colours_match(wanted: tuple[Wanted, ...], pairing: tuple[Found, ...] | None) -> bool | None:
    if all(want.colour is None for want in wanted):
        return None
    return pairing is not None and all(
        want.colour in (None, thing.colour) for want, thing in zip(wanted, pairing, strict=True)
    )


def _shapes_match(wanted: tuple[Wanted, ...], pairing: tuple[Found, ...] | None) -> bool | None:
    if not wanted:
        return None
    return pairing is not None and all(want.shape == thing.shape for want, thing in zip(wanted, pairing, strict=True))


def _stands(first: Found, second: Found, relation: str) -> bool:
    right, down = first.x - second.x, first.y - second.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    towards = -along if relation in ("left of", "above") else along
    return towards > _LEAST_OFFSET and towards > abs(across)


def judge_drawings(count: int, *, seed: int = 0) -> dict[str, float]:
    """The share of drawings that are found right in each respect and in all; what is below 1 is the judge's error."""
    rng = np.random.default_rng(seed)
    verdicts = []
    for _ in range(count):
        scene = sample(rng)
        verdicts.append(judge(draw(scene), read(caption(scene, rng))))
    return shares(verdicts)


def shares(verdicts: list[Verdict]) -> dict[str, float]:
    """The share of right verdicts in each respect, among the pictures whose prompt asks for it."""
    result = {}
    for respect in (*(field.name for field in fields(Verdict)), "everything"):
        asked = [value for verdict in verdicts if (value := getattr(verdict, respect)) is not None]
        result[respect] = sum(asked) / len(asked) if asked else float("nan")
    return result


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of shares in percent, a labelled row each."""
    respects = (*(field.name for field in fields(Verdict)), "everything")
    lines = [f"| | {' | '.join(respects)} |", f"|---|{'---|' * len(respects)}"]
    lines += [
        f"| {label} | {' | '.join(f'{100 * values[respect]:.1f}' for respect in respects)} |"
        for label, values in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", help="what the picture should show")
    parser.add_argument("picture", nargs="?", type=Path, help="a 64x64 picture")
    parser.add_argument("--drawings", action="store_true", help="judge drawings instead, to test the judge")
    parser.add_argument("--count", type=int, default=2000, help="number of drawings")
    options = parser.parse_args()
    if options.drawings:
        result = judge_drawings(options.count)
        print(table({"drawings": result}), json.dumps({"drawings": options.count, **result}), sep="\n\n")
    elif options.prompt and options.picture:
        verdict = judge(Image.open(options.picture), read(options.prompt))
        print(json.dumps({field.name: getattr(verdict, field.name) for field in fields(verdict)}))
    else:
        parser.error("give a prompt and a picture, or --drawings")


if __name__ == "__main__":
    main()
