"""`farm du`, `farm gc`, `farm delete`: what the store holds, and what of it goes."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.exits import Exit
from farm.cli.following import spinner
from farm.cli.jobs import Job
from farm.cli.moment import now_iso, whoami
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json, print_table, say
from farm.cli.wording import count, printable, size
from farm.errors import ControlError

if TYPE_CHECKING:
    from farm.removal import Removed
    from farm.usage import Usage


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "du")(du)
    command(app, "gc")(gc)
    command(app, "delete")(delete)


def du(
    options: Options,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="One job; all of them where left out.")] = None,
) -> Exit:
    """Show how much the store holds, by job and kind.

    Counts objects as they lie there: pictures that no row points at, too. `farm gc --dry-run` says how much of it can go.
    """
    from farm.usage import job_usage, job_usages, other_usage

    ledger = options.open_ledger()
    store = ledger.store
    if job is not None:
        from farm.removal import find_job

        find_job(ledger, job)
    with spinner("counting"):
        jobs = [job_usage(store, job)] if job is not None else list(job_usages(store))
        elsewhere = other_usage(store) if job is None else None
    jobs.sort(key=lambda usage: -usage.total.size_bytes)
    every = jobs if elsewhere is None else [*jobs, elsewhere]
    total = _total(every)
    free = store.free_bytes()
    if options.json:
        record: dict[str, Any] = {"store": store.url, "free_bytes": free, **_record(total)}
        record["jobs"] = [{"job": usage.job, **_record(usage.total), "kinds": _kinds(usage)} for usage in jobs]
        if elsewhere is not None:
            record["elsewhere"] = {**_record(elsewhere.total), "kinds": _kinds(elsewhere)}
        print_json(record)
        return Exit.OK
    _show(every)
    room = "" if free is None else f", {size(free)} free"
    say(f"{size(total.size_bytes)} in {count(total.objects, 'object')}{room}: {store.url}")
    return Exit.OK


def gc(
    options: Options,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would go.")] = False,
) -> Exit:
    """Remove what nothing can point at.

    Pictures of closed passes that no receipt names, images of the endpoint that were kept long enough, deletes that were
    broken off, and, once they are a day old by the store's clock, what submissions, farms and uploads that died left behind.
    A run with an open pass is not touched.
    """
    from farm.garbage import collect

    ledger = options.open_ledger()
    with spinner("looking for garbage") as shown:
        found = collect(ledger, at=now_iso(), by=whoami(), dry_run=dry_run, on_removed=_counting(shown, "found"))
    total = found.total
    if options.json:
        kinds = {kind: _record(removed) for kind, removed in found.removed.items()}
        kept = [{"what": one.what, "reason": one.reason} for one in found.kept]
        print_json({"dry_run": dry_run, **_record(total), "kinds": kinds, "kept": kept})
        return Exit.STORE if found.kept else Exit.OK
    for kind, removed in found.removed.items():
        say(f"  {kind:<18} {_said(removed)}")
    for one in found.kept:
        note(f"kept: {printable(one.what)}: {printable(one.reason)}")
    if not total.objects:
        say(f"nothing to remove in {ledger.store.url}")
    else:
        say(f"{'would remove' if dry_run else 'removed'} {_said(total)}")
    return Exit.STORE if found.kept else Exit.OK


def delete(
    options: Options,
    job: Job,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> Exit:
    """Delete a job: its pictures, dataset, receipts and plans, for ever.

    A farm at work on it stops within seconds. Broken off, the same command ends it. The name is free afterwards.
    """
    from farm.removal import delete_job, find_job, measure_job

    ledger = options.open_ledger()
    find_job(ledger, job)
    if not yes:
        if options.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ControlError(f"deleting {job} cannot be undone, and nobody is here to be asked; give --yes")
        with spinner(f"counting what {job} has"):
            doomed = measure_job(ledger, job)
        note(f"{job} has {_said(doomed)} in {ledger.store.url}; deleted, they are gone for ever")
        if not _agreed():
            note(f"{job} is kept")
            return Exit.OK
    with spinner(f"deleting {job}") as shown:
        removed = delete_job(ledger, job, at=now_iso(), by=whoami(), on_removed=_counting(shown, "deleted"))
    if options.json:
        print_json({"job": job, "state": "deleted", **_record(removed)})
    else:
        say(f"{job} is deleted: {_said(removed)}")
    return Exit.OK


def _counting(shown: object, what: str) -> Callable[["Removed"], None]:
    """A function that shows a growing sum where a spinner turns, and elsewhere nothing."""
    from rich.status import Status

    def show(removed: "Removed") -> None:
        if isinstance(shown, Status):
            shown.update(f"{what} {_said(removed)}")

    return show


def _agreed() -> bool:
    try:
        return typer.confirm("Delete it?", err=True)
    except typer.Abort:
        return False


def _show(usages: list["Usage"]) -> None:
    from farm.usage import KINDS, OTHER

    kinds = [*KINDS.values(), OTHER]
    rows = []
    for usage in usages:
        if not usage.total.objects:
            continue
        parts = dict.fromkeys(kinds, 0)
        for kind, found in usage.kinds.items():
            parts[kind if kind in parts else OTHER] += found.size_bytes
        sizes = [size(parts[kind]) if parts[kind] else "–" for kind in kinds]
        name = printable(usage.job) if usage.job else "(no job's)"
        rows.append((name, size(usage.total.size_bytes), f"{usage.total.objects:,}", *sizes))
    if rows:
        print_table(("job", "size", "objects", *kinds), rows, right=("size", "objects", *kinds))


def _total(usages: list["Usage"]) -> "Removed":
    from farm.removal import Removed

    return sum((usage.total for usage in usages), Removed())


def _kinds(usage: "Usage") -> dict[str, dict[str, int]]:
    return {kind: _record(found) for kind, found in usage.kinds.items()}


def _record(removed: "Removed") -> dict[str, int]:
    return {"objects": removed.objects, "bytes": removed.size_bytes}


def _said(removed: "Removed") -> str:
    return f"{count(removed.objects, 'object')}, {size(removed.size_bytes)}"
