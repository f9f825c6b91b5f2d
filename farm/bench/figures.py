"""What a benchmark of a model comes to: seconds by stage, memory by phase, medians and intervals. Pure."""

import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

GIB = 2**30

Phase = Literal["load", "encode", "denoise", "decode"]
PHASES: tuple[Phase, ...] = ("load", "encode", "denoise", "decode")
Part = Literal["cold", "round", "job", "steps", "size", "batch"]


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes held at a moment, in seconds since the benchmark began."""

    at_s: float
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Span:
    """When one phase went on."""

    phase: Phase
    began_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """One batch that was drawn: of which part of the benchmark, of what shape, and how long each stage took.

    `number`: the round, counted from 1; 0 outside the rounds. `prompts`: how many were encoded within it.
    """

    part: Part
    number: int
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    images: int
    prompts: int
    began_s: float
    encode_s: float
    denoise_s: float
    decode_s: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole batch."""
        return self.encode_s + self.denoise_s + self.decode_s

    @property
    def step_s(self) -> float:
        """Seconds of one step, of one image's share."""
        return self.denoise_s / self.num_inference_steps / self.images

    def spans(self) -> list[Span]:
        """When its stages went on, one after another."""
        encoded = self.began_s + self.encode_s
        denoised = encoded + self.denoise_s
        return [
            Span("encode", self.began_s, encoded),
            Span("denoise", encoded, denoised),
            Span("decode", denoised, denoised + self.decode_s),
        ]


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Seconds from the start of the process to the first picture, in the order in which they pass."""

    start_s: float
    load_s: float
    encode_s: float
    first_step_s: float
    further_steps_s: float
    decode_s: float

    @property
    def seconds(self) -> float:
        """All of it."""
        steps_s = self.first_step_s + self.further_steps_s
        return self.start_s + self.load_s + self.encode_s + steps_s + self.decode_s


@dataclass(frozen=True, slots=True)
class Point:
    """Pictures of one shape and batch, drawn as a job draws them: batch after batch, the first one dropped.

    `encode_s`: a prompt; `step_s`, `decode_s` and `seconds_per_image`: an image. `encoder_in_s`, `denoiser_in_s`: until they are
    on the device, where prompts are encoded ahead. `working_gib`: what each phase took on a GPU beside the weights. `failed`:
    why there are no figures.
    """

    part: Part
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    batch: int
    batches: int = 0
    encode_s: float = 0.0
    step_s: float = 0.0
    decode_s: float = 0.0
    encoder_in_s: float | None = None
    denoiser_in_s: float | None = None
    seconds_per_image: float = 0.0
    peak_gib: float = 0.0
    working_gib: Mapping[str, float] = field(default_factory=dict)
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """How a few values lie, in their own unit."""

    count: int
    median: float
    p95: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Measured:
    """All that one benchmark of a model found. `before_gib`: held before the model was loaded.

    `spans` and `peak_gib` are of pictures of the card's own size and batch: those swept have their peaks in `points`.
    `guided_above`: the guidance above which a step passes the denoiser twice; None where none does.
    """

    cold: ColdStart
    drawn: tuple[Drawn, ...]
    job: Point
    points: tuple[Point, ...]
    spans: tuple[Span, ...]
    samples: tuple[Sample, ...]
    before_gib: float
    peak_gib: Mapping[str, float]
    guided_above: float | None

    def of(self, part: Part) -> list[Drawn]:
        """The batches of one part."""
        return [one for one in self.drawn if one.part == part]

    def warm(self) -> list[Drawn]:
        """The rounds' pictures without the first round and without the first picture of each other, where there are more."""
        rounds = self.of("round")
        later = [one for one in rounds if one.number > 1] or rounds
        first = {one.number: one for one in reversed(later)}
        return [one for one in later if one is not first[one.number]] or later

    def by_steps(self) -> dict[int, list[Drawn]]:
        """The pictures of the sweep over steps, by steps."""
        found: dict[int, list[Drawn]] = {}
        for one in self.of("steps"):
            found.setdefault(one.num_inference_steps, []).append(one)
        return found


def spread_of(values: Sequence[float]) -> Spread:
    """Summarise values; wants one at least."""
    return Spread(len(values), statistics.median(values), percentile(values, 0.95), min(values), max(values))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a share (0 to 1) of the values lies below, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def wilson(right: int, of: int, *, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share, `right` of so many. Source: Wilson's score interval."""
    if of == 0:
        return 0.0, 1.0
    share, room = right / of, z * z / of
    middle = (share + room / 2) / (1 + room)
    half = z * math.sqrt(share * (1 - share) / of + room / (4 * of)) / (1 + room)
    return max(0.0, middle - half), min(1.0, middle + half)


def peak_between(samples: Sequence[Sample], began_s: float, ended_s: float) -> int:
    """Return the most bytes held between two moments: a phase shorter than the gaps has the samples around it."""
    if not samples:
        return 0
    moments = [sample.at_s for sample in samples]
    low = max(bisect_left(moments, began_s), 0)
    high = min(bisect_right(moments, ended_s) + 1, len(samples))
    return max(sample.held_bytes for sample in samples[min(low, len(samples) - 1) : max(high, low + 1)])


def peaks(samples: Sequence[Sample], spans: Iterable[Span]) -> dict[str, float]:
    """Return the most GiB held in each phase, phases in order; those that never were are left out."""
    found: dict[str, int] = {}
    for span in spans:
        found[span.phase] = max(found.get(span.phase, 0), peak_between(samples, span.began_s, span.ended_s))
    return {phase: found[phase] / GIB for phase in PHASES if phase in found}


def thinned(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return at most so many samples, of each stretch the one with the most bytes, so that peaks stay."""
    if len(samples) <= most:
        return list(samples)
    bounds = [round(place * len(samples) / most) for place in range(most + 1)]
    return [max(samples[low:high], key=lambda sample: sample.held_bytes) for low, high in itertools.pairwise(bounds)]
