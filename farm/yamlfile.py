"""Read YAML or JSON into plain data that remembers its lines, and validate it into a record with readable errors.

YAML 1.2 core: `yes` and `on` are text. Only mappings, lists, texts, numbers, booleans and null come out; tags, merge
keys, doubled keys, NaN and infinity are refused. Anchors work, within a limit of expanded nodes. Every error names
file and line, the key, the value, and what to do next. JSON is held to the same rules; its lines are not known.
"""

import difflib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from farm.errors import InputError

MAX_BYTES = 8 * 2**20
MAX_NODES = 300_000
MAX_DEPTH = 50

_SURROGATE = re.compile("[\ud800-\udfff]")
# The parser's time grows with the square of the depth, so a wall of brackets must not reach it.
_DEEP = re.compile(r"(?:[\[{]\s*){200}")

Loc = tuple[str | int, ...]
Record = TypeVar("Record", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Document:
    """A file's plain data, and the line (from 1) of every key and list item in it; JSON's are not known."""

    path: str
    data: dict[str, Any]
    lines: dict[Loc, int]

    def where(self, loc: Loc) -> str:
        """Return `path:line` of the place, or of the nearest place around it that is written down; `path` without lines."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return f"{self.path}:{self.lines[loc]}" if loc in self.lines else self.path


def read_yaml(path: str | Path, error: type[InputError], *, what: str, pipes: bool = True) -> Document:
    """Read one YAML mapping. Raises `error`; `what` is the file's kind in its messages. `pipes`: it may be one."""
    return parse_yaml(_read_file(Path(path), error, what, pipes=pipes), str(path), error, what=what)


def parse_yaml(data: bytes, shown: str, error: type[InputError], *, what: str) -> Document:
    """Parse the bytes of one YAML mapping; `shown` names them in messages. Raises `error`."""
    text = _decoded(data, shown, error, what)
    if _DEEP.search(text):
        raise error(f"{shown}: nested too deep; a {what} needs a few levels only")
    try:
        yaml = YAML(typ="safe", pure=True)
        node = yaml.compose(text)
    except MarkedYAMLError as exc:
        raise error(_syntax_message(shown, text, exc)) from exc
    except YAMLError as exc:
        raise error(f"{shown}: not YAML: {_one_line(exc)}; mend the file") from exc
    except RecursionError as exc:
        raise error(f"{shown}: nested too deep; a {what} needs a few levels only") from exc
    if node is None:
        raise error(f"{shown}: the file is empty; write a {what} into it")
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else "a single value"
        raise error(
            f"{shown}:{_line(node)}: a {what} is a mapping of keys to values, got {kind}; write `key: value` lines"
        )
    builder = _Builder(shown, error, yaml)
    builder.check_size(node)
    return Document(path=shown, data=builder.build(node, (), 0), lines=builder.lines)


def parse_json(data: bytes, shown: str, error: type[InputError], *, what: str) -> Document:
    """Parse the bytes of one JSON object; `shown` names them in messages. Raises `error`."""
    found = load_json(_decoded(data, shown, error, what), shown, error, what=what)
    if not isinstance(found, dict):
        kind = "a list" if isinstance(found, list) else "a single value"
        raise error(f"{shown}: a {what} is an object of keys and values, got {kind}; write {{...}}")
    fault = _plain_fault(found)
    if fault is not None:
        raise error(f"{shown}: {fault}")
    return Document(path=shown, data=found, lines={})


def load_json(text: str, shown: str, error: type[InputError], *, what: str) -> Any:
    """Parse JSON text of any kind; a key that stands twice, NaN and infinity are refused. Raises `error`."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            doubled = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{shown}: the key {doubled!r:.60} stands twice in one object; keep one of them")
        return found

    def refuse(name: str) -> Any:
        raise error(f"{shown}: {name} is no JSON number; write a finite one")

    try:
        return json.loads(text, object_pairs_hook=fields, parse_constant=refuse)
    except json.JSONDecodeError as exc:
        raise error(f"{shown}:{exc.lineno}: not JSON: {exc.msg} in column {exc.colno}; mend it there") from exc
    except RecursionError as exc:
        raise error(f"{shown}: nested too deep; a {what} needs a few levels only") from exc
    except ValueError as exc:
        most = sys.get_int_max_str_digits()
        raise error(f"{shown}: a whole number has more than {most} digits; write a smaller one") from exc


def validate(
    document: Document,
    model: type[Record],
    error: type[InputError],
    *,
    other_names: Mapping[str, str] | None = None,
    field_lists: Mapping[str, Sequence[str]] | None = None,
) -> Record:
    """Turn a document into a record, strictly: "20" is no number and 1 no boolean. Raises `error` for the first fault.

    `other_names`: what other tools call a thing -> the advice to print. `field_lists`: dotted place -> its keys.
    """
    try:
        return model.model_validate_json(json.dumps(document.data, allow_nan=False), strict=True)
    except ValidationError as exc:
        faults = exc.errors(include_url=False)
        places = [_place(document, fault) for fault in faults]
        # A misspelt key is two faults, one unknown and one missing; a bad item of a list also leaves it too short.
        first = min(
            range(len(faults)),
            key=lambda i: (faults[i]["type"] in ("missing", "too_short"), document.lines.get(places[i], 0)),
        )
        text = _fault_message(document, faults[first], places[first], other_names or {}, field_lists or {})
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise error(f"{document.where(places[first])}: {text}{more}") from exc


def shown(value: Any) -> str:
    """Return a value as it stands in a message: short, on one line."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: str, names: Sequence[str]) -> str:
    """Return `; did you mean X?` for the nearest name, or nothing."""
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _read_file(path: Path, error: type[InputError], what: str, *, pipes: bool) -> bytes:
    try:
        if path.is_dir():
            raise error(f"{path}: this is a folder, not a {what}; name the file in it")
        if not pipes and path.exists() and not path.is_file():
            raise error(f"{path}: is no regular file; name one")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as exc:
        raise error(f"{path}: no such file; check the path") from exc
    except OSError as exc:
        raise error(f"{path}: cannot be read: {exc.strerror}; check its permissions") from exc


def _decoded(data: bytes, shown: str, error: type[InputError], what: str) -> str:
    if len(data) > MAX_BYTES:
        raise error(f"{shown}: larger than {MAX_BYTES // 2**20} MiB; keep long lists in files of their own")
    if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise error(f"{shown}: binary data, not a {what}; name a YAML file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        raise error(f"{shown}:{line}: not UTF-8 (byte 0x{data[exc.start]:02x}); save the file as UTF-8") from exc


def _plain_fault(value: Any) -> str | None:
    """What is wrong with JSON data by the rules above, or None."""
    waiting, nodes = [(value, 0)], 0
    while waiting:
        one, depth = waiting.pop()
        nodes += 1
        if nodes > MAX_NODES:
            return f"more than {MAX_NODES} values; write less, or use files"
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels; write it flat"
        if isinstance(one, str) and _SURROGATE.search(one):
            return "a text has half of a surrogate pair; write the character itself"
        if isinstance(one, float) and not math.isfinite(one):
            return "a number is too large to be one; write a finite one"
        if isinstance(one, dict):
            waiting += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list):
            waiting += [(part, depth + 1) for part in one]
    return None


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())


def _syntax_message(path: str, text: str, exc: MarkedYAMLError) -> str:
    mark = exc.problem_mark or exc.context_mark
    line = mark.line + 1 if mark else 1
    problem = " ".join((exc.problem or str(exc)).split())
    lines = text.splitlines()
    source = lines[line - 1] if line <= len(lines) else ""
    if "\t" in source[: len(source) - len(source.lstrip())] or "'\\t'" in problem:
        return f"{path}:{line}: a tab where YAML wants blanks; indent with blanks"
    if "another document" in problem or "single document" in (exc.context or ""):
        return f"{path}:{line}: a second document starts here; keep one to a file"
    hint = "check quotes, colons and indentation there"
    if "{" in source and "}" in source:
        hint = "a text with { } or : in it needs quotes around it"
    return f"{path}:{line}: not YAML: {problem}; {hint}"


def _parts(node: Node) -> list[Node]:
    """The nodes of which a node is built; keys are no values."""
    if isinstance(node, MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


class _Builder:
    """Turns composed nodes into plain data and notes their lines."""

    def __init__(self, path: str, error: type[InputError], yaml: YAML):
        self.lines: dict[Loc, int] = {(): 1}
        self._path = path
        self._error = error
        self._constructor = yaml.constructor

    def check_size(self, root: Node) -> None:
        """Refuse what its anchors would make too large, by counting each node once: building it would take seconds."""
        sizes: dict[int, int | None] = {}
        waiting = [root]
        while waiting:
            node, parts = waiting[-1], _parts(waiting[-1])
            if id(node) not in sizes:
                sizes[id(node)] = None  # until its parts are counted
                if any(sizes.get(id(part), 0) is None for part in parts):
                    self._fail(node, f"nested deeper than {MAX_DEPTH} levels; anchors must not contain themselves")
                waiting += [part for part in parts if id(part) not in sizes]
                continue
            waiting.pop()
            size = sizes[id(node)] = 1 + sum(sizes[id(part)] or 0 for part in parts)
            if size > MAX_NODES:
                self._fail(
                    node, f"more than {MAX_NODES} values once its anchors are expanded; write less, or use files"
                )

    def build(self, node: Node, loc: Loc, depth: int) -> Any:
        if depth > MAX_DEPTH:
            self._fail(node, f"nested deeper than {MAX_DEPTH} levels; write it flat")
        kind = str(node.tag).rpartition(":")[2]
        if isinstance(node, MappingNode | SequenceNode) and kind not in ("map", "seq"):
            self._fail(node, f"the tag {node.tag} is not supported; take it out")
        if isinstance(node, MappingNode):
            return self._mapping(node, loc, depth)
        if isinstance(node, SequenceNode):
            items = []
            for at, item in enumerate(node.value):
                self.lines.setdefault((*loc, at), _line(item))
                items.append(self.build(item, (*loc, at), depth + 1))
            return items
        return self._scalar(node, loc)

    def _mapping(self, node: MappingNode, loc: Loc, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._fail(key_node, "a key must be text; put quotes around a text that has { or [ in it")
            key = str(key_node.value)
            if key_node.tag.endswith(":merge") or key == "<<":
                self._fail(key_node, "`<<` is not supported; write the keys out")
            if not key_node.tag.endswith(":str"):
                self._fail(key_node, f"a key must be text, got {key}; put quotes around it")
            if key in result:
                first = self.lines[(*loc, key)]
                self._fail(key_node, f"`{key}` stands here and on line {first}; keep one of them")
            self.lines.setdefault((*loc, key), _line(key_node))
            result[key] = self.build(value_node, (*loc, key), depth + 1)
        return result

    def _scalar(self, node: Node, loc: Loc) -> Any:
        kind = str(node.tag).rpartition(":")[2]
        if kind in ("str", "timestamp"):
            if _SURROGATE.search(node.value):
                self._fail(node, "a text has half of a surrogate pair; write the character itself")
            return str(node.value)
        if kind not in ("int", "float", "bool", "null"):
            self._fail(node, f"the tag {node.tag} is not supported; take it out")
        try:
            value = self._constructor.construct_object(node)
        except (ValueError, YAMLError) as exc:
            self._fail(node, f"{shown(node.value)} is no {kind}: {_one_line(exc)}; put quotes around a text")
        if isinstance(value, float) and not math.isfinite(value):
            name = ".".join(str(part) for part in loc)
            self._fail(node, f"{name}: must be a finite number, got {node.value}; write a number")
        return (
            float(value) if isinstance(value, float) else int(value) if type(value) not in (bool, type(None)) else value
        )

    def _fail(self, node: Node, text: str) -> Any:
        raise self._error(f"{self._path}:{_line(node)}: {text}")


def _place(document: Document, fault: ErrorDetails) -> Loc:
    """Return where in the document a fault lies; what pydantic adds to name a branch of a union is left out."""
    loc: Loc = ()
    data: Any = document.data
    raw = (*fault["loc"], *fault.get("ctx", {}).get("at", ()))
    for number, part in enumerate(raw):
        if (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            data = data[part]
            loc = (*loc, part)
        elif fault["type"] == "missing" and number == len(raw) - 1:
            loc = (*loc, part)
    return loc


_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of a sane size",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
}


def _fault_message(
    document: Document,
    fault: ErrorDetails,
    loc: Loc,
    other_names: Mapping[str, str],
    field_lists: Mapping[str, Sequence[str]],
) -> str:
    name = ".".join(str(part) for part in loc) or "the file"
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "extra_forbidden" or fault["loc"][-1:] == ("[key]",):
        place = ".".join(str(part) for part in loc[:-1] if isinstance(part, str))
        return _unknown_key(loc, other_names, field_lists.get(place, ()))
    if kind == "missing":
        return f"`{name}` is missing; add it"
    got = f", got {shown(fault['input'])}"
    if kind in _WORDS:
        return f"{name}: {_WORDS[kind]}{got}; {_next_step(kind, fault['input'])}"
    bounds = {"greater_than": ("gt", "above"), "greater_than_equal": ("ge", "at least"), "less_than": ("lt", "below")}
    bounds["less_than_equal"] = ("le", "at most")
    if kind in bounds:
        key, word = bounds[kind]
        return f"{name}: must be {word} {context[key]}{got}; change it"
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        near = did_you_mean(str(fault["input"]), allowed)
        return f"{name}: must be one of {', '.join(allowed)}{got}{near or '; choose one of them'}"
    if kind in ("too_short", "string_too_short"):
        return f"{name}: must not be empty; give it at least {context.get('min_length', 1)}, or leave the key out"
    if kind == "farm":
        return f"{name}: {fault['msg']}"
    return f"{name}: {fault['msg']}{got}; change it"


def _unknown_key(loc: Loc, other_names: Mapping[str, str], known: Sequence[str]) -> str:
    key, place = str(loc[-1]), ".".join(str(part) for part in loc[:-1])
    at = f" in {place}" if place else ""
    word = key.lower().replace("-", "_").replace(" ", "_")
    if word in known:
        return f"unknown key `{key}`{at}; did you mean {word}?"
    if word in other_names:
        return f"unknown key `{key}`{at}; {other_names[word]}"
    near = did_you_mean(word, list(known))
    return f"unknown key `{key}`{at}{near or ('; known here: ' + ', '.join(known) if known else '; take it out')}"


def _next_step(kind: str, value: Any) -> str:
    if isinstance(value, str):
        if kind.startswith(("int", "float")):
            try:
                float(value)
            except ValueError:
                return "write a number"
            return "take the quotes away"
        if kind == "bool_type":
            return "write true or false, without quotes"
    if kind == "string_type" and isinstance(value, int | float):
        return "put quotes around it"
    if value is None:
        return "give it a value, or leave the key out"
    return {"list_type": "write [a, b, c]", "tuple_type": "write [a, b, c]"}.get(kind, "change it")
