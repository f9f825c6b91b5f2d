"""Compare every row of a job with its object, its receipts with the plan, and its dataset with the receipts.

Reads everything again and believes nothing: a finding is something that a reader of the dataset would trip over.
Objects that no row names (left by twins and interrupted shards) are counted and are no finding. Memory is flat.
"""

import hashlib
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from farm.errors import ObjectMissingError, RecordError
from farm.export import dataset_prefix, run_prefix
from farm.ledger import Indexes, Ledger
from farm.passes import Selection
from farm.plan import Plan
from farm.prefetch import in_order
from farm.prompts import PromptReader
from farm.receipt import COLUMNS, ImageRow, Receipt
from farm.yamlfile import shown

BLOCK_IMAGES = 1000
SUM_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as the records say. `kind` is stable; `index` is the image's, where it is about one."""

    kind: str
    message: str
    index: int | None = None
    object: str | None = None


@dataclass(slots=True)
class Verification:
    """What was looked at and what was found. `orphans` is None where only a sample was looked at.

    `left_out`: images that a pilot left out and that no pass is over yet; that they lack is no finding.
    """

    job: str
    run: str
    images: int
    rows: int = 0
    ok: int = 0
    failed: int = 0
    checked: int = 0
    bytes_read: int = 0
    orphans: int | None = None
    left_out: int = 0
    findings: Counter[str] = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


Report = Callable[[Finding], None]


def verify(
    ledger: Ledger,
    plan: Plan,
    *,
    sample: int | None = None,
    seed: int = 0,
    threads: int = 8,
    report: Report = lambda finding: None,
    progress: Callable[[Verification], None] = lambda verification: None,
) -> Verification:
    """Verify one run of a job; `report` gets each finding as it is made.

    All records are compared; with `sample`, only so many images, drawn by `seed`, are read. Raises StoreError where the
    store itself fails, since then nothing can be said.
    """
    result = Verification(plan.job, plan.run, plan.images)

    def found(finding: Finding) -> None:
        result.findings[finding.kind] += 1
        report(finding)

    there = ledger.covered_indexes(plan, ledger.passes(plan))
    result.left_out = plan.images - len(there)
    chosen = None
    if sample is not None and sample < len(there):
        chosen = set(random.Random(seed).sample(there, sample))
    sums = _BlockSums(plan.images)
    existing = 0

    def to_read() -> Iterator[ImageRow]:
        for row in _effective_rows(ledger, plan, sums, found):
            result.rows += 1
            sums.add(row.index, [getattr(row, name) for name in COLUMNS])
            if row.status == "failed":
                result.failed += 1
            else:
                result.ok += 1
                if chosen is None or row.index in chosen:
                    yield row

    for checked in in_order(lambda row: _check_picture(ledger, row), to_read(), threads=threads):
        result.checked += 1
        result.bytes_read += checked.size_bytes
        existing += checked.exists
        for finding in checked.findings:
            found(finding)
        progress(result)
    if result.rows != len(there) and not result.findings:
        found(Finding("rows", f"{result.rows} rows for {len(there)} images"))
    _check_dataset(ledger, plan, result, sums, found)
    if chosen is None:
        stored = sum(1 for _ in ledger.store.list(f"{run_prefix(plan)}images/"))
        result.orphans = max(0, stored - existing)
    return result


class _BlockSums:
    """Sums over whole rows, a block of images at a time, in any order: blocks with equal sums have equal rows."""

    def __init__(self, images: int):
        self._images = images
        blocks = -(-images // BLOCK_IMAGES)
        self._sums = np.zeros(blocks, dtype=np.uint64)
        self._rows = np.zeros(blocks, dtype=np.int64)
        self._unknown = np.zeros(blocks, dtype=np.bool_)

    def add(self, index: int, values: Sequence[object]) -> None:
        digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=8).digest()
        block = index // BLOCK_IMAGES
        self._sums[block] = (int(self._sums[block]) + int.from_bytes(digest)) & SUM_MASK
        self._rows[block] += 1

    def give_up(self, indexes: Sequence[int]) -> None:
        """Take out of the comparison what these images' rows should be."""
        self._unknown[np.unique(np.asarray(indexes, dtype=np.int64) // BLOCK_IMAGES)] = True

    def first_difference(self, other: "_BlockSums") -> range | None:
        """Return the images of the first block that both have whole and that differs."""
        comparable = ~self._unknown & (self._rows == other._rows)
        differing = np.flatnonzero(comparable & (self._sums != other._sums))
        if not len(differing):
            return None
        start = int(differing[0]) * BLOCK_IMAGES
        return range(start, min(start + BLOCK_IMAGES, self._images))


class _Planned:
    """What a receipt's rows should say, from the frozen prompts. Prompts that cannot be read are one finding."""

    def __init__(self, ledger: Ledger, plan: Plan, found: Report):
        self._plan = plan
        self._prompts = PromptReader(plan, ledger)
        self._found = found
        self._readable = True

    def check(self, rows: Sequence[ImageRow]) -> None:
        for row in rows:
            place, _, slot = self._plan.locate(row.index)
            if row.seed != self._plan.seeds.seed(place, row.key, slot):
                self._differs("seed", row, f"has seed {row.seed}, not the plan's")
        if not self._readable:
            return
        try:
            specs = self._prompts.specs([row.index for row in rows])
        except (RecordError, ObjectMissingError) as exc:
            self._readable = False
            self._found(Finding("prompts_unreadable", f"the frozen prompts: {exc.message}"))
            return
        for row, spec in zip(rows, specs, strict=True):
            if row.prompt != spec.prompt:
                self._differs("prompt", row, f"has the prompt {shown(row.prompt)}, the plan {shown(spec.prompt)}")
            if row.key != spec.key:
                self._differs("key", row, f"has the key {shown(row.key)}, the plan {shown(spec.key)}")
            for name, planned in spec.params:
                if (value := getattr(row, name)) != planned:
                    self._differs("params", row, f"has {name} {shown(value)}, the plan {shown(planned)}")

    def _differs(self, kind: str, row: ImageRow, what: str) -> None:
        self._found(Finding(kind, f"image {row.index} {what}", index=row.index))


def _effective_rows(ledger: Ledger, plan: Plan, sums: _BlockSums, found: Report) -> Iterator[ImageRow]:
    """Yield each image's row of the latest pass that has one; report receipts that lack, or contradict the plan."""
    planned = _Planned(ledger, plan, found)
    last = ledger.passes(plan)
    done = {number: ledger.done_shards(plan, number) for number in range(1, last + 1)}
    later: list[_Taken] = []
    for number in range(last, 0, -1):
        missing = np.flatnonzero(~done[number])
        if len(missing):
            found(_missing_receipts(ledger, plan, number, missing))
        # An earlier pass's row stands in for the one that lacks here; the dataset is right to have another.
        for shard in missing if number > 1 else ():
            sums.give_up(ledger.shard_indexes(plan, number, int(shard)))
        taken = _Taken(ledger.selection(plan, number), plan.pass_shard_images(number), done[number].copy())
        for shard in np.flatnonzero(done[number]):
            receipt = _read_receipt(ledger, plan, number, int(shard), found)
            if receipt is None:
                taken.shards[shard] = False
                sums.give_up(ledger.shard_indexes(plan, number, int(shard)))
                continue
            planned.check(receipt.rows)
            indexes = np.fromiter((row.index for row in receipt.rows), dtype=np.int64)
            overtaken = np.zeros(len(indexes), dtype=np.bool_)
            for one in later:
                overtaken |= one.has(indexes)
            for row, late in zip(receipt.rows, overtaken, strict=True):
                if not late:
                    yield row
        later.append(taken)


@dataclass(frozen=True, slots=True)
class _Taken:
    """A pass whose rows stand in for those of earlier ones: `shards` are those whose receipts could be read."""

    selection: Selection
    shard_images: int
    shards: NDArray[np.bool_]

    def has(self, indexes: Indexes) -> NDArray[np.bool_]:
        """Whether each image has a row in it."""
        places = self.selection.places(indexes)
        return (places >= 0) & self.shards[places // self.shard_images]


def _missing_receipts(ledger: Ledger, plan: Plan, number: int, missing: NDArray[np.int64]) -> Finding:
    first = ledger.shard_indexes(plan, number, int(missing[0]))
    shards = ledger.pass_shards(plan, number)
    return Finding(
        "receipt_missing",
        f"pass {number}: {len(missing)} of {shards} shards have no receipt, the first is shard {missing[0]} "
        f"(images {first[0]} to {first[-1]}); {_mend(ledger, plan, number)}",
        index=int(first[0]),
    )


def _mend(ledger: Ledger, plan: Plan, number: int) -> str:
    """What makes a lost shard be rendered again; totals say that the pass is done, so they have to go first."""
    if ledger.totals(plan, number) is None:
        return "farm render goes on with them"
    return f"restore them, or delete {run_prefix(plan)}totals/ and run farm render again: it renders them anew"


def _read_receipt(ledger: Ledger, plan: Plan, number: int, shard: int, found: Report) -> Receipt | None:
    try:
        receipt = ledger.receipt(plan, number, shard)
    except (RecordError, ObjectMissingError) as exc:
        found(Finding("receipt_unreadable", f"pass {number}, shard {shard}: {exc.message}"))
        return None
    expected = [int(index) for index in ledger.shard_indexes(plan, number, shard)]
    if [row.index for row in receipt.rows] != expected:
        found(
            Finding(
                "receipt_rows",
                f"pass {number}, shard {shard}: its {len(receipt.rows)} rows are not the plan's {len(expected)} images "
                f"{expected[0]} to {expected[-1]}",
                index=expected[0],
            )
        )
        return None
    return receipt


@dataclass(frozen=True, slots=True)
class _Checked:
    exists: bool
    size_bytes: int
    findings: tuple[Finding, ...]


def damaged_images(ledger: Ledger, plan: Plan, *, threads: int = 8) -> np.ndarray:
    """Read every picture; return, ascending, the indexes of those that are missing or not what their rows say."""
    found = (
        row.index
        for row, checked in in_order(
            lambda row: (row, _check_picture(ledger, row)),
            (row for row in ledger.rows(plan) if row.status == "ok"),
            threads=threads,
        )
        if checked.findings
    )
    return np.fromiter(found, dtype=np.int64)


def _check_picture(ledger: Ledger, row: ImageRow) -> _Checked:
    """Read one picture again. Raises StoreError unless it is merely not there."""

    def finding(kind: str, message: str, key: str | None = row.object) -> Finding:
        return Finding(kind, f"image {row.index}: {message}", row.index, key)

    if row.object is None:
        return _Checked(False, 0, (finding("object_missing", "its row names no object and is not failed"),))
    try:
        data = ledger.store.get(row.object)
    except ObjectMissingError:
        return _Checked(False, 0, (finding("object_missing", f"{row.object} is not there"),))
    findings = []
    if len(data) != row.size_bytes:
        findings.append(finding("size", f"{row.object} has {len(data)} bytes, its row says {row.size_bytes}"))
    if (actual := hashlib.sha256(data).hexdigest()) != row.sha256:
        findings.append(finding("sha256", f"{row.object} has sha256 {actual}, its row says {row.sha256}"))
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            size = picture.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as exc:
        findings.append(finding("picture", f"{row.object} does not decode: {exc}"))
    else:
        if size != (row.width, row.height):
            findings.append(
                finding("dimensions", f"{row.object} is {size[0]}x{size[1]}, its row says {row.width}x{row.height}")
            )
    if row.thumbnail is not None and ledger.store.head(row.thumbnail) is None:
        findings.append(finding("thumbnail_missing", f"{row.thumbnail} is not there", row.thumbnail))
    return _Checked(True, len(data), tuple(findings))


def _check_dataset(ledger: Ledger, plan: Plan, result: Verification, rows: _BlockSums, found: Report) -> None:
    """Each index exactly once, in order, and the rows those of the receipts, in all of the farm's columns."""
    number = ledger.passes(plan)
    if ledger.totals(plan, number) is None:
        if "receipt_missing" not in result.findings:
            found(Finding("dataset_missing", "all shards are done, the dataset is not written; farm render writes it"))
        return
    sums = _BlockSums(plan.images)
    indexes = ledger.covered_indexes(plan, number)
    images, place = len(indexes), 0
    for info in ledger.store.list(dataset_prefix(plan)):
        try:
            part = pq.ParquetFile(io.BytesIO(ledger.store.get(info.key)))
            batches = part.iter_batches(columns=list(COLUMNS))
            for batch in batches:
                for row in batch.to_pylist():
                    expected = indexes[place] if place < images else plan.images
                    if row["index"] != expected:
                        message = f"{info.key}: image {row['index']} stands where {expected} should"
                        found(Finding("dataset_rows", message, index=row["index"]))
                        return
                    if place < images:
                        row.setdefault("warnings")  # datasets written before there were any lack the column
                        sums.add(expected, [row[name] for name in COLUMNS])
                    place += 1
        except (OSError, ValueError, KeyError) as exc:
            found(Finding("dataset_unreadable", f"{info.key} does not read as Parquet: {exc}", object=info.key))
            return
    if place != images:
        found(Finding("dataset_rows", f"the dataset has {place} rows for {images} images"))
    elif (block := rows.first_difference(sums)) is not None:
        found(
            Finding(
                "dataset_rows",
                f"the dataset's rows are not the receipts', the first among images {block.start} to {block.stop - 1}; "
                "`farm verify --rewrite` writes it again",
                index=block.start,
            )
        )
