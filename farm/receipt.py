"""Receipts: the record whose presence means that a shard is done, with a row per image, failed ones too.

As Parquet, a receipt's rows are the table, the columns carried from the prompts after the farm's own, and its head is
JSON in the schema's metadata. What is read is checked whole, so that a receipt which parses is one that was written.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from farm.errors import NewerVersionError, RecordError
from farm.plan import Scalar

VERSION = 2
"""Version 1 knew no warnings; its rows are read as having none."""
_HEAD = b"farm.receipt"
_JSON = {b"farm": b"json"}
_MAX_EXACT_FLOAT = 2**53


@dataclass(frozen=True, slots=True)
class ImageRow:
    """What became of one image. A row of a dataset is the same record.

    `alone`: rendered outside its planned batch after that batch failed, so its bytes may differ from an undisturbed
    run's. `flag`: `black` or `constant` where the picture is all one colour. `seconds`: its share of its batch's time.
    `warnings`: codes of the advice on the prompt, with commas between.
    """

    index: int
    key: str | None
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    status: Literal["ok", "failed"]
    object: str | None
    thumbnail: str | None
    size_bytes: int | None
    sha256: str | None
    phash: str | None
    flag: str | None
    error_code: str | None
    error_message: str | None
    pass_number: int
    attempt: int
    alone: bool
    seconds: float
    renderer: str
    device: str
    carry: dict[str, Scalar]
    warnings: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """One shard's end. `start`/`stop` are positions in the pass: image indexes in pass 1, places in its list later.

    `seconds` by stage: load, encode, denoise, decode, write (encode to file, hash, upload), total wall time.
    """

    job: str
    run: str
    pass_number: int
    shard: int
    start: int
    stop: int
    attempt: int
    renderer: str
    device: str
    versions: dict[str, str]
    finished_at: str
    seconds: dict[str, float]
    rows: tuple[ImageRow, ...]

    @property
    def failed(self) -> int:
        """How many of the rows are failed ones."""
        return sum(row.status == "failed" for row in self.rows)

    def to_parquet(self) -> bytes:
        """Return the receipt as one Parquet file; equal receipts give equal bytes."""
        head = _Head(**{name: getattr(self, name) for name in _Head.model_fields if name not in ("version", "images")})
        table = rows_to_table(self.rows)
        text = head.model_copy(update={"images": len(self.rows)}).model_dump_json()
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({_HEAD: text.encode()}), sink, compression="zstd")
        data: bytes = sink.getvalue().to_pybytes()
        return data

    @classmethod
    def from_parquet(cls, data: bytes, where: str) -> Self:
        """Read what `to_parquet` wrote; `where` names the object in messages.

        Raises NewerVersionError where a newer farm wrote it, RecordError where it does not parse.
        """
        try:
            table = pq.read_table(pa.BufferReader(data))
            fields = json.loads((table.schema.metadata or {})[_HEAD])
            if isinstance(fields, dict) and fields.get("version", 0) > VERSION:
                raise NewerVersionError(
                    f"{where}: a receipt of version {fields['version']}, this farm reads up to {VERSION}; "
                    "upgrade this farm"
                )
            head = _Head.model_validate(fields)
            rows = tuple(table_to_rows(_brought_up(table, head.version)))
            if len(rows) != head.images:
                raise ValueError(f"{len(rows)} rows, its head says {head.images}")
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, ValidationError) as exc:
            reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
            raise RecordError(
                f"{where}: not a receipt ({reason}); restore the object, or delete it and its run's totals/, and start the "
                "job again: its shard is rendered again"
            ) from exc
        kept = {name: getattr(head, name) for name in _Head.model_fields if name not in ("version", "images")}
        return cls(**kept, rows=rows)


class _Head(BaseModel):
    """What a receipt says besides its rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int = VERSION
    job: str
    run: str
    pass_number: int
    shard: int
    start: int
    stop: int
    attempt: int
    renderer: str
    device: str
    versions: dict[str, str]
    finished_at: str
    seconds: dict[str, float]
    images: int = 0


_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("key", pa.string()),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("num_inference_steps", pa.int32(), nullable=False),
        pa.field("guidance_scale", pa.float64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("object", pa.string()),
        pa.field("thumbnail", pa.string()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("phash", pa.string()),
        pa.field("flag", pa.string()),
        pa.field("error_code", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("pass_number", pa.int32(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("alone", pa.bool_(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("renderer", pa.string(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        pa.field("warnings", pa.string()),
    ]
)
COLUMNS: tuple[str, ...] = tuple(_SCHEMA.names)
"""Names that a carried column may not have."""
CARRIED_WARNINGS = "carried_warnings"
"""What a column is called that was carried as `warnings`, in jobs planned when that was no column of the farm's own."""


def rows_to_table(rows: Sequence[ImageRow]) -> pa.Table:
    """Return the rows as a table: the farm's own columns, then the carried ones in order of first appearance.

    A carried column whose values are of one kind has its type (whole numbers and others: float); a mixed one becomes
    JSON text and says so in its field's metadata.
    """
    arrays = [pa.array([getattr(row, field.name) for row in rows], type=field.type) for field in _SCHEMA]
    fields = list(_SCHEMA)
    for name in dict.fromkeys(name for row in rows for name in row.carry):
        values = [row.carry.get(name) for row in rows]
        kind = _carried_type(values)
        if kind is None:
            values = [None if value is None else json.dumps(value) for value in values]
        named = CARRIED_WARNINGS if name == "warnings" else name
        fields.append(pa.field(named, kind or pa.string(), metadata=_JSON if kind is None else None))
        arrays.append(pa.array(values, type=kind or pa.string()))
    return pa.table(arrays, schema=pa.schema(fields))


def table_to_rows(table: pa.Table) -> Iterable[ImageRow]:
    """Yield what `rows_to_table` was given. Raises ValueError where the table is not one of rows."""
    own = table.schema.names[: len(COLUMNS)]
    if tuple(own) != COLUMNS:
        raise ValueError(f"its columns begin with {', '.join(own[:3])}, not with {', '.join(COLUMNS[:3])}")
    for place, field in enumerate(_SCHEMA):
        column = table.column(place)
        if column.type != field.type or (not field.nullable and column.null_count):
            raise ValueError(f"column {field.name} is {column.type} with {column.null_count} nulls, not {field}")
    carried = {field.name: _carried_values(table, field) for field in list(table.schema)[len(COLUMNS) :]}
    own_values = zip(*(table.column(place).to_pylist() for place in range(len(COLUMNS))), strict=True)
    for number, values in enumerate(own_values):
        carry = {name: column[number] for name, column in carried.items()}
        row = ImageRow(**dict(zip(COLUMNS, values, strict=True)), carry=carry)
        if row.status not in ("ok", "failed"):
            raise ValueError(f"image {row.index} has the status {row.status!r}")
        yield row


def _brought_up(table: pa.Table, version: int) -> pa.Table:
    """Return the rows of an earlier version's receipt with the columns of this one."""
    place = COLUMNS.index("warnings")
    if version > 1 or table.num_columns < place:
        return table
    names = [CARRIED_WARNINGS if name == "warnings" else name for name in table.schema.names]
    return table.rename_columns(names).add_column(place, _SCHEMA.field(place), pa.nulls(table.num_rows, pa.string()))


def _carried_type(values: Sequence[Scalar]) -> pa.DataType | None:
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.null()
    if kinds == {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    whole = [value for value in values if type(value) is int]
    if kinds == {int} and all(-(2**63) <= value < 2**63 for value in whole):
        return pa.int64()
    if float in kinds and kinds <= {int, float} and all(abs(value) <= _MAX_EXACT_FLOAT for value in whole):
        return pa.float64()
    return None


def _carried_values(table: pa.Table, field: pa.Field) -> list[Any]:
    values: list[Any] = table.column(field.name).to_pylist()
    if (field.metadata or {}).get(b"farm") == b"json":
        return [None if value is None else json.loads(value) for value in values]
    return values
