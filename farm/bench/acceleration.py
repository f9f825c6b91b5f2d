"""What accelerating a card is worth on this device: the same benchmark of each way, beside the card as it is.

Ways are measured one after another, each with a model loaded anew, and draw the same pictures; the card as it is comes first and
again last, since a machine that others use drifts, and gains are against the mean of both. Beside a gain in time stands how far
pictures are from the card's own, since no acceleration leaves all bytes alone: whether it pays is told by both.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from farm.bench.figures import Drawn, Measured, Part, spread_of
from farm.bench.model import Wish, measure
from farm.cardparts import PLAIN, Acceleration
from farm.engine import Engine, Picture
from farm.errors import FarmError, InputError
from farm.modelcard import ModelCard
from farm.pairs import difference
from farm.plan import Numerics
from farm.yamlfile import did_you_mean, shown

FLAG = "--accelerate"
AGAIN = "as it is, again"
HOW = "compile, attention=KERNEL or first_block_cache=SHARE, with commas between several, or none"
OpenEngine = Callable[[ModelCard, Numerics], Engine]


@dataclass(slots=True)
class Kept:
    """The pixels of a benchmark's last round, as `measure` hands them out."""

    pixels: list[np.ndarray] = field(default_factory=list)

    def keep(self, part: Part, picture: Picture) -> None:
        """Keep a picture of the last round."""
        if part == "round":
            self.pixels.append(picture.pixels)


@dataclass(frozen=True, slots=True)
class Way:
    """The card accelerated otherwise, or once more as it is, and what came of it. `failed`: why it could not be measured.

    `picture_gain`, `job_gain`: how many times as long the card as it is takes, for a picture by itself and for an image of a job.
    `pixels`: of the last round. `psnr_db`: of each against the card's own, None where they are equal.
    """

    name: str
    card: ModelCard
    numerics: Numerics
    measured: Measured | None = None
    picture_gain: float | None = None
    job_gain: float | None = None
    pixels: Sequence[np.ndarray] = ()
    psnr_db: tuple[float | None, ...] = ()
    failed: str | None = None

    @property
    def equal(self) -> int:
        """How many pictures are the same bytes."""
        return self.psnr_db.count(None)

    @property
    def median_db(self) -> float | None:
        """PSNR of the median picture; None where it is the same."""
        median = statistics.median(float("inf") if one is None else one for one in self.psnr_db)
        return None if median == float("inf") else median

    def record(self) -> dict[str, Any]:
        """Return its figures as JSON values."""
        measured = self.measured
        return {
            "name": self.name,
            "acceleration": self.card.accelerated_on(self.numerics.device).model_dump(exclude_defaults=True),
            "batch": self.numerics.batch,
            "load_s": measured and measured.cold.load_s,
            "seconds_a_picture": measured and picture_s(measured),
            "seconds_per_image": measured and measured.job.seconds_per_image,
            "peak_gib": measured and max(measured.peak_gib.values()),
            "picture_gain": self.picture_gain,
            "job_gain": self.job_gain,
            "psnr_db": list(self.psnr_db),
            "failed": self.failed,
        }


def accelerated(card: ModelCard, text: str, *, device: Literal["cuda", "cpu"]) -> ModelCard:
    """Return the card accelerated as `compile,attention=flash` says, or `none`. Raises InputError for what it cannot be.

    What leaves out blocks draws one picture at a time, whatever the card's batch.
    """
    given: dict[str, str | bool] = {}
    names = tuple(Acceleration.model_fields)
    for one in text.split(",") if text.strip() != str(PLAIN) else ():
        name, equals, value = (word.strip() for word in one.partition("="))
        if name not in names:
            near = did_you_mean(name, (*names, str(PLAIN))) or f"; write {HOW}"
            raise InputError(f"{FLAG} {shown(text)}: {shown(name)} is no way to accelerate{near}")
        given[name] = value if equals or name != "compile" else True
    try:
        how = Acceleration.model_validate(given)
        batch = {**card.batch, device: 1} if how.first_block_cache is not None else card.batch
        return ModelCard.model_validate(
            {**card.model_dump(), "batch": batch, "acceleration": {**card.acceleration, device: how}}
        )
    except ValidationError as exc:
        first = exc.errors()[0]
        at = [str(place) for place in (*first["loc"], *first.get("ctx", {}).get("at", ())) if place in names]
        raise InputError(f"{FLAG} {shown(text)}: {': '.join([*at[-1:], first['msg']])}; write {HOW}") from exc


def measure_ways(
    ways: Sequence[tuple[ModelCard, Numerics]],
    wish: Wish,
    *,
    as_it_is: tuple[ModelCard, Numerics],
    base: Measured,
    own: Sequence[np.ndarray],
    open_engine: OpenEngine,
    say: Callable[[str], None],
) -> list[Way]:
    """Measure each way as `base` was measured, without its sweeps, and last the card as it is once more.

    `own`: the pixels of the last round of `base`.
    """
    found = []
    named = [(str(card.accelerated_on(numerics.device)), card, numerics) for card, numerics in ways]
    for name, card, numerics in (*named, (AGAIN, *as_it_is)):
        say(f"acceleration: {name}")
        engine, kept = open_engine(card, numerics), Kept()
        try:
            measured = measure(
                engine,
                replace(wish, batch=numerics.batch, steps=(), sizes=(), batches=()),
                start_s=0.0,
                keep=kept.keep,
            )
            apart = tuple(difference(mine, theirs).psnr_db for mine, theirs in zip(own, kept.pixels, strict=True))
            found.append(Way(name, card, numerics, measured, pixels=kept.pixels, psnr_db=apart))
        except FarmError as exc:
            found.append(Way(name, card, numerics, failed=exc.message))
        finally:
            engine.unload()
    both = [base, *(way.measured for way in found[-1:] if way.measured)]
    picture = statistics.fmean(picture_s(one) for one in both)
    job = statistics.fmean(one.job.seconds_per_image for one in both)
    return [
        replace(
            way,
            picture_gain=picture / picture_s(way.measured),
            job_gain=job / way.measured.job.seconds_per_image,
        )
        if way.measured
        else way
        for way in found
    ]


def picture_s(measured: Measured) -> float:
    """Seconds of a picture by itself, once warm: the median."""
    warm: list[Drawn] = measured.warm()
    return spread_of([one.seconds for one in warm]).median
