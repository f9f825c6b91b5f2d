"""Two sets of pictures side by side: jobs, folders or single files, paired, and how far each pair is apart.

Pictures of two keyed jobs pair by key, of other jobs by index, of folders by name; one picture pairs with one, whatever
their names. Pixels are compared as uint8, with their alpha, after the loss of a lossy format; what has more than 8 bits a
channel is not compared. Reads only; a pair is loaded, compared and let go of.
"""

import io
import json
import re
import statistics
import struct
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from farm.comparison import model_differences, plan_differences
from farm.errors import InputError, ObjectMissingError, PictureError, RecordError, UnknownJobError
from farm.ledger import Ledger
from farm.plan import Plan
from farm.provenance import Provenance, read_picture
from farm.receipt import ImageRow

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MOST_ROWS = 100_000
"""Of one job, so many pictures are looked at at most: the first ones."""
PARAMS = ("prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed")
MOST_CHANGES = 50
_BENCH = "bench.json"
_NAME_SHOWN = 100
_DRAWN_BESIDE = ("sheet", "pairs", "acceleration")
"""Pictures of pictures, which lie in folders of the farm's beside them."""
_EXACT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})
"""Pillow's modes that become RGB, with alpha or without, at 8 bits a channel and without any loss."""
_RUN = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture of a side, not loaded yet. `params`: what it was made from, as far as it is known."""

    label: str
    params: Mapping[str, Any]
    seconds: float | None
    load: Callable[[], np.ndarray | None]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two. `seconds`: of an image, the median; `peak_gib`: the most held, which of a job nobody measured: it is that
    of the newest benchmark of its model on its device."""

    name: str
    kind: str
    pictures: Mapping[str, Shown]
    seconds: float | None = None
    gpu_seconds: float | None = None
    peak_gib: float | None = None
    devices: tuple[str, ...] = ()
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two pictures are apart, in levels of 255: the mean and the most of a channel. PSNR in dB, None where equal."""

    mean_absolute: float
    most: int
    psnr_db: float | None
    differing: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures of one label. `difference` is None where they could not be compared: `note` says why."""

    label: str
    a: Shown
    b: Shown
    difference: Difference | None
    note: str = ""


@dataclass(slots=True)
class SideBySide:
    """What a comparison found. `paired`: how many pairs there are, `pairs`: those looked at; `only_a`, `only_b`: without one."""

    a: Side
    b: Side
    paired: int
    only_a: int
    only_b: int
    changes: tuple[str, ...] = ()
    pairs: list[Pair] = field(default_factory=list)

    def compared(self) -> list[Difference]:
        """The differences of the pairs that could be compared."""
        return [pair.difference for pair in self.pairs if pair.difference is not None]

    def record(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        found = self.compared()
        apart = [one.psnr_db for one in found if one.psnr_db is not None]
        return {
            "a": _side_record(self.a),
            "b": _side_record(self.b),
            "paired": self.paired,
            "compared": len(found),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "changes": list(self.changes),
            "identical": sum(one.psnr_db is None for one in found),
            "mean_absolute": statistics.fmean(one.mean_absolute for one in found) if found else None,
            "psnr_db": statistics.median(apart) if apart else None,
            "pairs": [
                {
                    "label": pair.label,
                    "mean_absolute": pair.difference.mean_absolute if pair.difference else None,
                    "most": pair.difference.most if pair.difference else None,
                    "psnr_db": pair.difference.psnr_db if pair.difference else None,
                    "differing": pair.difference.differing if pair.difference else None,
                    "seconds": [pair.a.seconds, pair.b.seconds],
                    "note": pair.note,
                }
                for pair in self.pairs
            ],
        }


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Compare two pictures of one shape, height x width x 3, or 4 with alpha, uint8.

    PSNR is 10 log10(255² / mean squared difference).
    """
    apart = np.abs(a.astype(np.int16) - b.astype(np.int16))
    squared = float((apart.astype(np.float64) ** 2).mean())
    return Difference(
        mean_absolute=float(apart.mean()),
        most=int(apart.max()),
        psnr_db=float(10 * np.log10(255.0**2 / squared)) if squared else None,
        differing=float((apart.max(axis=2) > 0).mean()),
    )


def amplified(a: np.ndarray, b: np.ndarray, *, times: int) -> np.ndarray:
    """Return the absolute difference of two pictures so many times as strong, uint8; alpha's brightens all three colours."""
    apart = np.abs(a.astype(np.int16) - b.astype(np.int16)) * times
    if apart.shape[2] == 4:
        apart = np.maximum(apart[..., :3], apart[..., 3:])
    return apart.clip(0, 255).astype(np.uint8)


def side_by_side(a: Side, b: Side, *, most: int) -> tuple[SideBySide, Iterator[tuple[Pair, np.ndarray, np.ndarray]]]:
    """Pair two sides; the second value yields each pair with its pixels, at most so many, spread evenly, and fills the first.

    A missing picture comes as an empty array. Raises InputError where nothing is in both.
    """
    keys = _partners(a, b)
    if not keys:
        raise InputError(
            f"{a.name} and {b.name} have no picture in common: {len(a.pictures)} and {len(b.pictures)} pictures, of other "
            "keys, indexes or names; compare what was drawn from the same prompts"
        )
    found = SideBySide(a, b, len(keys), len(a.pictures) - len(keys), len(b.pictures) - len(keys))
    chosen = keys if len(keys) <= most else [keys[place * len(keys) // most] for place in range(most)]
    found.changes = _changes(a, b, [(a.pictures[one], b.pictures[other]) for one, other in keys])
    return found, _compare(found, chosen)


def _compare(found: SideBySide, chosen: Sequence[tuple[str, str]]) -> Iterator[tuple[Pair, np.ndarray, np.ndarray]]:
    nothing = np.empty((0, 0, 3), dtype=np.uint8)
    for one, other in chosen:
        first, second = found.a.pictures[one], found.b.pictures[other]
        (left, fault), (right, other_fault) = _loaded(first), _loaded(second)
        apart, note = None, "; ".join(dict.fromkeys(said for said in (fault, other_fault) if said))
        if left is None or right is None:
            lacking = [side.name for side, pixels in ((found.a, left), (found.b, right)) if pixels is None]
            note = note or f"no picture in {' and '.join(lacking)}"
        elif left.shape[:2] != right.shape[:2]:
            sizes = [f"{pixels.shape[1]}x{pixels.shape[0]}" for pixels in (left, right)]
            note = f"{sizes[0]} and {sizes[1]}: only pictures of one size are compared"
        else:
            left, right = _evened(left, right)
            apart = difference(left, right)
        pair = Pair(first.label, first, second, apart, note)
        found.pairs.append(pair)
        yield pair, nothing if left is None else left, nothing if right is None else right


def _loaded(shown: Shown) -> tuple[np.ndarray | None, str]:
    """A picture's pixels, or why there are none to compare."""
    try:
        return shown.load(), ""
    except PictureError as exc:
        return None, exc.message


def _evened(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures with as many channels each: one without alpha is opaque where the other has it."""
    if a.shape[2] == b.shape[2]:
        return a, b
    opaque = [
        one if one.shape[2] == 4 else np.dstack((one, np.full(one.shape[:2], 255, dtype=np.uint8))) for one in (a, b)
    ]
    return opaque[0], opaque[1]


def open_side(name: str, ledger: Callable[[], Ledger]) -> Side:
    """Read what a name stands for: a picture, a folder of pictures, a job, or one run of a job as JOB/RUN.

    A path that is there goes before a job. Raises InputError, UnknownJobError, PictureError, RecordError.
    """
    path = Path(name)
    if not name.strip():
        raise InputError(
            "an empty name stands for nothing; name a picture, a folder of pictures, or a job of the store"
        )
    try:
        if path.is_file():
            _check_picture(path)
            return Side(name, "picture", {"": _of_file(path, path.name)})
        if path.is_dir():
            return _folder(path, name)
    except OSError as exc:
        short = name if len(name) <= _NAME_SHOWN else f"{name[:_NAME_SHOWN]}…"
        raise InputError(f"{short}: cannot be read: {exc.strerror}; name pictures, or a job of the store") from exc
    job, _, run = name.rpartition("/")
    if not job or not _RUN.fullmatch(run):
        job, run = name, ""
    if "/" in job or Path(job).suffix.lower() in SUFFIXES:
        raise InputError(f"{name}: there is no such file or folder; name pictures, or a job of the store")
    return _job(ledger(), job, run)


def _folder(path: Path, name: str) -> Side:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.suffix.lower() in SUFFIXES and file.stem not in _DRAWN_BESIDE
    )
    if not files:
        raise InputError(f"{name}: holds no PNG, JPEG or WebP picture; name another folder")
    keys = [file.relative_to(path) for file in files]
    stems = Counter(key.with_suffix("") for key in keys)
    pictures = {}
    for file, key in zip(files, keys, strict=True):
        stem = key.with_suffix("")
        pictures[key.as_posix()] = _of_file(file, (stem if stems[stem] == 1 else key).as_posix())
    bench = path / _BENCH
    if not bench.is_file():
        return Side(name, "folder", pictures)
    try:
        said = json.loads(bench.read_text(encoding="utf-8"))
        return Side(
            name,
            "benchmark",
            pictures,
            seconds=float(said["warm"]["whole picture"]["median"]),
            peak_gib=max(float(gib) for gib in said["memory"]["peak_gib"].values()),
            devices=(str(said["device"]),),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise PictureError(f"{bench}: is no record of farm bench; run it again, or take the file away") from exc


def _of_file(file: Path, label: str) -> Shown:
    return Shown(label, _params_of_file(file), None, partial(_pixels, file, str(file)))


def _params_of_file(file: Path) -> Mapping[str, Any]:
    try:
        return _params(read_picture(file).provenance)
    except (PictureError, RecordError):  # anybody's picture may be compared
        return {}


def _params(provenance: Provenance) -> dict[str, Any]:
    return {**provenance.params.model_dump(), "prompt": provenance.prompt, "seed": provenance.seed} | {
        "model": provenance.model,
        "dtype": provenance.numerics.dtype,
        "device": provenance.numerics.device,
    }


def _check_picture(path: Path) -> None:
    """Raise PictureError where a file that somebody named cannot be read as a picture; what its pixels are is another matter."""
    with _reading(str(path)), Image.open(path) as image:
        image.load()


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as exc:
        raise PictureError(f"{where}: cannot be read as a picture: {exc}; leave it out") from exc


def _pixels(source: Path | bytes, where: str) -> np.ndarray:
    """Height x width x 3, or 4 where anything is not opaque. Raises PictureError for pixels that 8 bits would not hold."""
    with _reading(where), Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        deep = any(";16" in str(tile[3]) for tile in image.tile)  # Pillow drops the lower half of these unasked
        mode = image.mode
        pixels = None
        if not deep and mode in _EXACT_MODES:
            pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    if pixels is None:
        kind = "has 16 bits a channel" if deep else f"has pixels of mode {mode}"
        raise PictureError(f"{where}: {kind}; only grey and RGB of 8 bits a channel are compared: convert both")
    if pixels.shape[2] == 4 and pixels[..., 3].min() == 255:
        pixels = pixels[..., :3]
    return pixels


def _job(ledger: Ledger, job: str, run: str) -> Side:
    plan = ledger.plan(job)
    plans = [one for one in ledger.plans(job) if run in ("", one.run)]
    if not plans:
        raise UnknownJobError(f"job {job} has no run {run}; its newest is {plan.run}")
    keyed = all(one.prompts.keyed for one in plans)
    pictures: dict[str, Shown] = {}
    seconds, devices = list[float](), set[str]()
    counts: Counter[str] = Counter()
    for number, one in enumerate(plans):
        for row in islice(ledger.rows(one), MOST_ROWS):
            label = row.key if keyed and row.key is not None else str(row.index)
            place = f"{counts[label]}" if keyed else f"{number}"
            counts[label] += 1
            pictures[f"{label}\0{place}"] = Shown(
                label,
                {name: getattr(row, name) for name in PARAMS},
                row.seconds if row.status == "ok" else None,
                partial(_of_row, ledger, row),
            )
            if row.status == "ok":
                seconds.append(row.seconds)
                devices.add(row.device)
    if not pictures:
        raise InputError(f"job {job} has no picture yet; farm render draws them")
    totals = [found for one in plans if (found := ledger.totals(one)) is not None]
    card, numerics = plans[-1].card, plans[-1].numerics
    stages = [
        profile.stages
        for profile in ledger.profiles(card.name, card.accelerated_on(numerics.device))
        if profile.stages is not None and profile.device in devices
    ]
    return Side(
        f"{job}/{run}" if run else job,
        "job",
        pictures,
        seconds=statistics.median(seconds) if seconds else None,
        gpu_seconds=sum(one.gpu_seconds for one in totals) if len(totals) == len(plans) else None,
        peak_gib=max((gib for one in stages for gib in one.peak_gib.values()), default=None),
        devices=tuple(sorted(devices)),
        plan=plans[-1],
    )


def _of_row(ledger: Ledger, row: ImageRow) -> np.ndarray | None:
    if row.object is None:
        return None
    try:
        return _pixels(ledger.store.get(row.object), row.object)
    except ObjectMissingError:
        return None


def _partners(a: Side, b: Side) -> list[tuple[str, str]]:
    """Keys of the pictures that belong together, in the order of `a`."""
    if len(a.pictures) == 1 == len(b.pictures):
        return [(next(iter(a.pictures)), next(iter(b.pictures)))]
    if a.plan is not None and b.plan is not None and a.plan.prompts.keyed == b.plan.prompts.keyed:
        return [(key, key) for key in a.pictures if key in b.pictures]
    if a.plan is not None or b.plan is not None:
        return []
    stems = _stems(b.pictures, without=a.pictures)
    found = {key: key for key in a.pictures if key in b.pictures}
    found |= {key: stems[stem] for stem, key in _stems(a.pictures, without=b.pictures).items() if stem in stems}
    return [(key, found[key]) for key in a.pictures if key in found]


def _stems(keys: Iterable[str], *, without: Container[str]) -> dict[str, str]:
    """File names by their stems, where only one of those that the other side lacks has it."""
    rest = [(str(Path(key).with_suffix("")), key) for key in keys if key and key not in without]
    counts = Counter(stem for stem, _ in rest)
    return {stem: key for stem, key in rest if counts[stem] == 1}


def _changes(a: Side, b: Side, pairs: Sequence[tuple[Shown, Shown]]) -> tuple[str, ...]:
    """What differs, as `num_inference_steps: 20 -> 60`, with the number of pairs where it is not all of them."""
    whole = plan_differences(a.plan, b.plan) if a.plan is not None and b.plan is not None else ()
    counted: Counter[str] = Counter()
    for one, other in pairs:
        for name, then in one.params.items():
            if name not in other.params or (now := other.params[name]) == then:
                continue
            if name == "model":
                counted.update(model_differences(then, now))
            elif name in ("prompt", "negative_prompt") or (name == "seed" and len(pairs) > 1):
                counted[f"{name}: differs"] += 1
            else:
                counted[f"{name}: {_said(then)} -> {_said(now)}"] += 1
    named = counted.most_common(MOST_CHANGES)
    found = [said if count == len(pairs) else f"{said} ({count:,} of {len(pairs):,} pairs)" for said, count in named]
    more = [f"and {len(counted) - len(named):,} other differences"] if len(counted) > len(named) else []
    return (*whole, *found, *more)


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:_NAME_SHOWN]


def _side_record(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "kind": side.kind,
        "pictures": len(side.pictures),
        "seconds_per_image": side.seconds,
        "gpu_seconds": side.gpu_seconds,
        "peak_gib": side.peak_gib,
        "devices": list(side.devices),
    }
