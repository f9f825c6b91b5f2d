"""What a process has counted, as a record that it can send; and how those of many processes become one view.

A snapshot is cumulative since its process (`incarnation`) began, so that one that is lost or late costs nothing.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One number: a metric's name as Prometheus shows it (`_bucket`, `_sum` and `_count` for histograms) and its labels."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that one process has counted. `process` is its lasting name (`renderer-3`), `incarnation` this life of it."""

    process: str
    incarnation: str
    samples: tuple[Sample, ...]
