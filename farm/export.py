"""Finalise a pass: compact its receipts into the dataset, draw the contact sheet, write totals and measured speed.

What is written covers the images of all passes so far: after a pilot its own, from the next pass on every image. Reads
receipts and pictures, writes objects that follow from them alone: doing it twice, or two doing it at once, gives the same
objects. Who comes late, when a later pass is open, writes nothing more. Totals come last, since they close the pass.
Memory is flat: one part of the dataset at a time.
"""

import heapq
import json
import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from farm.errors import ControlError, ObjectMissingError, RecordError
from farm.ledger import Ledger
from farm.plan import Plan, speed_identity
from farm.prefetch import in_order
from farm.receipt import COLUMNS, ImageRow, Receipt, rows_to_table
from farm.records import Profile, Totals
from farm.sheet import Tile, draw_sheet, spread

log = logging.getLogger(__name__)

PART_ROWS = 100_000
CHUNK_ROWS = 10_000
FILE_NAME = "file_name"
THUMBNAIL_OVER_PX = 256  # pictures longer than this are shown on the sheet by their thumbnails
SHEET_THREADS = 8
PAUSE_S = 60.0  # a longer time in which no shard was in hand is no part of a job's wall time

_JSON = {b"farm": b"json"}


class _OvertakenError(Exception):
    """Raised where a later pass was opened meanwhile: dataset and sheet are its own to write."""


def finalise(
    ledger: Ledger,
    plan: Plan,
    pass_number: int,
    *,
    rewrite: bool = False,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Totals:
    """Write dataset parts, contact sheet and totals of a pass whose shards are all done, and return the totals.

    A pass that is closed already is left as it is, unless `rewrite`; then it must be the latest. `on_rows` is told the
    count of rows done now and then. Raises ControlError where shards are missing, RecordError where receipts and plan
    disagree.
    """
    closed = ledger.totals(plan, pass_number)
    if closed is not None and not rewrite:
        return closed
    try:
        return _write_all(ledger, plan, pass_number, on_rows)
    except _OvertakenError:
        closed = ledger.totals(plan, pass_number)
    if closed is None:
        raise ControlError(
            f"job {plan.job}: pass {pass_number + 1} is open, so pass {pass_number} is not written again"
        )
    return closed


def _write_all(ledger: Ledger, plan: Plan, pass_number: int, on_rows: Callable[[int], None]) -> Totals:
    for number in range(1, pass_number + 1):
        done = ledger.done_shards(plan, number)
        if not done.all():
            lacking = np.flatnonzero(~done)
            raise ControlError(
                f"job {plan.job} cannot be finalised: pass {number} lacks {len(lacking)} of {len(done)} receipts, the "
                f"first that of shard {int(lacking[0])}; farm render goes on with it"
            )
    tally = _Tally()
    covered = ledger.covered(plan, pass_number)
    wanted = set(spread(covered))
    shown: list[ImageRow] = []

    def still_ours() -> None:
        if ledger.passes(plan) > pass_number:
            raise _OvertakenError

    parts = _DatasetParts(ledger, plan, before_write=still_ours)
    for row in _rows(ledger, plan, pass_number, tally):
        if tally.images in wanted:
            shown.append(row)
        tally.add_row(row)
        parts.add(row)
        if tally.images % CHUNK_ROWS == 0:
            on_rows(tally.images)
    if tally.images != covered:
        raise RecordError(
            f"job {plan.job}: the receipts of {pass_number} passes have {tally.images} images, the plan {covered}; "
            "farm verify shows which lack"
        )
    parts.finish()
    totals = tally.totals(plan)
    sheet = _draw(ledger, plan, shown, totals)
    still_ours()
    ledger.store.put(sheet_key(plan), sheet, content_type="image/png")
    still_ours()
    ledger.put_totals(plan, pass_number, totals)
    profile = tally.profile(plan)
    if profile is not None:
        ledger.put_profile(profile)
    log.info("finalised", extra={"job": plan.job, "pass_number": pass_number, "ok": totals.ok, "failed": totals.failed})
    return totals


def run_prefix(plan: Plan) -> str:
    """Return the prefix, ending in `/`, of all objects of a run."""
    return f"jobs/{plan.job}/{plan.run}/"


def sheet_key(plan: Plan) -> str:
    """Return the key of a run's contact sheet."""
    return f"{run_prefix(plan)}sheet.png"


def dataset_prefix(plan: Plan) -> str:
    """Return the prefix of a run's dataset parts."""
    return f"{run_prefix(plan)}dataset/"


# Rows and sums


class _Work:
    """When shards were being rendered, as spans of time that may lie over each other."""

    def __init__(self) -> None:
        self._starts, self._ends = array("d"), array("d")

    def add(self, receipt: Receipt) -> None:
        end = datetime.fromisoformat(receipt.finished_at).timestamp()
        self._starts.append(end - receipt.seconds.get("total", 0.0))
        self._ends.append(end)

    @property
    def started_at(self) -> str:
        return datetime.fromtimestamp(min(self._starts), UTC).isoformat(timespec="seconds")

    @property
    def finished_at(self) -> str:
        return datetime.fromtimestamp(max(self._ends), UTC).isoformat(timespec="seconds")

    def wall_seconds(self) -> float:
        """Return the time in which at least one shard was in hand; pauses longer than PAUSE_S do not count."""
        total, until = 0.0, -math.inf
        for start, end in sorted(zip(self._starts, self._ends, strict=True)):
            total += max(0.0, end - (until if start - until <= PAUSE_S else start))
            until = max(until, end)
        return round(total, 3)


@dataclass(slots=True)
class _Tally:
    """Sums over receipts and rows."""

    work: _Work = field(default_factory=_Work)
    ok: int = 0
    failed: int = 0
    flagged: int = 0
    size_bytes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    renderers: set[str] = field(default_factory=set)
    kinds: set[tuple[str, int, int, int]] = field(default_factory=set)
    drawn_seconds: float = 0.0

    @property
    def images(self) -> int:
        """Rows counted so far."""
        return self.ok + self.failed

    def add_receipt(self, receipt: Receipt) -> None:
        self.work.add(receipt)
        self.renderers.add(receipt.renderer)
        for stage, seconds in receipt.seconds.items():
            self.seconds[stage] += seconds  # type: ignore[assignment]

    def add_row(self, row: ImageRow) -> None:
        if row.status == "failed":
            self.failed += 1
            self.failures[row.error_code or "unknown"] += 1
        else:
            self.ok += 1
            self.flagged += row.flag is not None
            self.size_bytes += row.size_bytes or 0
            self.drawn_seconds += row.seconds
            if len(self.kinds) < 2:
                self.kinds.add((row.device, row.width, row.height, row.num_inference_steps))

    def profile(self, plan: Plan) -> Profile | None:
        """How fast these pictures were drawn, where they are of one size, one number of steps and one device."""
        if len(self.kinds) != 1 or self.drawn_seconds <= 0:
            return None
        ((device, width, height, steps),) = self.kinds
        return Profile(
            model=plan.card.name,
            device=device,
            acceleration=plan.card.accelerated_on(plan.numerics.device),
            identity=speed_identity(plan.card, plan.numerics),
            seconds_per_image=self.drawn_seconds / self.ok,
            width=width,
            height=height,
            num_inference_steps=steps,
            batch=plan.numerics.batch,
            images=self.ok,
            measured_at=self.work.finished_at,
        )

    def totals(self, plan: Plan) -> Totals:
        estimate = plan.estimated_seconds_per_image
        return Totals(
            images=self.images,
            ok=self.ok,
            failed=self.failed,
            flagged=self.flagged,
            failures_by_code=dict(self.failures.most_common()),
            bytes=self.size_bytes,
            seconds={stage: round(float(seconds), 3) for stage, seconds in self.seconds.items()},
            renderers=len(self.renderers),
            started_at=self.work.started_at,
            finished_at=self.work.finished_at,
            wall_seconds=self.work.wall_seconds(),
            planned_gpu_seconds=None if estimate is None else round(estimate * self.images, 3),
        )


def _rows(ledger: Ledger, plan: Plan, passes: int, tally: _Tally) -> Iterator[ImageRow]:
    """Yield what `ledger.rows` does, and count the receipts on the way, so that each is read once."""

    def of_pass(number: int) -> Iterator[ImageRow]:
        for receipt in ledger.receipts(plan, number, threads=4):
            tally.add_receipt(receipt)
            yield from receipt.rows

    with ExitStack() as stack:
        ordered = [stack.enter_context(closing(of_pass(number))) for number in range(1, passes + 1)]  # type: ignore[type-var]
        last = -1
        for row in heapq.merge(*ordered, key=lambda row: (row.index, -row.pass_number)):
            if row.index != last:
                last = row.index
                yield row


# The dataset


class _DatasetParts:
    """Cuts a stream of rows into Parquet objects that all have one schema.

    A carried column's type shows only in its values. A part is written with the types known by then; should a later
    part widen one (null to text, whole to broken numbers), the earlier parts are written again at the end.
    """

    def __init__(self, ledger: Ledger, plan: Plan, *, before_write: Callable[[], None]):
        self._ledger = ledger
        self._plan = plan
        self._before_write = before_write
        self._rows: list[ImageRow] = []
        self._chunks: list[pa.Table] = []
        self._carried: dict[str, pa.Field] = {}
        self._written: list[dict[str, pa.Field]] = []

    def add(self, row: ImageRow) -> None:
        self._rows.append(row)
        if len(self._rows) >= CHUNK_ROWS:
            self._cut()
            if sum(chunk.num_rows for chunk in self._chunks) >= PART_ROWS:
                self._write()

    def finish(self) -> None:
        """Write what is left, bring all parts to one schema, and remove parts of an earlier, longer dataset."""
        if self._rows:
            self._cut()
        if self._chunks:
            self._write()
        store = self._ledger.store
        for number, carried in enumerate(self._written):
            if carried != self._carried:
                table = pq.read_table(pa.BufferReader(store.get(self._key(number))))
                self._put(number, _with_carried(table, self._carried))
        kept = {self._key(number) for number in range(len(self._written))}
        for info in store.list(dataset_prefix(self._plan)):
            if info.key not in kept:
                self._before_write()
                store.delete(info.key)

    def _cut(self) -> None:
        table = _without_clashes(rows_to_table(self._rows))
        for place in range(len(COLUMNS), table.num_columns):
            found = table.schema.field(place)
            self._carried[found.name] = _widened(self._carried.get(found.name), found)
        prefix = run_prefix(self._plan)
        names = [row.object and row.object.removeprefix(prefix) for row in self._rows]
        self._chunks.append(table.append_column(FILE_NAME, pa.array(names, type=pa.string())))
        self._rows = []

    def _write(self) -> None:
        part = pa.concat_tables(_with_carried(chunk, self._carried) for chunk in self._chunks)
        self._put(len(self._written), part)
        self._written.append(dict(self._carried))
        self._chunks = []

    def _put(self, number: int, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=CHUNK_ROWS)
        data = sink.getvalue().to_pybytes()
        self._before_write()
        self._ledger.store.put(self._key(number), data, content_type="application/vnd.apache.parquet")

    def _key(self, number: int) -> str:
        return f"{dataset_prefix(self._plan)}part-{number:05d}.parquet"


def _without_clashes(table: pa.Table) -> pa.Table:
    """Rename a carried column that has the name of the dataset's own `file_name`."""
    return table.rename_columns([f"carried_{name}" if name == FILE_NAME else name for name in table.schema.names])


def _widened(known: pa.Field | None, found: pa.Field) -> pa.Field:
    """The field that holds the values of both: null gives way, numbers become floats, what else differs JSON text."""
    if known is None or pa.types.is_null(known.type) or known.equals(found, check_metadata=True):
        return found
    if pa.types.is_null(found.type):
        return known
    if not (known.metadata or found.metadata) and {known.type, found.type} == {pa.int64(), pa.float64()}:
        return pa.field(found.name, pa.float64())
    return pa.field(found.name, pa.string(), metadata=_JSON)


def _with_carried(table: pa.Table, carried: dict[str, pa.Field]) -> pa.Table:
    """Return the table with its carried columns of these types, in this order, before `file_name`."""
    own = table.select(list(COLUMNS))
    for name, wanted in carried.items():
        if name not in table.schema.names:
            own = own.append_column(wanted, pa.nulls(table.num_rows, wanted.type))
            continue
        column, is_now = table.column(name), table.schema.field(name)
        if wanted.metadata and not is_now.metadata:
            texts = [None if value is None else json.dumps(value) for value in column.to_pylist()]
            column = pa.array(texts, type=pa.string())
        own = own.append_column(wanted, column.cast(wanted.type, safe=False))
    return own.append_column(FILE_NAME, table.column(FILE_NAME))


# The contact sheet


def _draw(ledger: Ledger, plan: Plan, rows: Sequence[ImageRow], totals: Totals) -> bytes:
    def tile(row: ImageRow) -> Tile:
        small = row.thumbnail if max(row.width, row.height) > THUMBNAIL_OVER_PX else None
        key = small or row.object
        try:
            return Tile(row, ledger.store.get(key) if key and row.status == "ok" else None)
        except ObjectMissingError:
            return Tile(row, None)

    said = [f"{totals.images:,} image{'s' if totals.images > 1 else ''}"]
    if totals.failed:
        said.append(f"{totals.failed:,} failed")
    if len(rows) < totals.images:
        said.append(f"{len(rows)} of them shown")
    said += [plan.card.title, totals.finished_at[:10]]
    return draw_sheet(plan.job, " · ".join(said), list(in_order(tile, rows, threads=SHEET_THREADS)))
