"""Read prompt sources row by row: .txt, .jsonl, .csv and .parquet files, local or s3://, named or by glob.

Yields chunks of bounded size in a fixed order (files sorted by name, rows as they lie), each knowing where its rows
stand so that an error can name file and line. Knows nothing of what a column is for: it yields texts, numbers and
booleans as they are written. Every fault is a PromptError.
"""

import csv
import glob
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from farm.errors import PromptError, StoreError
from farm.storage.base import ObjectStore
from farm.yamlfile import did_you_mean, shown

CHUNK_ROWS = 65_536
csv.field_size_limit(8 * 2**20)  # csv's own, 128 KiB, is less than a line of the other formats may hold
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".csv", ".parquet")
LINE_COLUMN = "line"
"""The one column of a .txt file."""

_RowReader = Callable[[str, Iterable[str], Sequence[str]], Iterator[tuple[int, tuple[Any, ...]]]]

StoreOpener = Callable[[str], ObjectStore]
"""From `s3://bucket` to its store."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source: `name` as messages show it, and how to open it for reading bytes."""

    name: str
    suffix: str
    open: Callable[[], IO[bytes]]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of one file. `lines` are their lines in a text file; in Parquet rows count from 1, at `first_row`."""

    file: str
    columns: dict[str, pa.Array | list[Any]]
    rows: int
    lines: Sequence[int]
    unit: str

    def where(self, row: int) -> str:
        """Return `file:line`, or `file: row N`, of a row of this chunk."""
        return f"{self.file}:{self.lines[row]}" if self.unit == "line" else f"{self.file}: row {self.lines[row]}"


def find_files(pattern: str, open_store: StoreOpener) -> list[SourceFile]:
    """Return the files that a path, glob or s3:// URL names, sorted. Raises PromptError when there are none."""
    try:
        files = _in_store(pattern, open_store) if pattern.startswith("s3://") else _on_disk(pattern)
    except OSError as exc:
        raise PromptError(
            f"{pattern}: cannot be read: {exc.strerror or exc}; check the path and its permissions"
        ) from exc
    if not files:
        raise PromptError(f"{pattern}: no file matches; check the path")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise PromptError(
                f"{file.name}: files of prompts are {', '.join(SUFFIXES)}; convert it, or narrow the path"
            )
    return files


def read_chunks(file: SourceFile, columns: Sequence[str], *, encoding: str = "utf-8") -> Iterator[Chunk]:
    """Yield a file's rows with just these columns. Raises PromptError with file and row."""
    try:
        with file.open() as stream:
            if stream.read(1) == b"":
                raise PromptError(f"{file.name}: the file is empty; put prompts into it, or take it away")
            stream.seek(0)
            if file.suffix == ".parquet":
                yield from _parquet(file, stream, columns)
            else:
                yield from _text(file, stream, columns, encoding)
    except (pa.ArrowException, OSError) as exc:
        if file.suffix == ".parquet" and not getattr(exc, "errno", None):
            raise PromptError(f"{file.name}: cannot be read as Parquet: {_one_line(exc)}; write the file anew") from exc
        if not isinstance(exc, OSError):
            raise
        raise PromptError(f"{file.name}: cannot be read: {exc.strerror or exc}; check the file") from exc
    except StoreError as exc:
        raise PromptError(f"{file.name}: cannot be read: {exc.message}") from exc


def read_object(url: str, *, open_store: StoreOpener, most_bytes: int) -> bytes:
    """Return the object that an s3:// URL names. Raises PromptError where there is none, or it is larger than that."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise PromptError(f"{url}: names no object; write s3://bucket/path/file.yaml")
    try:
        store = open_store(f"s3://{bucket}")
        info = store.head(key)
        if info is None:
            raise PromptError(f"{url}: no such object; check the address")
        if info.size_bytes > most_bytes:
            raise PromptError(f"{url}: larger than {most_bytes // 2**20} MiB; cut it into several")
        return store.get(key)
    except StoreError as exc:
        raise PromptError(f"{url}: cannot be read: {exc.message}") from exc


def missing_column(file: str, column: str, present: Sequence[str]) -> NoReturn:
    """Raise the PromptError for a column that a file lacks."""
    near = did_you_mean(column, present)
    listed = ", ".join(present[:20]) + (", ..." if len(present) > 20 else "")
    raise PromptError(f"{file}: no column `{column}`{near or ';'} it has: {listed or 'none'}")


def _on_disk(pattern: str) -> list[SourceFile]:
    if "://" in pattern:
        raise PromptError(f"{pattern}: prompts are read from files and s3:// alone; download it, and name the file")
    path = Path(pattern)
    if path.is_dir():
        raise PromptError(
            f"{pattern}: this is a folder; name a file in it, or a glob such as {pattern.rstrip('/')}/*.parquet"
        )
    if path.is_file() or not glob.has_magic(pattern):
        paths = [path]
    else:
        paths = sorted(Path(found) for found in glob.glob(pattern, recursive=True) if Path(found).is_file())
    if paths == [path] and not path.exists():
        raise PromptError(f"{pattern}: no such file; check the path (it is relative to the manifest's folder)")
    for path in paths:
        if not path.is_file():
            raise PromptError(
                f"{path}: is a pipe or a device, and prompts are read more than once; save them to a file"
            )
    return [SourceFile(str(path), path.suffix.lower(), partial(_open, path)) for path in paths]


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _in_store(pattern: str, open_store: StoreOpener) -> list[SourceFile]:
    bucket, _, key_pattern = pattern.removeprefix("s3://").partition("/")
    if not bucket or not key_pattern:
        raise PromptError(f"{pattern}: names no object; write s3://bucket/path/*.parquet")
    store = open_store(f"s3://{bucket}")
    try:
        if glob.has_magic(key_pattern):
            fixed = re.split(r"[*?\[]", key_pattern, maxsplit=1)[0]
            matches = re.compile(_glob_regex(key_pattern)).fullmatch
            keys = sorted(info.key for info in store.list(fixed) if matches(info.key))
        else:
            keys = [key_pattern] if store.head(key_pattern) else []
    except StoreError as exc:
        raise PromptError(f"{pattern}: cannot be listed: {exc.message}") from exc
    return [
        SourceFile(f"s3://{bucket}/{key}", PurePosixPath(key).suffix.lower(), partial(_download, store, key))
        for key in keys
    ]


def _download(store: ObjectStore, key: str) -> IO[bytes]:
    return io.BytesIO(store.get(key))


def _glob_regex(pattern: str) -> str:
    """Translate a glob: `*` and `?` stay within a folder, `**/` spans any number of them."""
    result: list[str] = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if token in ("**/", "**"):
            result.append("(?:.*/)?" if token == "**/" else ".*")
        elif token in ("*", "?"):
            result.append("[^/]*" if token == "*" else "[^/]")
        elif len(token) > 2 and token[0] == "[":
            inner = token[1:-1].replace("\\", r"\\")
            result.append(f"[^{inner[1:]}]" if inner[0] == "!" else f"[{inner}]")
        else:
            result.append(re.escape(token))
    return "".join(result)


def _parquet(file: SourceFile, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Chunk]:
    parquet = pq.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
    names = parquet.schema_arrow.names
    for column in columns:
        if column not in names:
            missing_column(file.name, column, names)
    if len(set(names)) < len(names):
        doubled = next(name for name in names if names.count(name) > 1)
        raise PromptError(f"{file.name}: two columns are called `{doubled}`; rename one")
    row = 0
    for batch in parquet.iter_batches(batch_size=CHUNK_ROWS, columns=list(columns), use_threads=False):
        arrays = {column: batch.column(column) for column in columns}
        yield Chunk(file.name, arrays, batch.num_rows, range(row + 1, row + batch.num_rows + 1), "row")
        row += batch.num_rows


def _text(file: SourceFile, stream: IO[bytes], columns: Sequence[str], encoding: str) -> Iterator[Chunk]:
    utf8 = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    head = stream.read(8192)
    stream.seek(0)
    if b"\0" in head and "16" not in encoding and "32" not in encoding:
        raise PromptError(f"{file.name}: binary data, not text; name a file of text, or set prompts.encoding")
    readers: dict[str, _RowReader] = {".txt": _txt_rows, ".csv": _csv_rows}
    reader = readers.get(file.suffix, _jsonl_rows)
    newline = "" if file.suffix == ".csv" else None
    text = io.TextIOWrapper(stream, encoding="utf-8-sig" if utf8 else encoding, newline=newline)
    values: list[tuple[Any, ...]] = []
    lines: list[int] = []

    def chunk() -> Chunk:
        by_column = zip(*values, strict=True)
        return Chunk(file.name, dict(zip(columns, map(list, by_column), strict=True)), len(values), list(lines), "line")

    try:
        for line, row in reader(file.name, text, columns):
            values.append(row)
            lines.append(line)
            if len(values) == CHUNK_ROWS:
                yield chunk()
                values, lines = [], []
    except UnicodeDecodeError as exc:
        where = f"{file.name}:{_undecodable_line(file, encoding)}" if utf8 else file.name
        raise PromptError(
            f"{where}: not {encoding.upper()}: {exc.reason}; save it so, or set prompts.encoding"
        ) from exc
    finally:
        text.detach()  # or it would close the stream that the caller closes
    if values:
        yield chunk()


def _undecodable_line(file: SourceFile, encoding: str) -> int:
    with file.open() as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 1


def _txt_rows(name: str, text: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, tuple[str]]]:
    for number, line in enumerate(text, 1):
        if line := line.strip():
            yield number, (line,)


def _csv_rows(name: str, text: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    reader = csv.reader(text, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        for column in columns:
            if column not in header:
                _refuse_other_separator(name, header)
                missing_column(name, column, header)
            if header.count(column) > 1:
                raise PromptError(f"{name}:1: two columns are called `{column}`; rename one")
        places = [header.index(column) for column in columns]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise PromptError(
                    f"{name}:{reader.line_num}: {len(row)} cells where the header has {len(header)}; "
                    "put quotes around a cell with commas in it"
                )
            yield reader.line_num, tuple(row[place] for place in places)
    except csv.Error as exc:
        raise PromptError(f"{name}:{reader.line_num}: not CSV: {exc}; mend the line") from exc


def _refuse_other_separator(name: str, header: Sequence[str]) -> None:
    if len(header) == 1:
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if mark in header[0]:
                raise PromptError(f"{name}:1: the columns are divided by {word}; save the file with commas")


def _jsonl_rows(name: str, text: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as exc:
            raise PromptError(f"{name}:{number}: not JSON: {_one_line(exc)}; write one object a line") from exc
        if not isinstance(record, dict):
            raise PromptError(
                f"{name}:{number}: must be an object {{...}}, got {shown(record)}; write one object a line"
            )
        try:
            yield number, tuple([record[column] for column in columns])
        except KeyError as exc:
            missing_column(f"{name}:{number}", str(exc.args[0]), list(record))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())
