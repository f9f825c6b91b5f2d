"""What a process counts: a table of every metric the farm has, and the numbers that one process keeps of them.

Knows nothing of Prometheus or of other processes; `farm.tally` joins the snapshots and `farm.metrics` shows them. A name or
label that the table does not have is refused, so that nothing is counted that no one can find. Labels are bounded: a model,
a code, a state, never a job, an owner or a prompt.
"""

import threading
import time
from bisect import bisect_left
from dataclasses import dataclass

from farm.tally import Kind, Labels, Sample, Snapshot

SERIES_MAX = 500
"""Sets of label values that one metric keeps in one process; what comes after is counted under OTHER."""
OTHER = "other"

WAIT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LOAD_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
HTTP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Meter:
    """One metric of the table. `buckets`: a histogram's upper bounds, the last one (+Inf) left out."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METERS: dict[str, Meter] = {
    meter.name: meter
    for meter in (
        # Counted by renderers. class: bulk (jobs) or urgent (the endpoint). status: ok or failed.
        Meter(
            "farm_images_total",
            "counter",
            "Images drawn: of jobs when their receipt is stored, of the endpoint when they are answered.",
            ("model", "class", "status"),
        ),
        Meter(
            "farm_stage_seconds_total",
            "counter",
            "Seconds spent by stage: encode, denoise, decode on the device; write beside it (encode to files, hash, upload).",
            ("model", "class", "stage"),
        ),
        Meter("farm_failures_total", "counter", "Images that could not be drawn, by error code.", ("class", "code")),
        Meter("farm_stored_bytes_total", "counter", "Bytes of pictures stored, thumbnails not counted.", ("class",)),
        Meter(
            "farm_model_load_seconds",
            "histogram",
            "Seconds until a model is on the device; kind: load from files, or swap from host memory, where it was kept.",
            ("model", "kind"),
            LOAD_BUCKETS_S,
        ),
        Meter(
            "farm_urgent_wait_seconds",
            "histogram",
            "From an urgent portion's arrival at its renderer to its first batch, loading its model too; "
            "kind: step (within a render), "
            "batch (between batches), idle (the device was free).",
            ("kind",),
            WAIT_BUCKETS_S,
        ),
        Meter("farm_idle_seconds_total", "counter", "Seconds in which a renderer's device had no work.", ("renderer",)),
        Meter("farm_gpu_memory_used_bytes", "gauge", "Memory in use on a renderer's GPU, by anyone.", ("renderer",)),
        Meter("farm_gpu_memory_total_bytes", "gauge", "Memory of a renderer's GPU.", ("renderer",)),
        Meter(
            "farm_gpu_utilisation_ratio", "gauge", "Share of the last moment a GPU was at work, 0 to 1.", ("renderer",)
        ),
        # Counted by the dispatcher.
        Meter("farm_renderers", "gauge", "Renderers by state.", ("state",)),
        Meter("farm_gateways", "gauge", "Gateways that showed life lately."),
        Meter(
            "farm_queue_images",
            "gauge",
            "Images that wait or are being drawn: bulk of unfinished jobs, urgent of given seats.",
            ("class",),
        ),
        Meter(
            "farm_queue_age_seconds",
            "gauge",
            "How old the oldest work is that waits: bulk since its job's submission, urgent since its seat.",
            ("class",),
        ),
        Meter("farm_jobs", "gauge", "Jobs in the dispatcher's hands by state.", ("state",)),
        Meter("farm_retries_total", "counter", "Shards given back to be rendered again, by error code.", ("code",)),
        Meter(
            "farm_renderer_losses_total",
            "counter",
            "Renderer processes lost: ended or given up while they should have worked, or not even started.",
        ),
        Meter("farm_seats", "gauge", "Seats of the endpoint given out and not given back."),
        Meter("farm_seats_expired_total", "counter", "Seats given up because their gateway fell silent."),
        Meter("farm_refusals_total", "counter", "Requests for seats refused, by code.", ("code",)),
        # Counted by gateways. route: a path template, as /v1/jobs/{id}. status: the HTTP status.
        Meter("farm_http_requests_total", "counter", "HTTP requests answered.", ("method", "route", "status")),
        Meter(
            "farm_http_request_seconds",
            "histogram",
            "Seconds from a request's head to its answer's last byte; event streams are left out.",
            ("method", "route"),
            HTTP_BUCKETS_S,
        ),
        Meter("farm_http_in_flight", "gauge", "HTTP requests being answered, event streams too."),
    )
}


def meter_of(sample: str) -> Meter:
    """Return the metric that a sample's name belongs to. Raises ValueError where there is none."""
    for suffix in ("", "_bucket", "_sum", "_count"):
        meter = METERS.get(sample.removesuffix(suffix)) if sample.endswith(suffix) else None
        if meter is not None and (not suffix) == (meter.kind != "histogram"):
            return meter
    raise ValueError(f"there is no metric {sample}; farm/meters.py has the table")


class _Spread:
    """A histogram's numbers for one set of labels."""

    __slots__ = ("counts", "total")

    def __init__(self, buckets: int):
        self.counts = [0] * (buckets + 1)
        self.total = 0.0


class Meters:
    """The numbers of one process. Every method is safe from any thread, and takes microseconds.

    `process` is its lasting name, `incarnation` this life of it: numbers begin at 0 with each. `began_at`: Unix seconds.
    """

    def __init__(self, process: str, incarnation: str, *, began_at: float | None = None):
        self.process = process
        self.incarnation = incarnation
        self._began_at = time.time() if began_at is None else began_at
        self._lock = threading.Lock()
        self._numbers: dict[str, dict[Labels, float]] = {}
        self._spreads: dict[str, dict[Labels, _Spread]] = {}

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter. Raises ValueError for a name or label that the table does not have, or a negative value."""
        meter = _meter(name, "counter", labels)
        if value < 0:
            raise ValueError(f"{name} only grows, got {value}")
        with self._lock:
            series = self._numbers.setdefault(name, {})
            key = _key(meter, labels, series)
            series[key] = series.get(key, 0.0) + value

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge. Raises ValueError as `count` does."""
        meter = _meter(name, "gauge", labels)
        with self._lock:
            series = self._numbers.setdefault(name, {})
            series[_key(meter, labels, series)] = float(value)

    def shift(self, name: str, by: float, **labels: str) -> None:
        """Move a gauge up or down. Raises ValueError as `count` does."""
        meter = _meter(name, "gauge", labels)
        with self._lock:
            series = self._numbers.setdefault(name, {})
            key = _key(meter, labels, series)
            series[key] = series.get(key, 0.0) + by

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram. Raises ValueError as `count` does."""
        meter = _meter(name, "histogram", labels)
        with self._lock:
            series = self._spreads.setdefault(name, {})
            key = _key(meter, labels, series)
            spread = series.get(key)
            if spread is None:
                spread = series[key] = _Spread(len(meter.buckets))
            spread.counts[bisect_left(meter.buckets, value)] += 1
            spread.total += value

    def snapshot(self) -> Snapshot:
        """Return everything counted so far, of one moment."""
        samples: list[Sample] = []
        with self._lock:
            for name, numbers in self._numbers.items():
                samples.extend(Sample(name, labels, value) for labels, value in numbers.items())
            for name, spreads in self._spreads.items():
                for labels, spread in spreads.items():
                    samples.extend(_spread_samples(METERS[name], labels, spread))
        return Snapshot(self.process, self.incarnation, tuple(samples), self._began_at)


def _meter(name: str, kind: Kind, labels: dict[str, str]) -> Meter:
    meter = METERS.get(name)
    if meter is None:
        raise ValueError(f"there is no metric {name}; farm/meters.py has the table")
    if meter.kind != kind:
        raise ValueError(f"{name} is a {meter.kind}, not a {kind}")
    if len(labels) != len(meter.labels) or any(label not in labels for label in meter.labels):
        raise ValueError(f"{name} has the labels {meter.labels}, got {tuple(labels)}")
    return meter


def _key(meter: Meter, labels: dict[str, str], series: dict[Labels, float] | dict[Labels, _Spread]) -> Labels:
    key = tuple((label, labels[label]) for label in meter.labels)
    if key not in series and len(series) >= SERIES_MAX:
        return tuple((label, OTHER) for label in meter.labels)
    return key


def _spread_samples(meter: Meter, labels: Labels, spread: _Spread) -> list[Sample]:
    """A histogram as Prometheus wants it: each bucket holds those below it too."""
    samples = []
    below = 0
    for bound, count in zip((*map(_bound, meter.buckets), "+Inf"), spread.counts, strict=True):
        below += count
        samples.append(Sample(f"{meter.name}_bucket", (*labels, ("le", bound)), float(below)))
    samples.append(Sample(f"{meter.name}_sum", labels, spread.total))
    samples.append(Sample(f"{meter.name}_count", labels, float(below)))
    return samples


def _bound(value: float) -> str:
    return repr(float(value))
