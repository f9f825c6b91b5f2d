"""The farm's numbers as Prometheus reads them: text, or OpenMetrics where it is asked for.

Keeps no numbers: what processes counted comes as snapshots, which are added up.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from farm.meters import METERS, Meter, meter_of
from farm.tally import Key, Snapshot, added


@dataclass(frozen=True, slots=True)
class Exposition:
    """The body of an answer to Prometheus, and its content type."""

    body: bytes
    content_type: str


def exposition(snapshots: Iterable[Snapshot], *, accept: str = "") -> Exposition:
    """Show the sums of snapshots. `accept`: the request's Accept header, which decides between text and OpenMetrics."""
    encode, content_type = choose_encoder(accept)
    return Exposition(encode(_Sums(added(snapshots))), content_type)


class _Sums(Collector):
    """Sums as prometheus-client's metrics, in the order of the table."""

    def __init__(self, sums: dict[Key, float]):
        self._sums = sums

    def collect(self) -> Iterator[Metric]:
        series: defaultdict[str, dict[Key, float]] = defaultdict(dict)
        for key, value in self._sums.items():
            series[meter_of(key[0]).name][key] = value
        for meter in METERS.values():
            found = series[meter.name]
            if not found and meter.kind == "counter" and not meter.labels:
                found = {(meter.name, ()): 0.0}  # so that its first count is seen as a rise
            if found:
                yield _metric(meter, found)


def _metric(meter: Meter, series: dict[Key, float]) -> Metric:
    metric = Metric(
        meter.name.removesuffix("_total") if meter.kind == "counter" else meter.name, meter.help, meter.kind
    )
    for (name, labels), value in sorted(series.items(), key=_place):
        metric.add_sample(name, dict(labels), value)
    return metric


def _place(item: tuple[Key, float]) -> tuple[object, ...]:
    """A sample's place: a histogram's buckets of one set of labels stand together, by their bounds, before sum and count."""
    (name, labels), _ = item
    bound = next((float(value) for label, value in labels if label == "le"), 0.0)
    others = tuple(pair for pair in labels if pair[0] != "le")
    return others, not name.endswith("_bucket"), name, bound
