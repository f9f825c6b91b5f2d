"""Freeze a manifest's prompts into a prompt table, and read rows of it back.

Files stream through in parts of 65,536 rows: memory does not grow with them, but for 8 bytes a row where there are
keys. A template keeps its lists instead and has no parts. The table's digest is a sha256 over content and order,
independent of how Parquet wrote it. Knows nothing of jobs that exist already; `farm/submission.py` compares.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from farm.columns import CARRY, OVERRIDE, Normaliser, table_columns
from farm.errors import ManifestError, PromptError, RecordError
from farm.knownrows import KnownRows
from farm.ledger import Ledger
from farm.manifest import Manifest, PromptFile, PromptTemplate, VaryFile
from farm.modelcard import ModelCard, ParamOverrides, RenderParams, merged
from farm.plan import PART_ROWS, ImageSpec, Plan, PromptRow, PromptTable, canonical_digest
from farm.rowhash import Hashes, column_hashes
from farm.samples import Sampler, Samples, template_samples
from farm.sources import LINE_COLUMN, Chunk, StoreOpener, find_files, read_chunks
from farm.sweep import MAX_VALUES, Template, TemplatePrompts

Sink = Callable[[int, bytes], None]
"""Takes part number and Parquet bytes, in order."""

_MAX_SIZES = 1000
_FIRST_ROWS = 8
_KEYS_STEP = 2**20


@dataclass(slots=True)
class Frozen:
    """A prompt table as it was frozen, its first rows, and how many rows have each (width, height) override."""

    table: PromptTable
    first: list[PromptRow]
    sizes: dict[tuple[int | None, int | None], int] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)


def freeze(
    manifest: Manifest,
    *,
    card: ModelCard,
    params: RenderParams,
    points: Sequence[ParamOverrides],
    root: int,
    open_store: StoreOpener,
    sink: Sink | None,
    known: KnownRows | None = None,
) -> Frozen:
    """Read the prompts once, check every row, hand the parts to `sink`, and return the table.

    `root` decides a template's draws where the manifest has no seed. Rows that are `known` are left out. Raises
    ManifestError and PromptError.
    """
    if isinstance(manifest.prompts, PromptTemplate):
        return _freeze_template(read_template(manifest.prompts, root=root, open_store=open_store))
    every = [merged(params, point) for point in points]
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompt-parts") as pool:
        writer = _PartWriter(sink, pool, keyed=manifest.keyed)
        sampler = Sampler()
        for chunk, table in _tables(manifest, card=card, params=every, open_store=open_store):
            sampler.add(chunk, table, listed=isinstance(manifest.prompts, tuple))
            writer.add(table if known is None else known.without(table))
        frozen = writer.finish()
        frozen.samples = sampler.samples
    if frozen.table.keyed and (doubled := writer.doubled_keys()) is not None:
        _refuse_doubled(manifest, doubled, card=card, params=every, open_store=open_store)
    return frozen


def sample(
    manifest: Manifest,
    *,
    card: ModelCard,
    params: RenderParams,
    points: Sequence[ParamOverrides],
    open_store: StoreOpener,
    most: int,
) -> Samples:
    """Return the first different prompts of a source, `most` of them, without reading what follows.

    Raises ManifestError and PromptError.
    """
    if isinstance(manifest.prompts, PromptTemplate):
        template = read_template(manifest.prompts, root=0, open_store=open_store)
        return template_samples(TemplatePrompts(template), most)
    sampler = Sampler(most)
    every = [merged(params, point) for point in points]
    for chunk, table in _tables(manifest, card=card, params=every, open_store=open_store):
        sampler.add(chunk, table, listed=isinstance(manifest.prompts, tuple))
        if sampler.full:
            break
    return sampler.samples


def read_template(prompts: PromptTemplate, *, root: int, open_store: StoreOpener) -> Template:
    """Return the template with the values of its files read in. Raises ManifestError, PromptError."""
    vary: dict[str, tuple[str, ...]] = {}
    for name, values in prompts.vary.items():
        if isinstance(values, VaryFile):
            vary[name] = _file_values(name, values, open_store)
        else:
            vary[name] = tuple(str(value) for value in values)
    return Template(
        text=prompts.template,
        vary=vary,
        combine=prompts.combine,
        draw=prompts.draw,
        root=root if prompts.drawn_once else prompts.seed or 0,
    )


class PromptReader:
    """Reads rows of a plan's prompt table; keeps the last two parts. For one thread."""

    def __init__(self, plan: Plan, ledger: Ledger):
        self._plan = plan
        self._ledger = ledger
        self._template = TemplatePrompts(plan.prompts.template) if plan.prompts.template else None
        self._parts: OrderedDict[int, pa.Table] = OrderedDict()

    def specs(self, indexes: Sequence[int]) -> list[ImageSpec]:
        """Return what to render for each image index. Raises StoreError, RecordError."""
        rows: dict[int, PromptRow] = {}
        specs = []
        for index in indexes:
            number = self._plan.locate(int(index))[0]
            row = rows.get(number)
            if row is None:
                row = rows[number] = self.row(number)
            specs.append(self._plan.spec(int(index), row))
        return specs

    def row(self, number: int) -> PromptRow:
        """Return one row of the table."""
        if self._template is not None:
            return PromptRow(prompt=self._template.row(number), key=None, overrides=_NO_OVERRIDES, carry={})
        part, offset = divmod(number, self._plan.prompts.part_rows)
        return _table_row(self._part(part), offset)

    def _part(self, number: int) -> pa.Table:
        if number not in self._parts:
            self._parts[number] = read_part(self._plan, self._ledger, number)
            if len(self._parts) > 2:
                self._parts.popitem(last=False)
        self._parts.move_to_end(number)
        return self._parts[number]


def read_part(plan: Plan, ledger: Ledger, number: int) -> pa.Table:
    """Return one part of a plan's prompt table. Raises RecordError when it does not parse or has not its rows."""
    try:
        table = pq.read_table(io.BytesIO(ledger.prompt_part(plan, number)), use_threads=False)
    except (pa.ArrowException, OSError) as exc:
        raise RecordError(f"job {plan.job}, prompt part {number}: not Parquet: {exc}; restore the object") from exc
    rows = min(plan.prompts.part_rows, plan.prompts.rows - number * plan.prompts.part_rows)
    if table.num_rows != rows:
        raise RecordError(
            f"job {plan.job}, prompt part {number}: {table.num_rows} rows, not {rows}; restore the object"
        )
    return table


def known_rows(plans: Sequence[Plan], ledger: Ledger) -> KnownRows:
    """Return all rows of the runs' prompt tables, by hashes. Raises StoreError, RecordError."""
    parts = (read_part(plan, ledger, part) for plan in plans for part in range(plan.prompts.parts))
    return KnownRows.of(parts, total=sum(plan.prompts.rows for plan in plans))


@dataclass(frozen=True, slots=True)
class Difference:
    """How a keyed source differs from known rows: counts, and the first changed key."""

    new: int
    changed: int
    gone: int
    first_changed: str | None


def compare_rows(
    manifest: Manifest,
    known: KnownRows,
    *,
    card: ModelCard,
    params: RenderParams,
    points: Sequence[ParamOverrides],
    open_store: StoreOpener,
) -> Difference:
    """Stream a keyed source past the known rows."""
    new = changed = same = 0
    first: str | None = None
    every = [merged(params, point) for point in points]
    for _, table in _tables(manifest, card=card, params=every, open_store=open_store):
        present, equal = known.match(table)
        new += int((~present).sum())
        same += int(equal.sum())
        different = np.flatnonzero(present & ~equal)
        changed += len(different)
        if first is None and len(different):
            first = table["key"][int(different[0])].as_py()
    return Difference(new=new, changed=changed, gone=len(known.keys) - same - changed, first_changed=first)


_NO_OVERRIDES = ParamOverrides()


def _freeze_template(template: Template) -> Frozen:
    prompts = TemplatePrompts(template)
    rows = prompts.rows
    table = PromptTable(
        rows=rows, parts=0, keyed=False, digest=canonical_digest(template.model_dump(mode="json")), template=template
    )
    first = [PromptRow(prompts.row(at), None, _NO_OVERRIDES, {}) for at in range(min(rows, _FIRST_ROWS))]
    for at, row in enumerate(first):
        if not row.prompt.strip():
            raise ManifestError(f"prompts.template: prompt {at} comes out empty; put text around its variables")
    return Frozen(table=table, first=first, sizes={(None, None): rows}, samples=template_samples(prompts))


def _file_values(name: str, source: VaryFile, open_store: StoreOpener) -> tuple[str, ...]:
    values: list[str] = []
    for file in find_files(source.file, open_store):
        column = LINE_COLUMN if file.suffix == ".txt" else source.column or name
        for chunk in read_chunks(file, [column]):
            read = chunk.columns[column]
            for row, value in enumerate(read if isinstance(read, list) else read.to_pylist()):
                if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
                    raise PromptError(
                        f"{chunk.where(row)}: a value of {name} must be text or a number, got {value!r}; mend it"
                    )
                values.append(str(value))
            if len(values) > MAX_VALUES:
                raise PromptError(
                    f"{source.file}: more than {MAX_VALUES} values for {name}; write the prompts themselves to a file "
                    "and use prompts.file"
                )
    if not values:
        raise PromptError(f"{source.file}: no values for {name}; write one a line")
    return tuple(values)


def _tables(
    manifest: Manifest, *, card: ModelCard, params: Sequence[RenderParams], open_store: StoreOpener
) -> Iterator[tuple[Chunk, pa.Table]]:
    """Yield the source's chunks with their normalised tables, in order."""
    prompts = manifest.prompts
    if isinstance(prompts, tuple):
        chunk = Chunk("prompts", {}, len(prompts), range(1, len(prompts) + 1), "row")
        yield chunk, pa.table({"prompt": pa.array(prompts, pa.string())})
        return
    assert isinstance(prompts, PromptFile)
    normaliser: Normaliser | None = None
    files = find_files(prompts.file, open_store)
    for file in files:
        columns = table_columns(prompts, file.suffix)
        if normaliser is None:
            normaliser = Normaliser(columns, card=card, params=params)
        elif columns != normaliser.columns:
            raise PromptError(f"{prompts.file}: matches .txt files and others; keep to one kind")
        names = list(dict.fromkeys(column.source for column in columns))
        for chunk in read_chunks(file, names, encoding=prompts.encoding):
            yield chunk, normaliser.table(chunk)


class _PartWriter:
    """Cuts tables into parts of exactly 65,536 rows, digests them, and hands them on.

    One part at a time is compressed and stored by the pool's thread while the next is read.
    """

    def __init__(self, sink: Sink | None, pool: Executor, *, keyed: bool):
        self._sink = sink
        self._pool = pool
        self._storing: Future[None] | None = None
        self._keyed = keyed
        self._digest = hashlib.sha256()
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._rows = 0
        self._parts = 0
        self._first: list[PromptRow] = []
        self._sizes: dict[tuple[int | None, int | None], int] = {}
        self._keys = np.zeros(0, np.uint64)

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        while self._waiting_rows >= PART_ROWS:
            whole = pa.concat_tables(self._waiting, promote_options="default")
            self._emit(whole.slice(0, PART_ROWS))
            rest = whole.slice(PART_ROWS)
            self._waiting, self._waiting_rows = [rest], rest.num_rows

    def finish(self) -> Frozen:
        if self._waiting_rows:
            self._emit(pa.concat_tables(self._waiting, promote_options="default"))
        self._waiting = []
        self._wait()
        if not self._rows:
            raise PromptError("prompts: there are none; write at least one")
        table = PromptTable(rows=self._rows, parts=self._parts, keyed=self._keyed, digest=self._digest.hexdigest())
        return Frozen(table=table, first=self._first, sizes=self._sizes)

    def doubled_keys(self) -> Hashes | None:
        """Return the hashes that came more than once, or None. Sorts in place: call it last."""
        keys = self._keys[: self._rows]
        keys.sort()
        doubled = keys[1:][keys[1:] == keys[:-1]]
        return np.unique(doubled) if len(doubled) else None

    def _emit(self, table: pa.Table) -> None:
        table = table.combine_chunks()
        if len(self._first) < _FIRST_ROWS:
            wanted = min(_FIRST_ROWS - len(self._first), table.num_rows)
            self._first += [_table_row(table, at) for at in range(wanted)]
        if self._keyed:
            if len(self._keys) < self._rows + table.num_rows:
                # Grown in place and by little, so that memory stays at 8 bytes a row; nobody else holds the array.
                self._keys.resize(self._rows + max(_KEYS_STEP, table.num_rows), refcheck=False)
            self._keys[self._rows : self._rows + table.num_rows] = column_hashes(table["key"].chunk(0))
        self._count_sizes(table)
        _digest_part(self._digest, table)
        if self._sink is not None:
            self._wait()
            self._storing = self._pool.submit(_store, self._sink, self._parts, table)
        self._rows += table.num_rows
        self._parts += 1

    def _wait(self) -> None:
        if self._storing is not None:
            self._storing.result()
        self._storing = None

    def _count_sizes(self, table: pa.Table) -> None:
        names = [name for name in (f"{OVERRIDE}width", f"{OVERRIDE}height") if name in table.column_names]
        if not names:
            self._sizes[None, None] = self._sizes.get((None, None), 0) + table.num_rows
            return
        for entry in table.select(names).group_by(names).aggregate([([], "count_all")]).to_pylist():
            size = (entry.get(f"{OVERRIDE}width"), entry.get(f"{OVERRIDE}height"))
            if size in self._sizes or len(self._sizes) < _MAX_SIZES:
                self._sizes[size] = self._sizes.get(size, 0) + entry["count_all"]


def _store(sink: Sink, number: int, table: pa.Table) -> None:
    sink(number, _parquet_bytes(table))
    del table
    pa.default_memory_pool().release_unused()


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    carried = [name for name in table.column_names if name.startswith((CARRY, OVERRIDE))]
    pq.write_table(table, sink, compression="zstd", compression_level=1, use_dictionary=carried, write_statistics=False)
    return sink.getvalue()


def _digest_part(digest: "hashlib._Hash", table: pa.Table) -> None:
    """Feed content into the digest: for each column name, type, which values are null, lengths or numbers, bytes."""
    digest.update(f"rows {table.num_rows}\n".encode())
    for name in table.column_names:
        column = table[name].chunk(0)
        digest.update(f"{name} {column.type}\n".encode())
        if pa.types.is_null(column.type):
            continue
        digest.update(np.asarray(column.is_null()).tobytes())
        if pa.types.is_string(column.type):
            column = column.fill_null("")
            start, stop = column.offset, column.offset + len(column) + 1
            offsets = np.frombuffer(column.buffers()[1], np.int32)[start:stop]
            digest.update(np.diff(offsets).tobytes())
            if offsets[0] < offsets[-1]:
                digest.update(memoryview(column.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
        elif pa.types.is_boolean(column.type):
            digest.update(np.asarray(column.fill_null(False)).tobytes())
        else:
            digest.update(np.asarray(column.fill_null(0)).tobytes())


def _table_row(table: pa.Table, at: int) -> PromptRow:
    values = {name: table[name][at].as_py() for name in table.column_names}
    overrides = {name.removeprefix(OVERRIDE): value for name, value in values.items() if name.startswith(OVERRIDE)}
    return PromptRow(
        prompt=values["prompt"],
        key=values.get("key"),
        overrides=ParamOverrides(**overrides) if overrides else _NO_OVERRIDES,
        carry={name.removeprefix(CARRY): value for name, value in values.items() if name.startswith(CARRY)},
    )


def _refuse_doubled(
    manifest: Manifest, doubled: Hashes, *, card: ModelCard, params: Sequence[RenderParams], open_store: StoreOpener
) -> None:
    """Read the source again for the keys behind equal hashes; raise PromptError when two are truly the same."""
    seen: dict[str, str] = {}
    for chunk, table in _tables(manifest, card=card, params=params, open_store=open_store):
        keys = table["key"].combine_chunks()
        for row in np.flatnonzero(np.isin(column_hashes(keys), doubled)):
            key, where = keys[int(row)].as_py(), chunk.where(int(row))
            if key in seen:
                raise PromptError(
                    f"{where}: the key {key!r} stands at {seen[key]} too; give every row a key of its own"
                )
            seen[key] = where
