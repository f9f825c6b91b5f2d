"""The words of `sketch`: captions for scenes, and what a prompt asks for.

Owns the vocabulary and the rules that reduce English to it. The tokenizer in the weights folder is built from the same
rules, so that the model and the judge read a prompt alike. Knows nothing of pixels or tensors.
"""

import re
from dataclasses import dataclass

import numpy as np

from farm.sketch.drawing import COLOURS, SHAPES, SIZES, Scene, Thing

COUNTS = {"two": 2, "three": 3}
_RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below", "and": "left of"}
WORDS = (*COLOURS, *SHAPES, *SIZES, *COUNTS, *_RELATION_WORDS, "background")
"""Every word that the model knows; the tokenizer turns any other into one token for the unknown."""

# Pattern and replacement, applied in order to lower-case text, here by `re` and in the tokenizer by Oniguruma: keep to
# what both read alike.
RULES: tuple[tuple[str, str], ...] = (
    ("&", " and "),
    (r"[!-/:-@\[-`{-~]+", " "),
    (r"\b(on top of|over|atop|higher than)\b", "above"),
    (r"\b(underneath|under|beneath|lower than)\b", "below"),
    (r"\b(next to|beside|plus)\b", "and"),
    (r"\b(a pair of|a couple of|2)\b", "two"),
    (r"\b3\b", "three"),
    (r"\b(circles|discs?|disks?|dots?|balls?)\b", "circle"),
    (r"\b(squares|box|boxes)\b", "square"),
    (r"\btriangles\b", "triangle"),
    (r"\bstars\b", "star"),
    (r"\bhearts\b", "heart"),
    (r"\b(diamonds|rhombus|rhombuses)\b", "diamond"),
    (r"\b(big|huge|giant)\b", "large"),
    (r"\b(tiny|little)\b", "small"),
    (r"\bgrey\b", "gray"),
    (r"\bviolet\b", "purple"),
    (r"\b(crimson|scarlet)\b", "red"),
    (r"\b(turquoise|aqua|teal)\b", "cyan"),
    (r"\b(golden|gold)\b", "yellow"),
    (r"\b(backdrop|canvas)\b", "background"),
    # Words that say nothing about the picture.
    (r"\b(a|an|the|one|single|of|on|in|to|at|with|against|side|there|is|are|it|by|for|from)\b", " "),
    (r"\b(drawing|picture|painting|image|photo|photograph|sketch|illustration|icon|poster|art|artwork|render)\b", " "),
    (r"\b(masterpiece|best|high|good|quality|highly|detailed|beautiful|simple|flat|clean|crisp|sharp|minimal)\b", " "),
    (r"\b(very|nice|solid|plain|bright|vivid|colored|coloured|colors?|colours?|shapes?|style|drawn|showing)\b", " "),
)
_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in RULES)

_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of", "left of", "and", "next to"),
    "right of": ("right of", "to the right of", "on the right of", "right of"),
    "above": ("above", "over", "above", "on top of"),
    "below": ("below", "under", "below", "beneath"),
}
_OPENINGS = ("", "", "", "", "a drawing of ", "a picture of ", "masterpiece, best quality, ", "an illustration of ")
_ENDINGS = ("", "", "", "", "", ", masterpiece, best quality", ", flat colours", ", high quality")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One thing that a prompt asks for; what it leaves open is None."""

    shape: str
    colour: str | None
    size: str | None


@dataclass(frozen=True, slots=True)
class Request:
    """What a prompt asks for; `relation` stands as in a scene, and things that are several of a kind are repeated."""

    background: str | None
    things: tuple[Wanted, ...]
    relation: str | None


def words(prompt: str) -> list[str]:
    """The words of a prompt after the rules, as the tokenizer sees them."""
    text = prompt.lower()
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text.split()


def read(prompt: str) -> Request:
    """Read what a prompt asks for; unknown words are passed over, and what names no shape asks for none."""
    things: list[Wanted] = []
    background = relation = colour = size = None
    count = 1
    for word in words(prompt):
        if word in COLOURS:
            colour = word
        elif word in SIZES:
            size = word
        elif word in COUNTS:
            count = COUNTS[word]
        elif word in _RELATION_WORDS and relation is None:
            relation = _RELATION_WORDS[word]
        elif word == "background":
            background, colour = colour, None
        elif word in SHAPES:
            things.extend([Wanted(word, colour, size)] * count)
            colour, size, count = None, None, 1
    if len(things) != 2 or things[0] == things[1]:
        relation = None
    return Request(background, tuple(things), relation)


def caption(scene: Scene, rng: np.random.Generator, *, omit: float = 0.0) -> str:
    """Describe a scene in one of many wordings; each colour is left out with the probability `omit`."""
    ground = None if rng.random() < omit else scene.background
    subject = _subject(scene, rng, omit)
    if ground is None:
        text = subject
    else:
        form = rng.random()
        if form < 0.7:
            text = f"{subject} on {_article(ground)} background"
        elif form < 0.85:
            text = f"{subject}, {ground} background"
        else:
            text = f"{_article(ground)} background with {subject}"
    return _pick(rng, _OPENINGS) + text + _pick(rng, _ENDINGS)


def _subject(scene: Scene, rng: np.random.Generator, omit: float) -> str:
    first = scene.things[0]
    if scene.relation is not None:
        relation = _pick(rng, _PHRASES[scene.relation])
        second = scene.things[1]
        return f"{_article(_phrase(first, rng, omit))} {relation} {_article(_phrase(second, rng, omit))}"
    if len(scene.things) == 1:
        return _article(_phrase(first, rng, omit))
    count = next(word for word, number in COUNTS.items() if number == len(scene.things))
    return f"{count} {_phrase(first, rng, omit)}s"


def _phrase(thing: Thing, rng: np.random.Generator, omit: float) -> str:
    size = {"small": ("small", "small", "tiny"), "medium": ("",) * 8 + ("medium",), "large": ("large", "large", "big")}
    colour = "" if rng.random() < omit else thing.colour
    return " ".join(part for part in (_pick(rng, size[thing.size]), colour, thing.shape) if part)


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
