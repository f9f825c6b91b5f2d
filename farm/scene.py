"""NewBie's structured prompts: characters and general tags, as the XML that the model reads.

A value is a line of tags, `blue_hair, long_twintails`, in any script. In the XML `&`, `<` and `>` are escaped as ever, and
parentheses by a backslash, which is how the model's tags are written. Knows no files and no model. Whatever a scene holds,
reading what it is built into gives the same scene.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from farm.errors import PromptError

GENERAL = "general_tags"
CHARACTER = re.compile(r"character_(\d{1,9})")

_MARK = re.compile(r"<(/?)([^<>]*)(>?)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]*")
_ESCAPED_PARENTHESIS = re.compile(r"(?<!\\)\\+([()])")
_PARENTHESIS = re.compile(r"[()]")
_ENTITIES = {"lt": "<", "gt": ">", "quot": '"', "apos": "'", "amp": "&"}
_ENTITY = re.compile(r"&(lt|gt|quot|apos|amp);")


class _Tagged:
    """A block of elements, each a line of tags; an empty one is left out of the XML."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            object.__setattr__(self, name, _ESCAPED_PARENTHESIS.sub(r"\1", value).strip())

    def given(self) -> dict[str, str]:
        """Return the elements that say something, in the order in which they are written."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, slots=True)
class Character(_Tagged):
    """One person of a scene. `n`: the name; `gender`: such as 1girl."""

    n: str = ""
    gender: str = ""
    appearance: str = ""
    clothing: str = ""
    body_type: str = ""
    expression: str = ""
    action: str = ""
    pose: str = ""
    interaction: str = ""
    position: str = ""


@dataclass(frozen=True, slots=True)
class GeneralTags(_Tagged):
    """What a scene has besides its characters."""

    count: str = ""
    style: str = ""
    background: str = ""
    atmosphere: str = ""
    quality: str = ""
    objects: str = ""
    other: str = ""
    artist: str = ""
    artists: str = ""
    lighting: str = ""
    resolution: str = ""
    environment: str = ""
    perspective: str = ""
    interaction: str = ""
    caption: str = ""


CHARACTER_ELEMENTS: tuple[str, ...] = tuple(field.name for field in fields(Character))
GENERAL_ELEMENTS: tuple[str, ...] = tuple(field.name for field in fields(GeneralTags))


@dataclass(frozen=True, slots=True)
class Scene:
    """A structured prompt."""

    characters: tuple[Character, ...] = ()
    general_tags: GeneralTags = GeneralTags()

    def xml(self) -> str:
        """Return the prompt: a block for each character, numbered from 1, then the general tags where there are some."""
        blocks = [_block(f"character_{number}", one) for number, one in enumerate(self.characters, 1)]
        if self.general_tags.given():
            blocks.append(_block(GENERAL, self.general_tags))
        return "\n\n".join(blocks)


def tag_line(tags: str | Sequence[str]) -> str:
    """Return tags as one line; a text is taken as it is."""
    return tags if isinstance(tags, str) else ", ".join(tags)


def read_scene(text: str) -> Scene:
    """Read a prompt's XML. Characters come in the order of their numbers. Raises PromptError, which names the line."""
    blocks: list[tuple[str, dict[str, str]]] = []
    block: str | None = None
    element: Mark | None = None
    done = 0  # what lies before has been read
    for mark in marks(text):
        between = text[done : mark.start]
        if element is None and between.strip():
            raise _fault(text, done, f"{between.strip()[:40]!r} stands outside of the elements; put it into one")
        done = mark.end
        if mark.kind == "stray":
            raise _fault(text, mark.start, "a `<` begins no tag; write &lt; for the character")
        if block is None:
            if mark.name != GENERAL and not CHARACTER.fullmatch(mark.name):
                raise _fault(text, mark.start, f"<{mark.name}> is neither <character_N> nor <{GENERAL}>; take it out")
            if any(mark.name == name for name, _ in blocks) or mark.kind == "close":
                raise _fault(text, mark.start, f"<{mark.name}> does not begin here; open it once, and close it")
            blocks.append((mark.name, {}))
            block = mark.name if mark.kind == "open" else None
        elif element is None:
            if mark.kind == "close":
                if mark.name != block:
                    raise _fault(text, mark.start, f"</{mark.name}> stands where </{block}> should; mend it")
                block = None
                continue
            if mark.name not in elements_of(block) or mark.name in blocks[-1][1]:
                twice = "stands twice" if mark.name in blocks[-1][1] else "is no element"
                raise _fault(text, mark.start, f"<{mark.name}> {twice} in <{block}>; take it out")
            blocks[-1][1][mark.name] = ""
            element = mark if mark.kind == "open" else None
        else:
            if mark.kind != "close" or mark.name != element.name:
                raise _fault(text, element.start, f"<{element.name}> is not closed; write </{element.name}> after it")
            blocks[-1][1][element.name] = plain_text(between)
            element = None
    opened = element.name if element is not None else block
    if opened is not None:
        raise _fault(text, len(text), f"<{opened}> is not closed; write </{opened}> after it")
    if text[done:].strip():
        raise _fault(text, done, f"{text[done:].strip()[:40]!r} stands outside of the elements; put it into one")
    numbered = {int(name.rpartition("_")[2]): values for name, values in blocks if name != GENERAL}
    return Scene(
        characters=tuple(Character(**numbered[number]) for number in sorted(numbered)),
        general_tags=next((GeneralTags(**values) for name, values in blocks if name == GENERAL), GeneralTags()),
    )


@dataclass(frozen=True, slots=True)
class Mark:
    """Something in angle brackets, at `text[start:end]`. `empty`: `<name/>`; `stray`: a `<` that begins no tag."""

    kind: Literal["open", "close", "empty", "stray"]
    name: str
    start: int
    end: int


def marks(text: str) -> Iterator[Mark]:
    """Yield what stands in angle brackets, in order; time grows with the text alone."""
    for found in _MARK.finditer(text):
        slash, inside, ended = found.groups()
        name = _NAME.match(inside.lstrip())
        if name is None or not ended:
            yield Mark("stray", "", found.start(), found.start() + 1)
            continue
        kind: Literal["open", "close", "empty"] = (
            "close" if slash else "empty" if inside.rstrip().endswith("/") else "open"
        )
        yield Mark(kind, name[0], found.start(), found.end())


def elements_of(block: str) -> tuple[str, ...]:
    """Return the elements that a block may have: of <general_tags>, or of a character."""
    return GENERAL_ELEMENTS if block == GENERAL else CHARACTER_ELEMENTS


def plain_text(escaped: str) -> str:
    """Return a value as it was before it was escaped for the XML."""
    text = _ENTITY.sub(lambda found: _ENTITIES[found[1]], escaped)
    return _ESCAPED_PARENTHESIS.sub(r"\1", text).strip()


def _block(name: str, tagged: _Tagged) -> str:
    lines = [f"<{element}>{_escaped(value)}</{element}>" for element, value in tagged.given().items()]
    return "\n".join((f"<{name}>", *lines, f"</{name}>"))


def _escaped(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _PARENTHESIS.sub(r"\\\g<0>", text)


def _fault(text: str, at: int, said: str) -> PromptError:
    return PromptError(f"line {text.count(chr(10), 0, at) + 1} of the scene: {said}")
