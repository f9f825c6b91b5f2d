"""Sweep points and templates: many prompts from a few lists, each reached by arithmetic.

A template has `{name}` variables, whose values stand in lists, and `{a|b|c}` choices, which are drawn; `{{` and `}}`
are literal braces. Row `i` of a template is computed from `i` alone: nothing of the size of the job is built. Equal
template, lists and root give equal rows on every machine.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from farm.errors import ManifestError
from farm.modelcard import ParamOverrides

MAX_POINTS = 10_000
MAX_VALUES = 100_000


class Template(BaseModel):
    """A template with its values read in: all that its rows follow from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    vary: dict[str, tuple[str, ...]] = {}
    combine: Literal["product", "zip"] = "product"
    draw: int | None = Field(default=None, gt=0, description="rows drawn at random; all combinations where empty")
    root: int = Field(default=0, ge=0, description="decides draws and choices")


def sweep_points(sweep: Mapping[str, Sequence[Any]]) -> tuple[ParamOverrides, ...]:
    """Return every combination of a manifest's sweep lists, the last list fastest; one empty point without lists."""
    count = math.prod(len(values) for values in sweep.values())
    if count > MAX_POINTS:
        raise ManifestError(f"sweep: {count} points, at most {MAX_POINTS} are allowed; shorten a list")
    return tuple(
        ParamOverrides.model_validate(dict(zip(sweep, values, strict=True)))
        for values in itertools.product(*sweep.values())
    )


class TemplatePrompts:
    """The rows of a template. Raises ManifestError when template and values do not go together.

    Product: the last variable in `vary` is fastest. Zip: row `i` takes the `i`-th value of each. Draw: row `i` takes
    for each variable a value picked by a hash of root, `i` and the variable's name, so a value may come again. A choice
    is picked by a hash of root, row and its place among the template's choices.
    """

    def __init__(self, template: Template):
        self._template = template
        self._pieces = parse_template(template.text)
        names = [piece for kind, piece in self._pieces if kind == "variable"]
        _check_variables(names, template.vary)
        lengths = {name: len(values) for name, values in template.vary.items()}
        if template.combine == "zip" and len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ManifestError(
                f"prompts.vary: combine: zip needs lists of one length, got {found}; even them out, "
                "or use combine: product"
            )
        self.combinations = (
            min(lengths.values(), default=1) if template.combine == "zip" else math.prod(lengths.values())
        )
        self._rows = self.combinations if template.draw is None else template.draw

    def __len__(self) -> int:
        return self._rows

    @property
    def rows(self) -> int:
        """How many prompts there are; unlike len() not bounded by the machine's word."""
        return self._rows

    def __iter__(self) -> Iterator[str]:
        return map(self.row, range(self._rows))

    def row(self, index: int) -> str:
        """Return prompt `index`. Raises IndexError when there is none."""
        if not 0 <= index < self._rows:
            raise IndexError(f"the template has prompts 0 to {self._rows - 1}, not {index}")
        values = self._values(index)
        text: list[str] = []
        for place, (kind, piece) in enumerate(self._pieces):
            if kind == "text":
                text.append(piece)
            elif kind == "variable":
                text.append(values[piece])
            else:
                options = piece.split("|")
                text.append(options[_pick(self._template.root, index, f"|{place}", len(options))])
        return "".join(text)

    def _values(self, index: int) -> dict[str, str]:
        vary = self._template.vary
        if self._template.draw is not None:
            if self._template.combine == "zip":
                if not vary:
                    return {}
                at = _pick(self._template.root, index, "", self.combinations)
                return {name: values[at] for name, values in vary.items()}
            root = self._template.root
            return {name: values[_pick(root, index, name, len(values))] for name, values in vary.items()}
        if self._template.combine == "zip":
            return {name: values[index] for name, values in vary.items()}
        chosen: dict[str, str] = {}
        for name in reversed(vary):
            index, at = divmod(index, len(vary[name]))
            chosen[name] = vary[name][at]
        return chosen


def parse_template(text: str) -> list[tuple[Literal["text", "variable", "choice"], str]]:
    """Cut a template into literal text, variable names and choices (`a|b|c`). Raises ManifestError at a stray brace."""
    pieces: list[tuple[Literal["text", "variable", "choice"], str]] = []
    literal: list[str] = []
    at = 0
    while at < len(text):
        char = text[at]
        if text[at : at + 2] in ("{{", "}}"):
            literal.append(char)
            at += 2
        elif char == "{":
            end = text.find("}", at)
            inner = text[at + 1 : end]
            if end < 0 or "{" in inner:
                raise ManifestError(
                    f"prompts.template: `{{` at character {at + 1} is never closed; write `{{{{` for a brace"
                )
            if literal:
                pieces.append(("text", "".join(literal)))
                literal = []
            pieces.append(_placeholder(inner, at))
            at = end + 1
        elif char == "}":
            raise ManifestError(
                f"prompts.template: `}}` at character {at + 1} closes nothing; write `}}}}` for a brace"
            )
        else:
            literal.append(char)
            at += 1
    if literal:
        pieces.append(("text", "".join(literal)))
    return pieces


def _placeholder(inner: str, at: int) -> tuple[Literal["variable", "choice"], str]:
    if "|" in inner:
        return "choice", inner
    name = inner.strip()
    if not name.isidentifier():
        raise ManifestError(
            f"prompts.template: {{{inner}}} at character {at + 1} is neither a variable's name nor a choice {{a|b}}; "
            "a name has letters, digits and _; write {{ and }} for braces"
        )
    return "variable", name


def _check_variables(names: Sequence[str], vary: Mapping[str, Sequence[str]]) -> None:
    for name in names:
        if name not in vary:
            known = ", ".join(vary) or "none"
            raise ManifestError(
                f"prompts.template: variable {{{name}}} has no values; add {name}: [...] to prompts.vary "
                f"(which has: {known})"
            )
    for name, values in vary.items():
        if name not in names:
            raise ManifestError(
                f"prompts.vary: {name} is not used in the template; write {{{name}}} there, or take it out"
            )
        if not values:
            raise ManifestError(f"prompts.vary: {name} is an empty list; give it at least one value")
        if len(values) > MAX_VALUES:
            raise ManifestError(
                f"prompts.vary: {name} has {len(values)} values, at most {MAX_VALUES} are allowed; "
                "write the prompts to a file and use prompts.file"
            )


def _pick(root: int, row: int, what: str, count: int) -> int:
    digest = hashlib.blake2b(f"{root}\0{row}\0{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") * count >> 64
