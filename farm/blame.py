"""Who is to blame for the death of a renderer: a batch, a shard, or the model that was loading."""

from farm.board import Board
from farm.held import Held
from farm.retry import (
    DEATHS_OF_SHARD_BEFORE_STALL,
    FINALISE_DEATHS_BEFORE_STALL,
    IDLE_DEATHS_BEFORE_STALL,
    Blame,
)
from farm.run import RunState

IDLE_DEATHS_APART_S = 10.0
"""Deaths of one model's loading closer together count as one: a machine that failed takes several renderers with it."""


def count_deaths(board: Board, lost: list[tuple[Held, RunState]], now: float) -> None:
    """Count a death against the batch that was on the device; where there was none, against the shard that was begun.

    A lease in whose place an urgent image was by its last report is blamed for nothing: that image may have done it. Bulk
    images get a share of the device whatever is urgent, so that one that ends its renderers is still found.
    """
    aside = any(held.report and held.report.aside for held, _ in lost)
    rendering = [(held, run) for held, run in lost if held.report and held.report.in_hand and not held.report.aside]
    for held, run in rendering:
        if held.report and not run.done[held.lease.shard]:
            blame = run.blame.setdefault(held.lease.shard, Blame())
            blame.died(held.report.in_hand, cautious=held.lease.cautious)
    begun = sorted(lost, key=lambda one: not one[0].has_begun)
    for held, run in begun[:1] if not (rendering or aside) else ():
        if held.lease.task == "finalise":
            run.finalise_deaths += 1
        else:
            _blame_shard(board, held, run, now)
        if run.finalise_deaths >= FINALISE_DEATHS_BEFORE_STALL:
            run.stall(
                "renderer_died",
                f"writing the dataset ended its renderer {run.finalise_deaths} times; look into the renderers' logs, "
                "check host memory, then render again",
            )
        if run.stalled:
            board.queue.remove(run.entry.run)


def _blame_shard(board: Board, held: Held, run: RunState, now: float) -> None:
    """Count a death with no image in hand: against the shard, and against the model where it may have been loading.

    Many renderers of one machine die at once, and of one cause: that counts once. So does what others get on with.
    """
    shard = held.lease.shard
    stage = held.report.stage if held.report else None
    if held.has_begun and not run.done[shard]:
        blame = run.blame.setdefault(shard, Blame())
        blame.died((), cautious=held.lease.cautious)
        if blame.empty >= DEATHS_OF_SHARD_BEFORE_STALL:
            run.stall(
                "renderer_died",
                f"shard {shard} ended {blame.empty} renderers with no image in hand, the last in stage {stage}; look "
                "into the renderers' logs, check host memory and the store, then render again",
            )
    leases = [lease for holders in run.held.values() for lease in holders]
    reports = [board.held[lease.token].report for lease in leases]
    others_get_on = any(report and report.in_hand for report in reports)
    if stage in (None, "load", "encode") and not others_get_on and now - run.idle_died_at >= IDLE_DEATHS_APART_S:
        run.idle_deaths += 1
        run.idle_died_at = now
    if run.idle_deaths >= IDLE_DEATHS_BEFORE_STALL:
        run.stall(
            "renderer_died",
            f"renderers died {run.idle_deaths} times without finishing a batch of {run.entry.model}; "
            "look into the renderers' logs, check host and GPU memory, then render again",
        )
