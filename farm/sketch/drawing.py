"""Draw scenes of flat shapes, the pictures that the bundled model learns.

Owns what a scene is, how scenes are drawn at random and what they look like as pixels. Knows nothing of words: captions
and prompts live in `farm.sketch.language`. Equal seeds give equal scenes, and equal scenes give equal pixels.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Width and height of a picture in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (250, 138, 24),
    "yellow": (253, 217, 42),
    "green": (34, 155, 72),
    "cyan": (52, 206, 224),
    "blue": (36, 82, 214),
    "purple": (132, 54, 190),
    "pink": (252, 132, 190),
    "white": (250, 250, 250),
    "gray": (134, 138, 144),
    "black": (18, 18, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
SIZES = ("small", "medium", "large")
RELATIONS = ("left of", "right of", "above", "below")

# Radii in pixels. Two objects stand on centres 32 apart and three 20 apart, so nothing touches anything or the border.
_RADII = {
    1: {"small": 9.0, "medium": 15.0, "large": 23.0},
    2: {"small": 9.0, "medium": 12.0, "large": 14.0},
    3: {"small": 8.5, "medium": 8.5, "large": 8.5},
}
# Layouts are moved by whole tokens of the transformer (8 pixels): a shape then looks the same to the model wherever it
# stands, and a small model draws it with straight edges.
_TOKEN = 8
_SHAPE_WEIGHTS = {"circle": 1.0, "square": 1.0, "triangle": 1.1, "star": 1.4, "heart": 1.2, "diamond": 1.0}
_OVERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape in a scene; `x` and `y` are its centre and `radius` its half extent, all in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows: one to three things on a background.

    `relation` says where the first of two things stands as seen from the second, and is None for one thing and for
    several things of a kind.
    """

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None


def sample(rng: np.random.Generator) -> Scene:
    """Draw a random scene: 36 % show one thing, 20 % two or three of a kind, 44 % two things in a relation."""
    background = str(rng.choice(list(COLOURS)))
    draw_kind = rng.random()
    if draw_kind < 0.36:
        return _one(rng, background)
    if draw_kind < 0.56:
        return _several(rng, background, count=int(rng.integers(2, 4)))
    return _pair(rng, background)


def draw(scene: Scene, *, side: int = SIDE) -> Image.Image:
    """Draw a scene as an RGB picture with smooth edges."""
    scale = _OVERSAMPLING
    canvas = Image.new("RGB", (side * scale, side * scale), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        corners = outline(thing.shape, x=thing.x, y=thing.y, radius=thing.radius)
        pen.polygon([(px * scale - 0.5, py * scale - 0.5) for px, py in corners], fill=COLOURS[thing.colour])
    return canvas.reduce(scale)


def outline(shape: str, *, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y), in pixels, y pointing down."""
    return [(x + radius * px, y + radius * py) for px, py in _UNIT_OUTLINES[shape]]


def _one(rng: np.random.Generator, background: str) -> Scene:
    size = str(rng.choice(SIZES, p=[0.36, 0.36, 0.28]))
    middle = SIDE // 2
    # A large shape has no room to move.
    centre = (middle, middle) if size == "large" else (middle + _shift(rng), middle + _shift(rng))
    return Scene(background, (_thing(rng, background, size=size, centre=centre, count=1),))


def _several(rng: np.random.Generator, background: str, *, count: int) -> Scene:
    size = str(rng.choice(SIZES, p=[0.3, 0.45, 0.25])) if count == 2 else "medium"
    y = SIDE // 2 + _shift(rng)
    centres = [16, 48] if count == 2 else [12, 32, 52]
    first = _thing(rng, background, size=size, centre=(centres[0], y), count=count)
    return Scene(background, tuple(replace(first, x=float(x)) for x in centres))


def _pair(rng: np.random.Generator, background: str) -> Scene:
    relation = str(rng.choice(RELATIONS))
    across = SIDE // 2 + _shift(rng)
    near, far = (16, 48) if relation in ("left of", "above") else (48, 16)
    horizontal = relation in ("left of", "right of")
    things: list[Thing] = []
    while len(things) < 2:
        along = near if not things else far
        centre = (along, across) if horizontal else (across, along)
        size = str(rng.choice(SIZES, p=[0.3, 0.45, 0.25]))
        thing = _thing(rng, background, size=size, centre=centre, count=2)
        if not things or (thing.shape, thing.colour) != (things[0].shape, things[0].colour):
            things.append(thing)
    return Scene(background, tuple(things), relation)


def _thing(rng: np.random.Generator, background: str, *, size: str, centre: tuple[float, float], count: int) -> Thing:
    weights = np.array([_SHAPE_WEIGHTS[shape] for shape in SHAPES])
    shape = str(rng.choice(SHAPES, p=weights / weights.sum()))
    colour = str(rng.choice([name for name in COLOURS if name != background]))
    return Thing(shape, colour, size, float(centre[0]), float(centre[1]), _RADII[count][size])


def _shift(rng: np.random.Generator) -> int:
    return _TOKEN * int(rng.integers(-1, 2))


def _unit_outlines() -> dict[str, list[tuple[float, float]]]:
    """Each shape within the square from -1 to 1."""
    turn = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    star = [
        (radius * math.sin(math.pi * corner / 5), 0.06 - radius * math.cos(math.pi * corner / 5))
        for corner, radius in ((i, 1.04 if i % 2 == 0 else 0.46) for i in range(10))
    ]
    # The usual heart curve, scaled from its extent of 32 by 29 units.
    heart = [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) + 2.5) / 15.2,
        )
        for t in turn
    ]
    return {
        "circle": [(0.95 * math.cos(t), 0.95 * math.sin(t)) for t in turn],
        "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
        "triangle": [(0.0, -0.92), (1.0, 0.82), (-1.0, 0.82)],
        "star": star,
        "heart": heart,
        "diamond": [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)],
    }


_UNIT_OUTLINES = _unit_outlines()
