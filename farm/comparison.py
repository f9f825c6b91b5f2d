"""Compare what a manifest asks for with what its job was planned from.

Only what decides pixels or objects counts; what was drawn once (roots, seeds of -1) has no part in it, nor have the
priority and the limits, which may change while a job runs. Reads the frozen prompts where it must, writes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from farm.ledger import Ledger
from farm.manifest import Manifest
from farm.plan import Numerics, Plan, PromptTable, card_identity
from farm.prompts import Difference, compare_rows, known_rows
from farm.request import Request
from farm.yamlfile import shown

_ROW_FREE_RULES = ("key", "shared", "listed")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What submitting would do, what differs, and how many rows are new."""

    state: Literal["resume", "appended", "changed"]
    changes: tuple[str, ...] = ()
    new: int = 0


def compare(request: Request, table: PromptTable, plans: Sequence[Plan], ledger: Ledger) -> Comparison:
    """Compare what a manifest asks for with what its job was planned from; drawn values have no part in it."""
    plan = plans[-1]
    changes = [
        *model_differences(*(card_identity(one.card, plan.numerics.device) for one in (plan, request))),
        *_changes("params", plan.params.model_dump(), request.params.model_dump()),
        *_changes("seeds", _seed_wish(plan.manifest), _seed_wish(request.manifest)),
        *_changes("output", plan.output.model_dump(), request.manifest.output.model_dump()),
    ]
    if plan.sweep != request.points:
        changes.append(f"sweep: {shown(plan.manifest.sweep)} -> {shown(request.manifest.sweep)}")
    if plan.manifest.pilot != request.manifest.pilot:
        changes.append(f"pilot: {_count(plan.manifest.pilot)} -> {_count(request.manifest.pilot)}")
    prompts, difference = _prompt_changes(request, table, plans, ledger)
    changes += prompts
    if changes:
        return Comparison("changed", tuple(changes))
    if difference is not None and difference.new:
        return Comparison("appended", (f"prompts: {difference.new} rows added",), difference.new)
    return Comparison("resume")


def _prompt_changes(
    request: Request, table: PromptTable, plans: Sequence[Plan], ledger: Ledger
) -> tuple[list[str], Difference | None]:
    before = plans[-1].prompts
    if (before.template is None) != (table.template is None):
        kinds = ["rows" if one.template is None else "a template" for one in (before, table)]
        return [f"prompts: {kinds[0]} -> {kinds[1]}"], None
    if before.template is not None and table.template is not None:
        seeds = [getattr(manifest.prompts, "seed", None) for manifest in (plans[-1].manifest, request.manifest)]
        then = {**before.template.model_dump(exclude={"root"}), "seed": seeds[0]}
        now = {**table.template.model_dump(exclude={"root"}), "seed": seeds[1]}
        changes = _changes("prompts", then, now)
        if not changes and list(before.template.vary) != list(table.template.vary):
            changes.append(f"prompts.vary: order {', '.join(before.template.vary)} -> {', '.join(table.template.vary)}")
        return changes, None
    if len(plans) == 1 and before.digest == table.digest:
        return [], None
    if before.keyed != table.keyed:
        return [f"prompts.key: {'set' if before.keyed else 'none'} -> {'set' if table.keyed else 'none'}"], None
    if not table.keyed or plans[-1].seeds.rule not in _ROW_FREE_RULES:
        if before.rows != table.rows:
            return [f"prompts: {before.rows} rows -> {table.rows} rows"], None
        return [f"prompts: other texts in the {table.rows} rows, or another order"], None
    difference = compare_rows(
        request.manifest,
        known_rows(plans, ledger),
        card=request.card,
        params=request.params,
        points=request.points,
        open_store=request.open_store,
    )
    changes = []
    if difference.changed:
        changes.append(
            f"prompts: {difference.changed} rows have other contents, "
            f"the first of key {shown(difference.first_changed)}"
        )
    if difference.gone:
        changes.append(f"prompts: {difference.gone} rows are gone")
    return changes, difference


def plan_differences(a: Plan, b: Plan) -> tuple[str, ...]:
    """Return in what two plans' models, numerics and output differ; parameters are a picture's own, and none of this."""
    return (
        *model_differences(*(card_identity(one.card, one.numerics.device) for one in (a, b))),
        *(f"numerics.{one}" for one in numerics_differences(a.numerics, b.numerics)),
        *_changes("output", a.output.model_dump(), b.output.model_dump()),
    )


def model_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in what two models differ, each as `card_identity` says what it is."""
    return _changes("model", _flat(then), _flat(now))


def numerics_differences(planned: Numerics, here: Numerics) -> tuple[str, ...]:
    """Return what differs, as `torch: 2.13.0 -> 2.14.0`. The number of renderers may change threads: that counts.

    A package that the plan does not name counts for nothing, as when its renderers check.
    """
    then, now = _flat(planned.model_dump(mode="json")), _flat(here.model_dump(mode="json"))
    now = {name: value for name, value in now.items() if name in then or not name.startswith("versions.")}
    return tuple(
        f"{name.removeprefix('versions.')}: {then.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    )


def _seed_wish(manifest: Manifest) -> dict[str, Any]:
    """Return the seeds as asked for, defaults filled in, nothing drawn."""
    seeds = manifest.seeds
    if isinstance(seeds, tuple):
        return {"listed": list(seeds)}
    rule = seeds.rule or ("key" if manifest.keyed else "slot")
    return {"count": seeds.count, "from": rule, "root": seeds.root or 0}


def _count(value: int | None) -> str:
    return "none" if value is None else str(value)


def _changes(place: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    def said(value: Any) -> str:
        return "none" if value is None else shown(value)

    return [
        f"{place}.{name if name.isprintable() else shown(name)}: {said(then.get(name))} -> {said(now.get(name))}"
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    ]


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            flat |= {f"{name}.{inner}": deep for inner, deep in entry.items()}
        else:
            flat[name] = entry
    return flat
