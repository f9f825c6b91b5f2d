"""Which job a free renderer works for next.

Higher priority first; within one priority a renderer keeps the model that it has loaded, then the oldest job goes first.
Knows nothing of leases, clocks or storage. Equal inputs give equal order.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job with work to lease, as the queue sees it."""

    run: str
    priority: int
    created_at: str
    model: str


def next_job(waiting: Iterable[Waiting], *, loaded_model: str | None) -> Waiting | None:
    """Choose one of `waiting` for a renderer that has `loaded_model` in memory, or None where nothing waits."""
    return min(
        waiting,
        key=lambda job: (-job.priority, job.model != loaded_model, job.created_at, job.run),
        default=None,
    )
