"""Copy a job's pictures and dataset into a folder that Hugging Face `datasets` reads as an ImageFolder.

    to/train/metadata.jsonl               a line a picture: file_name, text, and what it was made from
    to/train/images/0001/000000/<name>    0001 is the job's first run; at most 1,000 pictures a folder
    to/dataset/0001/part-00000.parquet    the dataset with the failed images too
    to/.farm-pull.json                    says which job the folder belongs to

`datasets` guesses splits from names, and formats from counts of files. A folder `train` settles both: whatever the
pictures are called they are one split, and the Parquet beside it is not taken for the data.

Every file appears whole or not at all, and one that is there and right is left alone: an interrupted pull goes on where
it stopped. Nothing that this module did not write is ever written over.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from farm.errors import InputError, ObjectMissingError, StoreDeniedError, StoreFullError, VerifyError
from farm.export import dataset_prefix
from farm.ledger import Ledger
from farm.plan import Plan
from farm.prefetch import in_order
from farm.receipt import ImageRow

MARKER = ".farm-pull.json"
SPLIT = "train"
OURS = (SPLIT, "dataset")
READ_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(slots=True)
class Pulled:
    """What a pull did so far. `kept`: pictures that were there already."""

    pictures: int = 0
    kept: int = 0
    failed: int = 0
    size_bytes: int = 0


def pull(
    ledger: Ledger,
    plans: Sequence[Plan],
    to: Path,
    *,
    threads: int = 8,
    progress: Callable[[Pulled], None] = lambda pulled: None,
) -> Pulled:
    """Copy the runs of one job, oldest first, into `to`.

    Raises InputError where the folder holds another job or somebody's own files, VerifyError where an object is not
    what its row says, StoreFullError where the disk is full.
    """
    _claim(ledger, plans[0].job, to)
    pulled = Pulled()
    with _translated(to), _replacing(to / SPLIT / "metadata.jsonl") as lines:
        for number, plan in enumerate(plans, start=1):
            fetched = in_order(lambda row: _fetch(ledger, row, to, number), ledger.rows(plan), threads=threads)  # noqa: B023
            for one in fetched:
                if one.file_name is None:
                    pulled.failed += 1
                    continue
                pulled.pictures += 1
                pulled.kept += one.kept
                pulled.size_bytes += one.row.size_bytes or 0
                lines.write(json.dumps(_metadata(one.row, one.file_name), ensure_ascii=False, allow_nan=False) + "\n")
                progress(pulled)
            _fetch_dataset(ledger, plan, to / "dataset" / f"{number:04d}")
    return pulled


@dataclass(frozen=True, slots=True)
class _Fetched:
    row: ImageRow
    file_name: str | None
    kept: bool = False


def _fetch(ledger: Ledger, row: ImageRow, to: Path, number: int) -> _Fetched:
    if row.object is None:
        return _Fetched(row, None)
    *_, folder, name = row.object.split("/")
    file_name = f"images/{number:04d}/{folder}/{name}"
    path = to / SPLIT / file_name
    if path.exists():
        if _is(path, row):
            return _Fetched(row, file_name, kept=True)
        raise InputError(
            f"{path} is not the picture that job's row {row.index} describes, and farm pull does not write over it; "
            "move it away, or pull into another folder"
        )
    try:
        data = ledger.store.get(row.object)
    except ObjectMissingError as exc:
        raise VerifyError(f"image {row.index}: {row.object} is not there; farm verify lists what is missing") from exc
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise VerifyError(f"image {row.index}: {row.object} is not what its row says; farm verify lists what differs")
    _write(path, data)
    return _Fetched(row, file_name)


def _is(path: Path, row: ImageRow) -> bool:
    if not path.is_file() or path.stat().st_size != row.size_bytes:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest() == row.sha256


def _fetch_dataset(ledger: Ledger, plan: Plan, folder: Path) -> None:
    names = set()
    for info in ledger.store.list(dataset_prefix(plan)):
        name = info.key.rpartition("/")[2]
        names.add(name)
        _write(folder / name, ledger.store.get(info.key))
    for path in folder.glob("part-*.parquet"):
        if path.name not in names:
            path.unlink()


def _metadata(row: ImageRow, file_name: str) -> dict[str, Any]:
    """A line of metadata.jsonl. Carried columns come after ours; one with the name of one of ours is renamed."""
    line = {
        "file_name": file_name,
        "text": row.prompt,
        "index": row.index,
        "key": row.key,
        "negative_prompt": row.negative_prompt,
        "width": row.width,
        "height": row.height,
        "num_inference_steps": row.num_inference_steps,
        "guidance_scale": row.guidance_scale,
        "seed": row.seed,
        "sha256": row.sha256,
        "phash": row.phash,
        "flag": row.flag,
    }
    # JSON has no NaN and no infinity; the dataset beside it keeps them.
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.carry.items()
    }
    carried = {f"carried_{name}" if name in line else name: value for name, value in values.items()}
    return line | carried


def _claim(ledger: Ledger, job: str, to: Path) -> None:
    """Make the folder ours, or find that it is; refuse one with another job or with files that are not ours."""
    mine = {"job": job, "store": ledger.store.url}
    marker = to / MARKER
    with _translated(to):
        if to.exists() and not to.is_dir():
            raise InputError(f"{to} is a file; name a folder")
        if marker.exists():
            try:
                found = json.loads(marker.read_text())
            except ValueError:
                found = {}
            if found != mine:
                raise InputError(
                    f"{to} holds job {found.get('job')!r} of {found.get('store')!r}, not {job!r} of "
                    f"{ledger.store.url!r}; pull into another folder"
                )
            return
        foreign = [name for name in OURS if (to / name).exists()]
        if foreign:
            raise InputError(f"{to} has {', '.join(foreign)} that farm pull did not write; pull into another folder")
        _write(marker, json.dumps(mine).encode())


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with _translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Open a text file that takes the place of `path` when the block ends well, and goes away otherwise."""
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise StoreFullError(
                f"the disk of {path} is full; free some space and run the same command again: it goes on from there"
            ) from exc
        raise StoreDeniedError(
            f"{exc.filename or path} cannot be written: {exc.strerror}; pull into another folder"
        ) from exc
