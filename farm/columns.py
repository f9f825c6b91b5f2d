"""From columns as a prompt file has them to the columns of a prompt table, checked.

A prompt table has `prompt` (text), `key` (text, where there are keys), `override.NAME` for each per-row parameter (null
where the row sets none) and `carry.NAME` for each carried column. Every fault is a PromptError that names file and row.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from farm.errors import ManifestError, PromptError
from farm.manifest import PromptFile
from farm.modelcard import ModelCard, RenderParams, negative_of, param_fault
from farm.receipt import ImageRow
from farm.sources import LINE_COLUMN, Chunk
from farm.yamlfile import shown

Kind = Literal["text", "int", "float", "carried"]

OVERRIDE = "override."
CARRY = "carry."
_NEGATIVE = f"{OVERRIDE}negative_prompt"
_RECEIPT_COLUMNS = frozenset(field.name for field in dataclasses.fields(ImageRow))
_PARAM_KINDS: dict[str, Kind] = {
    "negative_prompt": "text",
    "width": "int",
    "height": "int",
    "num_inference_steps": "int",
    "guidance_scale": "float",
}
_KIND_WORDS = {"text": "text", "int": "a whole number", "float": "a number", "carried": "text, a number or true/false"}
_NUMBER = re.compile(r"[-+0-9.eE]+")
_ARROW_TYPES = {"text": pa.string(), "int": pa.int64(), "float": pa.float64()}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a prompt table: its name there, the source's column, its kind, and whether a row may lack it."""

    name: str
    source: str
    kind: Kind
    optional: bool


def table_columns(prompts: PromptFile, suffix: str) -> list[Column]:
    """Return the columns that a file source gives. Raises PromptError where names clash."""
    if suffix == ".txt":
        for name, value in (("column", prompts.column), ("key", prompts.key)):
            if value is not None:
                raise PromptError(
                    f"prompts.{name}: {shown(value)}: a .txt file has no columns; leave it out, or use a .csv"
                )
        if prompts.per_row or prompts.carry:
            raise PromptError("prompts: a .txt file has no columns to carry or to override from; use a .csv")
        return [Column("prompt", LINE_COLUMN, "text", optional=False)]
    columns = [Column("prompt", prompts.column or "prompt", "text", optional=False)]
    if prompts.key is not None:
        columns.append(Column("key", prompts.key, "carried", optional=False))
    for param, source in prompts.per_row.items():
        columns.append(Column(OVERRIDE + param, source, _PARAM_KINDS[param], optional=True))
    for source in prompts.carry:
        if source in _RECEIPT_COLUMNS:
            raise PromptError(
                f"prompts.carry: {shown(source)} is a column of every receipt already; rename yours, or leave it out"
            )
        columns.append(Column(CARRY + source, source, "carried", optional=True))
    return columns


class Normaliser:
    """Turns chunks into tables, each column of one type over the whole source, and checks every value."""

    def __init__(self, columns: Sequence[Column], *, card: ModelCard, params: Sequence[RenderParams]):
        """`params`: those of every sweep point, against which a row's own are checked."""
        self.columns = columns
        self._card = card
        self._params = params
        self._carried: dict[str, pa.DataType] = {}
        self._sound: set[tuple[Any, ...]] = set()

    def table(self, chunk: Chunk) -> pa.Table:
        arrays = {column.name: self._array(column, chunk) for column in self.columns}
        _refuse_blank(arrays["prompt"], chunk, "prompt", "write one, or take the row out")
        if "key" in arrays:
            _refuse_blank(arrays["key"], chunk, "key", "give every row a key of its own")
        overrides = [column for column in self.columns if column.name.startswith(OVERRIDE)]
        if overrides:
            self._check_overrides(overrides, arrays, chunk)
        return pa.table(arrays)

    def _array(self, column: Column, chunk: Chunk) -> pa.Array:
        values = chunk.columns[column.source]
        array = _from_values(values, column, chunk) if isinstance(values, list) else _from_arrow(values, column, chunk)
        if column.name == "key":
            array = array if pa.types.is_string(array.type) else _key_texts(array, column, chunk)
        elif column.kind == "carried":
            array = self._carried_as_before(array, column, chunk)
        elif column.name == _NEGATIVE:
            array = self._negatives(array, chunk)
        if array.null_count and not column.optional:
            row = int(np.flatnonzero(np.asarray(pc.is_null(array)))[0])
            raise PromptError(f"{chunk.where(row)}: `{column.source}` has no value; every row needs one")
        return array

    def _negatives(self, array: pa.Array, chunk: Chunk) -> pa.Array:
        """Put the card's negative prompts where rows name one."""
        if not pc.any(pc.starts_with(array, "@")).as_py():
            return array
        values = array.to_pylist()
        for row, text in enumerate(values):
            try:
                values[row] = text if text is None else negative_of(self._card, text)
            except ManifestError as exc:
                raise PromptError(f"{chunk.where(row)}: {exc.message}") from exc
        return pa.array(values, pa.string())

    def _carried_as_before(self, array: pa.Array, column: Column, chunk: Chunk) -> pa.Array:
        if pa.types.is_null(array.type):
            return array
        known = self._carried.setdefault(column.name, array.type)
        if array.type != known:
            raise PromptError(
                f"{chunk.where(0)}: `{column.source}` is {array.type} from here on and {known} in the rows before; "
                "make it one type"
            )
        return array

    def _check_overrides(self, overrides: list[Column], arrays: dict[str, pa.Array], chunk: Chunk) -> None:
        names = [column.name.removeprefix(OVERRIDE) for column in overrides]
        for column, name in zip(overrides, names, strict=True):
            if name != "negative_prompt":
                self._refuse_range(column, arrays[column.name], zero=name == "guidance_scale", chunk=chunk)
        checked = [name for name in names if name in ("width", "height", "num_inference_steps")]
        if not checked:
            return
        combos = pa.table({name: arrays[OVERRIDE + name] for name in checked})
        for combo in combos.group_by(checked).aggregate([]).to_pylist():
            given = {name: value for name, value in combo.items() if value is not None}
            if tuple(combo.values()) in self._sound:
                continue
            for params in self._params:
                fault = param_fault(self._card, params.model_copy(update=given))
                if fault is not None:
                    row = combos.to_pylist().index(combo)
                    raise PromptError(f"{chunk.where(row)}: {fault.name}: {fault.text}")
            if len(self._sound) < 100_000:
                self._sound.add(tuple(combo.values()))

    def _refuse_range(self, column: Column, array: pa.Array, *, zero: bool, chunk: Chunk) -> None:
        values = np.asarray(array.fill_null(1), np.float64)
        wrong = np.flatnonzero(~((values >= 0) & np.isfinite(values)) if zero else values <= 0)
        if len(wrong):
            row = int(wrong[0])
            bound = "0 or more" if zero else "above 0"
            raise PromptError(
                f"{chunk.where(row)}: `{column.source}` must be {bound}, got {array[row].as_py()}; change it"
            )


def _refuse_blank(array: pa.Array, chunk: Chunk, what: str, advice: str) -> None:
    empty = np.asarray(pc.binary_length(array)) == 0
    blank = np.flatnonzero(empty | np.asarray(pc.utf8_is_space(array)))
    if len(blank):
        raise PromptError(f"{chunk.where(int(blank[0]))}: the {what} is empty; {advice}")


def _from_arrow(values: pa.Array, column: Column, chunk: Chunk) -> pa.Array:
    """Bring a Parquet column to one of the table's types, or say which type it has instead."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    target: pa.DataType | None = None
    if pa.types.is_null(kind):
        target = _ARROW_TYPES.get(column.kind)
        if target is None:
            return values
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        target = pa.string() if column.kind in ("text", "carried") else None
    elif pa.types.is_integer(kind):
        target = {"int": pa.int64(), "float": pa.float64(), "carried": pa.int64()}.get(column.kind)
    elif pa.types.is_floating(kind):
        target = pa.float64() if column.kind in ("float", "carried") else None
    elif pa.types.is_boolean(kind):
        target = pa.bool_() if column.kind == "carried" else None
    if target is None:
        raise PromptError(
            f"{chunk.file}: column `{column.source}` has type {kind}, must be {_KIND_WORDS[column.kind]}; "
            "cast it in the file"
        )
    if target == kind:
        return values
    try:
        array = values.cast(target)
    except pa.ArrowInvalid as exc:
        raise PromptError(f"{chunk.file}: column `{column.source}`: {' '.join(str(exc).split())}; mend it") from exc
    return array


def _from_values(values: list[Any], column: Column, chunk: Chunk) -> pa.Array:
    """Bring a text file's values to one type. In CSV all are texts: numbers are read from them, empty ones are null."""
    if chunk.file.lower().endswith(".csv") and column.name != "prompt":
        values = [_csv_value(value, column, chunk, row) for row, value in enumerate(values)]
    allowed: dict[str, tuple[type, ...]] = {"text": (str,), "int": (int,), "float": (int, float)}
    types = set(map(type, values)) - {type(None)}
    if column.kind == "carried":
        types_allowed: tuple[type, ...] = (str, int, float, bool)
        first = next((type(value) for value in values if value is not None), None)
        if first in types_allowed and types != {first}:
            types_allowed = (first,) if first is not None else ()
    else:
        types_allowed = allowed[column.kind]
    if not types <= set(types_allowed):
        row = next(at for at, value in enumerate(values) if value is not None and type(value) not in types_allowed)
        word = _KIND_WORDS[column.kind]
        if len(types_allowed) == 1 and column.kind == "carried":
            word = f"{types_allowed[0].__name__}, as in the rows before"
        raise PromptError(
            f"{chunk.where(row)}: `{column.source}` must be {word}, got {shown(values[row])}; mend the row"
        )
    try:
        target = _ARROW_TYPES.get(column.kind)
        return pa.array(values, target) if target is not None else pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        _blame(values, column, chunk)


def _blame(values: list[Any], column: Column, chunk: Chunk) -> NoReturn:
    for row, value in enumerate(values):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise PromptError(f"{chunk.where(row)}: `{column.source}`: {value} does not fit 64 bits; write it as text")
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            raise PromptError(f"{chunk.where(row)}: `{column.source}` has half of a surrogate pair; mend the text")
    raise PromptError(f"{chunk.file}: column `{column.source}` cannot be read; make its values one type")


def _csv_value(value: str, column: Column, chunk: Chunk, row: int) -> Any:
    if not value:
        return None
    if column.kind in ("text", "carried"):
        return value
    try:
        if not _NUMBER.fullmatch(value.strip()):  # int() and float() read 64_0 and other scripts' digits too
            raise ValueError
        number = int(value) if column.kind == "int" else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PromptError(
            f"{chunk.where(row)}: `{column.source}` must be {_KIND_WORDS[column.kind]}, got {shown(value)}; "
            "mend the row"
        )
    return number


def _key_texts(array: pa.Array, column: Column, chunk: Chunk) -> pa.Array:
    if pa.types.is_integer(array.type):
        return array.cast(pa.string())
    if pa.types.is_null(array.type):
        return array.cast(pa.string())
    raise PromptError(
        f"{chunk.where(0)}: the key `{column.source}` must be text or a whole number, got {array.type}; cast it"
    )
