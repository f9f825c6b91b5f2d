"""Read from the ledger what a dispatcher needs to know: what of a job is done, whether it was stopped.

Blocks on the store; the caller runs it in a thread. Reads one listing and no receipt for a shard that did not fail.
"""

from farm.ledger import Ledger
from farm.run import RunEntry


def stopped(ledger: Ledger, job: str) -> str | None:
    """Why no shard of a job should be leased (`cancelled`), or None: the last control counts."""
    controls = ledger.controls(job)
    return "cancelled" if controls and controls[-1].action == "cancel" else None


def open_runs(ledger: Ledger, job: str) -> list[RunEntry]:
    """The latest pass of each of the job's runs that has no totals yet. Closes a job that has none left."""
    entries = []
    for plan in ledger.plans(job):
        number = ledger.passes(plan)
        if ledger.totals(plan, number) is not None:
            continue
        indexes = ledger.pass_indexes(plan, number)
        entries.append(
            RunEntry(
                job=job,
                run=plan.run,
                model=plan.card.name,
                pass_number=number,
                images=plan.images if indexes is None else len(indexes),
                shard_images=plan.shard_images,
                priority=plan.manifest.priority,
                created_at=plan.created_at,
                done=ledger.done_shards(plan, number),
                failed=len(ledger.failed_indexes(plan)) if number == 1 else 0,
            )
        )
    if not entries:
        ledger.close(job)
    return entries
