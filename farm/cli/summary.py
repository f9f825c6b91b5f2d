"""What a job came to, or its pilot: printed when its last pass, or the pilot's, has ended."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.cli.advice import warning_records
from farm.cli.exits import Exit
from farm.cli.options import Options
from farm.cli.terminal import note, print_json, say
from farm.cli.wording import count, cut, duration, rate, size
from farm.errors import FarmUnavailableError

if TYPE_CHECKING:
    from farm.ledger import Ledger
    from farm.lint import Advice
    from farm.plan import Plan
    from farm.records import Totals


def summarise(options: Options, ledger: "Ledger", job: str, *, warnings: Sequence["Advice"] = ()) -> Exit:
    """Print what a finished job came to, `warnings` in its record alone. The exit code says whether images failed."""
    plans = ledger.plans(job)
    if not plans or not all(ledger.finished(plan) for plan in plans):
        raise FarmUnavailableError(f"the farm ended before {job} was done; what is stored stays: run the command again")
    failed = _print(options, ledger, plans, state="done", warnings=warnings)
    if failed and not options.json:
        note(f"{count(failed, 'image')} failed; render them again: farm retry {job}")
    return Exit.IMAGES_FAILED if failed else Exit.OK


def summarise_pilot(options: Options, ledger: "Ledger", job: str) -> None:
    """Print what the runs came to whose pilot waits for approval."""
    from farm.status import awaits_approval

    _print(options, ledger, [plan for plan in ledger.plans(job) if awaits_approval(ledger, plan)], state="pilot")


def gpu_time(totals: "Totals") -> str:
    """How long the renderers' devices worked, and how long they were expected to, which reckons with no loading."""
    load = totals.seconds.get("load", 0.0)
    loading = f" ({duration(load)} of it loading)" if load >= 1 else ""
    planned = "" if totals.planned_gpu_seconds is None else f", {duration(totals.planned_gpu_seconds)} planned"
    return f"{duration(totals.gpu_seconds)}{loading}{planned}"


def show_failures(ledger: "Ledger", plan: "Plan") -> None:
    """Print a run's failed images by error code, with an example of each."""
    from farm.status import failure_groups

    for group in failure_groups(ledger, plan):
        say(f"  failed     {count(group.images, 'image')}: {group.code}")
        say(f"             image {group.example.index}: {cut(group.example.error_message or '', 200)}")


def places(ledger: "Ledger", plan: "Plan") -> dict[str, str]:
    """Where a run's pictures, dataset and sheet are."""
    from farm.export import dataset_prefix, run_prefix, sheet_key

    return {
        "pictures": place(ledger, f"{run_prefix(plan)}images/"),
        "dataset": place(ledger, dataset_prefix(plan)),
        "sheet": place(ledger, sheet_key(plan)),
    }


def place(ledger: "Ledger", key: str) -> str:
    """Where an object is, as a person would type it: a path below this folder is relative."""
    url = ledger.store.url
    if "://" in url:
        return f"{url}/{key}"
    path = Path(url) / key
    relative = os.path.relpath(path)
    return f"./{relative}" if not relative.startswith("..") else str(path)


def _print(
    options: Options, ledger: "Ledger", plans: Sequence["Plan"], *, state: str, warnings: Sequence["Advice"] = ()
) -> int:
    """Print the closed runs among `plans`, and return how many of their images failed."""
    every = [ledger.totals(plan) for plan in plans]
    ended = [(plan, totals) for plan, totals in zip(plans, every, strict=True) if totals is not None]
    failed = sum(totals.failed for _, totals in ended)
    if options.json:
        runs = [_record(ledger, plan, totals) for plan, totals in ended]
        told = {"warnings": warning_records(warnings)} if warnings else {}
        print_json({"job": plans[0].job, "state": state, "failed": failed, "runs": runs, **told})
        return failed
    for plan, totals in ended:
        named = [plan.job]
        if len(plans) > 1:
            named.append(f"run {plan.run}")
        if state == "pilot":
            named.append("pilot")
        _show(options, ledger, plan, totals, name=", ".join(named))
    return failed


def _show(options: Options, ledger: "Ledger", plan: "Plan", totals: "Totals", *, name: str) -> None:
    said = [f"{name}: {totals.ok:,} of {count(totals.images, 'image')}, {size(totals.bytes)},"]
    said.append(f"in {duration(totals.wall_seconds)} on {count(totals.renderers, 'renderer')}")
    if totals.wall_seconds > 0:
        said.append(f"({rate(totals.ok / totals.wall_seconds)})")
    say(" ".join(said))
    if options.verbose:
        spent = totals.seconds.items()
        say("  times      " + " · ".join(f"{stage} {duration(s)}" for stage, s in spent if stage != "total"))
    if totals.flagged:
        say(f"  flagged    {count(totals.flagged, 'picture')} of one colour only; column `flag` of the dataset")
    if totals.failed:
        show_failures(ledger, plan)
    for label, where in places(ledger, plan).items():
        say(f"  {label:<10} {where}")
    say(f"  GPU time   {gpu_time(totals)}")


def _record(ledger: "Ledger", plan: "Plan", totals: "Totals") -> dict[str, Any]:
    from farm.jobrecord import totals_record

    left = 0 if ledger.finished(plan) else plan.images - (plan.pilot or 0)
    return {"run": plan.run, "left": left, **totals_record(totals), **places(ledger, plan)}
