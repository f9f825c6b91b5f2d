"""What a prompt is advised against, before it is drawn.

Advice never refuses anything: the picture is drawn as it was asked for. Pure: one text in, advice out, in an order that is
always the same. A text is looked at up to its first 32,000 characters, and at most twenty things are said of it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from farm.scene import CHARACTER, CHARACTER_ELEMENTS, GENERAL, GENERAL_ELEMENTS, elements_of, marks, plain_text
from farm.yamlfile import did_you_mean, shown

LOOKED_AT = 32_000
"""Characters of a prompt."""
MOST = 20
"""Advice on one prompt."""
READS_XML = "newbie"
"""The family whose models were trained on structured prompts."""
READ_TEXT_ALONE = ("z-image", "qwen-image")
"""Families whose models take a structured prompt for plain words; what others make of it is not known here."""

ADVISED_ATTRIBUTES = 5
MOST_ATTRIBUTES = 8
"""Of one character. Above it details run together, as the model's first users observed; five or fewer came out best."""
POSES = ("standing", "sitting", "jumping", "waving", "leaning_against_wall")
"""Of the element `pose`; the model's first users saw others come out as standing."""

OUTER = ("img", "caption", "danbooru_tags")
"""Elements beside the blocks that the model's users write too: around all, after it, and in negative prompts."""

_STRUCTURED = re.compile(r"<(character_\d|general_tags\b)|\A\s*<([A-Za-z_]\w*)>.*</", re.DOTALL)
_GENDER = re.compile(r"\d{1,3}(girl|boy|other)s?|multiple_(girls|boys|others)|no_humans")
_FALLBACKS = {
    **dict.fromkeys(("girl", "girls", "female", "woman", "lady", "f", "女", "女孩", "女生", "少女", "女性"), "1girl"),
    **dict.fromkeys(("boy", "boys", "male", "man", "m", "男", "男孩", "男生", "少年", "男性"), "1boy"),
    **dict.fromkeys(("other", "others", "neutral", "androgynous", "unknown", "nonbinary"), "1other"),
}
_SPLIT = re.compile(r"[,，、;；]")

_ANY_CASE = (
    "adidas", "balenciaga", "burberry", "fujifilm", "gopro", "gucci", "hasselblad", "kodak", "leica", "louis vuitton",
    "nike", "nikon", "panasonic", "polaroid", "prada", "reebok", "sony", "uniqlo",
    "佳能", "尼康", "索尼", "徕卡", "富士胶片", "哈苏", "耐克", "阿迪达斯", "优衣库",
)  # fmt: skip
_CAPITALISED = ("Canon", "Chanel", "Olympus", "Pentax", "Puma", "Supreme", "Zara")
"""Words too, where they are written small."""
_NAMES = (f"(?i:{'|'.join(name.replace(' ', '[ _]') for name in _ANY_CASE)})", *_CAPITALISED)
_BRAND = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_NAMES)})(?![A-Za-z0-9])")

_WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")
WIDE_PER_TOKEN, NARROW_PER_TOKEN = 1.5, 4.5
"""Characters of one token, in Chinese, Japanese and Korean and in other scripts: on the high side, so that nothing is called too
long that is not."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to know before drawing: a short stable `code`, what a person reads, and where it concerns; may be empty."""

    code: str
    text: str
    where: str = ""


def is_structured(text: str) -> bool:
    """Whether a prompt is XML, or was meant to be."""
    return "<" in text and _STRUCTURED.search(text[:LOOKED_AT]) is not None


def lint_prompt(text: str, *, family: str, max_tokens: int | None = None) -> tuple[Advice, ...]:
    """Return what to know of a prompt before a model of this family draws it; `where` is the element or the line.

    `max_tokens`: of a prompt, as the model's card says; only what is likely above it is said to be.
    """
    return tuple(islice(_advice(text, family, max_tokens), MOST))


@lru_cache(maxsize=1024)
def prompt_codes(text: str, *, family: str, max_tokens: int) -> str | None:
    """Return the codes of the advice on a prompt, each once, with commas between; None where there is none."""
    found = lint_prompt(text, family=family, max_tokens=max_tokens)
    return ",".join(dict.fromkeys(one.code for one in found)) or None


def _advice(text: str, family: str, max_tokens: int | None) -> Iterator[Advice]:
    whole = len(text) <= LOOKED_AT
    looked_at = text[:LOOKED_AT]
    if is_structured(text):
        if family in READ_TEXT_ALONE:
            yield Advice(
                "xml_unread",
                f"a structured prompt, which models of the family {family} take for plain words; say it in sentences",
            )
        elif family == READS_XML:
            yield from _xml_advice(looked_at, whole=whole)
    found_brands = _BRAND.finditer(text[: LOOKED_AT + 1])  # a character more: a word that is cut off is no brand
    brands = dict.fromkeys(found[0] for found in found_brands if found.end() <= LOOKED_AT)
    if brands:
        yield Advice("brand", f"names a brand ({', '.join(brands)}), which tends to be drawn as a logo; take it out")
    if max_tokens is not None and len(text) > max_tokens:
        tokens = _tokens(looked_at) if whole else len(text) / NARROW_PER_TOKEN
        if tokens > max_tokens:
            yield Advice(
                "long_prompt",
                f"is likely longer than the {max_tokens} tokens that the model reads (about {tokens:,.0f}); what stands at its "
                "end is cut off: shorten it",
            )


def _tokens(text: str) -> float:
    wide = len(_WIDE.findall(text))
    return wide / WIDE_PER_TOKEN + (len(text) - wide) / NARROW_PER_TOKEN


@dataclass(slots=True)
class _Opened:
    name: str
    start: int
    end: int
    filled: bool = False


def _xml_advice(text: str, *, whole: bool) -> Iterator[Advice]:
    """Walk through the tags with those that are open in hand; what is well-formed is looked into as it closes."""
    opened: list[_Opened] = []
    names: dict[str, str] = {}
    lines = _Lines(text)
    for mark in marks(text):
        line = f"line {lines.at(mark.start)}"
        if mark.kind == "stray":
            if not whole and not set("<>").intersection(text[mark.end :]):
                return  # perhaps a tag, and cut off here
            yield Advice("stray_bracket", "a `<` begins no tag; write &lt; for the character, or end the tag", line)
            continue
        if mark.kind in ("open", "empty"):
            parent = opened[-1] if opened else None
            yield from _tag_advice(mark.name, parent.name if parent else None, names, line)
            if parent is not None:
                parent.filled = True
            if mark.kind == "open":
                opened.append(_Opened(mark.name, mark.start, mark.end))
            else:
                yield _empty(mark.name, line)
            continue
        if not any(one.name == mark.name for one in reversed(opened)):
            meant = f", perhaps </{opened[-1].name}>" if opened else ""
            yield Advice("wrong_nesting", f"</{mark.name}> closes nothing{meant}; mend it, or take it out", line)
            continue
        while opened[-1].name != mark.name:
            one = opened.pop()
            yield Advice(
                "unclosed_tag",
                f"<{one.name}> is not closed before </{mark.name}>; write </{one.name}> at its end",
                f"line {lines.at(one.start)}",
            )
        one = opened.pop()
        parent_name = opened[-1].name if opened else ""
        value = plain_text(text[one.end : mark.start])
        if not one.filled and not value:
            yield _empty(one.name, f"{parent_name}.{one.name}" if parent_name else line)
        elif not one.filled and opened:
            yield from _value_advice(parent_name, one.name, value, names)
    if whole:
        for one in opened:
            yield Advice(
                "unclosed_tag", f"<{one.name}> is never closed; write </{one.name}>", f"line {lines.at(one.start)}"
            )


class _Lines:
    """Lines of places that come in order, or nearly so."""

    def __init__(self, text: str):
        self._text = text
        self._place = 0
        self._line = 1

    def at(self, place: int) -> int:
        """Return the line of a place, from 1."""
        if place < self._place:
            return self._line - self._text.count("\n", place, self._place)
        self._line += self._text.count("\n", self._place, place)
        self._place = place
        return self._line


def _empty(name: str, where: str) -> Advice:
    return Advice("empty_element", f"<{name}> says nothing; fill it, or leave it out", where)


def _tag_advice(name: str, parent: str | None, names: dict[str, str], line: str) -> Iterator[Advice]:
    """Whether an element may stand there, and stands there once."""
    if parent is None or parent == OUTER[0]:
        if name in OUTER:
            return
        if CHARACTER.fullmatch(name) or name == GENERAL:
            if names.setdefault(f"<{name}>", line) != line:
                code = "duplicate_tag" if name == GENERAL else "duplicate_character"
                yield Advice(
                    code, f"<{name}> stands on {names[f'<{name}>']} already; number it anew, or join them", line
                )
            return
        if name in CHARACTER_ELEMENTS or name in GENERAL_ELEMENTS:
            home = "<character_N>" if name in CHARACTER_ELEMENTS else f"<{GENERAL}>"
            yield Advice("misplaced_tag", f"<{name}> stands outside of {home}; put it in there", line)
        else:
            near = did_you_mean(name, ["character_1", GENERAL]) or f"; outermost are <character_N> and <{GENERAL}>"
            yield Advice("unknown_tag", f"<{name}> is no element that the model knows{near}", line)
        return
    if not (CHARACTER.fullmatch(parent) or parent == GENERAL):
        if parent in CHARACTER_ELEMENTS or parent in GENERAL_ELEMENTS:
            yield Advice("wrong_nesting", f"<{name}> stands inside of <{parent}>, which holds tags alone", line)
        return
    known = elements_of(parent)
    if name in known:
        if names.setdefault(f"<{parent}><{name}>", line) != line:
            yield Advice(
                "duplicate_tag",
                f"<{name}> stands in <{parent}> on {names[f'<{parent}><{name}>']} already; join them",
                line,
            )
    elif name in CHARACTER_ELEMENTS or name in GENERAL_ELEMENTS:
        home = "<character_N>" if name in CHARACTER_ELEMENTS else f"<{GENERAL}>"
        yield Advice("misplaced_tag", f"<{name}> is no element of <{parent}> but of {home}; put it in there", line)
    elif CHARACTER.fullmatch(name) or name == GENERAL:
        yield Advice("wrong_nesting", f"<{name}> begins inside of <{parent}>; close that first", line)
    else:
        near = did_you_mean(name, list(known)) or f"; known here: {', '.join(known)}"
        yield Advice("unknown_tag", f"<{name}> is no element of <{parent}>{near}", line)


def _value_advice(block: str, element: str, value: str, names: dict[str, str]) -> Iterator[Advice]:
    """What is advised against in the tags of one element of a character."""
    if not CHARACTER.fullmatch(block):
        return
    where = f"{block}.{element}"
    tags = [tag for tag in (one.strip() for one in _SPLIT.split(value)) if tag]
    match element:
        case "n":
            first = names.setdefault(f"n {value.casefold()}", block)
            if first != block:
                yield Advice(
                    "duplicate_character", f"{block} has the name of {first}, {shown(value)}; name one otherwise", where
                )
        case "gender":
            words = [tag.lower().replace(" ", "_") for tag in tags]
            if words and not any(_GENDER.fullmatch(word) for word in words):
                fallback = next((_FALLBACKS[word] for word in words if word in _FALLBACKS), None)
                ends = f" and falls back to {fallback}; write that" if fallback else "; write 1girl, 1boy or 1other"
                yield Advice("unknown_gender", f"{shown(value)} is no gender that the model knows{ends}", where)
        case "pose":
            for tag in tags:
                if tag.lower().replace(" ", "_") not in POSES:
                    yield Advice(
                        "unknown_pose",
                        f"{shown(tag)} is no pose that the model knows and falls back to standing; write one of "
                        f"{', '.join(POSES)}, or say it in <action>",
                        where,
                    )
        case "appearance" if len(tags) > MOST_ATTRIBUTES:
            yield Advice(
                "too_many_attributes",
                f"{len(tags)} attributes; above {MOST_ATTRIBUTES} details run together: keep {ADVISED_ATTRIBUTES} or fewer",
                where,
            )
        case "appearance" if len(tags) > ADVISED_ATTRIBUTES:
            yield Advice(
                "many_attributes", f"{len(tags)} attributes; {ADVISED_ATTRIBUTES} or fewer come out more surely", where
            )
