"""From a manifest to a plan: draft one, create it, or find the one that exists and say whether it is the same.

A plan is written last, after its prompt parts and the job's `open/` marker, and only if there is none: whatever kills
this between two writes leaves parts that nothing refers to, or a marker, and the next try completes the job. What was
drawn once (roots, seeds of -1, the run's name) is never drawn again: an equal manifest gets the plan that exists.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Literal

from farm.advice import advice_on
from farm.comparison import compare, numerics_differences
from farm.errors import ControlError, FarmError, ManifestError, PlanChangedError, RowsAppendedError
from farm.knownrows import KnownRows
from farm.ledger import Ledger
from farm.limits import Limits, limits_of, restated, stated
from farm.lint import Advice
from farm.manifest import PromptTemplate, SeedCount
from farm.modelcard import ParamOverrides, merged
from farm.outlook import Outlook, outlook
from farm.plan import ImageSpec, Plan, SeedRule, shard_size
from farm.prompts import Frozen, freeze, known_rows
from farm.records import Standing, standing
from farm.request import Request, Speed, placed, prepare, speed_of
from farm.status import images_done

__all__ = ["Draft", "Request", "Speed", "Submission", "draft", "prepare", "submit"]

Bits = Callable[[int], int]
"""From a count of bits to that many random ones."""

MAX_IMAGES = 1_000_000_000
"""Indexes have nine digits in file names, and a job's shards are held in memory as a bit each."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a manifest would come to. Nothing was written for it.

    `sizes`: images by (width, height). `drawn`: seeds or prompts in `first` will be drawn anew when it is submitted.
    `state`: what submitting would do; `changes` says what differs, where it is resumed the priority or limits that would be
    changed. `seconds`: on all renderers together. `size_bytes`: of the pictures, where an earlier run of the job tells.
    `outlook`: whether it keeps its limits. `warnings`: of the card, and of the prompts that were looked at.
    """

    plan: Plan
    first: tuple[ImageSpec, ...]
    sizes: dict[tuple[int, int], int]
    drawn: bool
    seconds: float | None
    speed: Speed
    size_bytes: int | None
    state: Literal["new", "resume", "appended", "changed"]
    changes: tuple[str, ...]
    outlook: Outlook
    warnings: tuple[Advice, ...] = ()


@dataclass(frozen=True, slots=True)
class Submission:
    """A job's plan, and whether it was there before.

    `numerics_differ`: what of this machine differs, as `torch: 2.13.0 -> 2.14.0`, from the plan's numerics, where rendering
    the plan here would mix; of a run created for appended rows, from those of the run before it. `waiting_rows`: appended
    rows that wait until the run in hand has ended. `changed`: the priority or limits that the manifest states anew, as
    `priority: 50 -> 80`; said to the job. `kept`: the limits that hold though the manifest leaves them out. `warnings`: of the
    card, and of the prompts that were looked at.
    """

    plan: Plan
    outcome: Literal["created", "resumed"]
    numerics_differ: tuple[str, ...] = ()
    waiting_rows: int = 0
    changed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    warnings: tuple[Advice, ...] = ()


def draft(request: Request, ledger: Ledger | None = None, *, now: str) -> Draft:
    """Work out what submitting would do, without writing; `now` is ISO 8601, UTC.

    Raises ControlError where the job is being deleted, ManifestError, PromptError, StoreError.
    """
    if ledger:
        _refuse_deleted(request, ledger)
    frozen = _freeze(request, root=0)
    speed = speed_of(request, ledger)
    numbers = count(1)

    def stand_in(_bits: int) -> int:
        return next(numbers)

    plan = _plan(request, frozen, run="00000000", now="", seeds=_seed_rule(request, stand_in), speed=speed)
    plans = ledger.plans(plan.job) if ledger else []
    state: Literal["new", "resume", "appended", "changed"] = "new"
    changes: tuple[str, ...] = ()
    size_bytes = None
    limits = limits_of(request.manifest, Standing())
    if not plans:
        _refuse_passed(request, limits, now)
    left = plan.images
    if plans and ledger:
        found = compare(request, frozen.table, plans, ledger)
        state, changes = found.state, found.changes
        if state == "resume":
            plan = plans[-1]
            left = plan.images - images_done(ledger, plan)
        elif state == "appended":
            left = found.new * len(plan.sweep) * plan.seeds.count + plans[-1].images - images_done(ledger, plans[-1])
        if state != "changed":
            limits = _limits(ledger, plans)
            if left:
                said = limits.differing(restated(request.manifest, plans[-1].manifest))
                changes += limits.words(said)
                limits = replace(limits, **said.given)
        totals = ledger.totals(plans[-1])
        if totals is not None and totals.ok:
            size_bytes = totals.bytes * plan.images // totals.ok
    per_row = len(plan.sweep) * plan.seeds.count
    last = len(frozen.first) * per_row if not plan.appended_to else 0
    first = [
        plan.spec(index, frozen.first[plan.locate(index)[0]])
        for index in islice(range(0, min(last, plan.images), _stride(per_row)), 8)
    ]
    seeds = request.manifest.seeds
    drawn = (isinstance(seeds, tuple) and -1 in seeds) or (isinstance(seeds, SeedCount) and seeds.rule == "random")
    prompts = request.manifest.prompts
    drawn = drawn or (isinstance(prompts, PromptTemplate) and prompts.drawn_once)
    return Draft(
        plan=plan,
        first=tuple(first),
        sizes=_sizes(plan, frozen),
        drawn=drawn and state != "resume",
        seconds=None if speed.seconds_per_image is None else speed.seconds_per_image * plan.images / request.renderers,
        speed=speed,
        size_bytes=size_bytes,
        state=state,
        changes=changes,
        outlook=outlook(
            limits,
            now=now,
            images=sum(one.images for one in plans[:-1]) + plan.images if state == "resume" else plan.images,
            left=left,
            seconds_per_image=speed.seconds_per_image,
            renderers=request.renderers,
            batch=plan.numerics.batch,
        ),
        warnings=advice_on(request, frozen.samples),
    )


def submit(
    request: Request,
    ledger: Ledger,
    *,
    now: str,
    by: str = "",
    append: bool = False,
    bits: Bits = secrets.randbits,
) -> Submission:
    """Create the job, or find the equal one that exists; `now` is ISO 8601, UTC.

    `append`: rows appended to a keyed prompt file become a new run of just those. While the run before is unfinished
    that one is resumed first, and `waiting_rows` says how many wait. A priority or a limit that the manifest of a job which
    exists states anew is said to it as a `change` by `by`, the owner where empty; one that it leaves out stays. Raises
    PlanChangedError when the job was planned from something else, RowsAppendedError when rows were appended and `append` is
    not set, and what `draft` raises.
    """
    _refuse_deleted(request, ledger)
    plans = ledger.plans(request.manifest.name)
    if not plans:
        _refuse_passed(request, limits_of(request.manifest, Standing()), now)
        created = _create(request, ledger, plans, now=now, bits=bits)
        if created is not None:
            return created
        _refuse_deleted(request, ledger)
        plans = ledger.plans(request.manifest.name)
    newest = plans[-1]
    frozen = _freeze(request, root=0)
    found = compare(request, frozen.table, plans, ledger)
    if found.state == "changed":
        raise PlanChangedError(
            f"job {newest.job} exists and was planned from something else: {'; '.join(found.changes)}. "
            "Give this manifest a new name, or put the old values back"
        )
    if found.state == "appended" and not append:
        raise RowsAppendedError(
            f"job {newest.job} exists and {found.new} rows were added to its prompts since; --append renders just "
            "those, as a new run of the job"
        )
    finished = ledger.finished(newest)
    made = Submission(
        newest,
        "resumed",
        numerics_differences(newest.numerics, request.numerics),
        found.new,
        warnings=advice_on(request, frozen.samples),
    )
    if finished and found.state == "resume":
        return made
    before = _limits(ledger, plans)
    new = before.differing(restated(request.manifest, newest.manifest))
    if new.finish_by is not None:
        _refuse_passed(request, replace(before, finish_by=new.finish_by), now)
    if finished:
        created = _create(request, ledger, plans, now=now, bits=bits)
        if created is None:
            return submit(request, ledger, now=now, by=by, append=append, bits=bits)
        made = replace(created, numerics_differ=numerics_differences(newest.numerics, created.plan.numerics))
    ledger.open(newest.job)
    if new.given:
        ledger.append_control(newest.job, "change", at=now, by=by or request.owner, run=plans[0].run, **new.given)
    return replace(made, changed=before.words(new), kept=replace(before, **new.given).unlike(stated(request.manifest)))


def _limits(ledger: Ledger, plans: Sequence[Plan]) -> Limits:
    return limits_of(plans[0].manifest, standing(ledger.controls(plans[0].job)))


def _refuse_deleted(request: Request, ledger: Ledger) -> None:
    job = request.manifest.name
    if ledger.deleted(job):
        raise ControlError(
            f"job {job} is being deleted; run farm delete {job} again, which ends it, or give the manifest a new name"
        )


def _refuse_passed(request: Request, limits: Limits, now: str) -> None:
    left = limits.seconds_left(now)
    if left is not None and left <= 0:
        raise ManifestError(
            f"{request.document.where(('finish_by',))}: finish_by: {limits.finish_by} has passed; give a later moment, or "
            "leave it out"
        )


def _create(request: Request, ledger: Ledger, plans: Sequence[Plan], *, now: str, bits: Bits) -> Submission | None:
    """Write parts, marker and plan, in this order; None when another was first with the plan."""
    job, run = request.manifest.name, f"{bits(32):08x}"
    written: list[int] = []

    def sink(number: int, data: bytes) -> None:
        written.append(number)
        ledger.put_prompt_part(job, run, number, data)

    try:
        known = known_rows(plans, ledger) if plans else None
        frozen = _freeze(request, root=bits(32), sink=sink, known=known)
        plan = _plan(
            request,
            frozen,
            run=run,
            now=now,
            seeds=plans[-1].seeds if plans else _seed_rule(request, bits),
            speed=speed_of(request, ledger),
            appended_to=plans[-1].run if plans else None,
        )
        ledger.open(job)
        if not plans:
            _discard_controls(ledger, job)
        created = ledger.create_plan(plan, len(plans) + 1)
    except FarmError:
        _discard(ledger, job, run, written)
        raise
    if not created:
        _discard(ledger, job, run, written)
        return None
    # Again: a farm that found the job done before this run was there may have taken the mark away since.
    ledger.open(job)
    _refuse_deleted(request, ledger)
    return Submission(plan, "created", warnings=advice_on(request, frozen.samples))


def _discard_controls(ledger: Ledger, job: str) -> None:
    """Take away what was said to a deleted job of that name, too late for its deletion: it is not meant for this one."""
    said = [info.key for info in ledger.store.list(f"jobs/{job}/control/")]
    # In this order: where another was first with the plan, what was said since is meant for that job.
    if said and not ledger.plans(job):
        ledger.store.delete_many(said)


def _discard(ledger: Ledger, job: str, run: str, parts: Sequence[int]) -> None:
    """Take away parts that no plan names. Best effort: left behind they cost space and nothing else."""
    try:
        for number in parts:
            ledger.store.delete(f"jobs/{job}/{run}/prompts/part-{number:05d}.parquet")
    except FarmError:
        return


def _freeze(
    request: Request,
    *,
    root: int,
    sink: Callable[[int, bytes], None] | None = None,
    known: KnownRows | None = None,
) -> Frozen:
    with placed(request.document):
        return freeze(
            request.manifest,
            card=request.card,
            params=request.params,
            points=request.points,
            root=root,
            open_store=request.open_store,
            sink=sink,
            known=known,
        )


def _plan(
    request: Request,
    frozen: Frozen,
    *,
    run: str,
    now: str,
    seeds: SeedRule,
    speed: Speed,
    appended_to: str | None = None,
) -> Plan:
    images = frozen.table.rows * len(request.points) * seeds.count
    if images > MAX_IMAGES:
        raise ManifestError(
            f"{request.document.where(('prompts',))}: comes to {images:,} images, a job has at most {MAX_IMAGES:,}; "
            "take fewer prompts, seeds or sweep points, or make several jobs"
        )
    size = partial(
        shard_size,
        batch=request.numerics.batch,
        renderers=request.renderers,
        seconds_per_image=speed.seconds_per_image,
    )
    # Rows appended to a job are more of what was approved.
    pilot = None if appended_to else request.manifest.pilot
    return Plan.build(
        run=run,
        created_at=now,
        manifest=request.manifest,
        card=request.card,
        prompts=frozen.table,
        seeds=seeds,
        sweep=request.points,
        params=request.params,
        numerics=request.numerics,
        shard_images=size(images=images),
        pilot=pilot,
        pilot_shard_images=None if pilot is None else size(images=pilot),
        owner=request.owner,
        estimated_seconds_per_image=speed.seconds_per_image,
        appended_to=appended_to,
    )


def _seed_rule(request: Request, bits: Bits) -> SeedRule:
    manifest = request.manifest
    if isinstance(manifest.seeds, tuple):
        seeds: tuple[int, ...] = ()
        for seed in manifest.seeds:
            while seed == -1 or (seed in seeds):
                drawn = bits(32)
                seed = -1 if drawn in manifest.seeds else drawn
            seeds += (seed,)
        return SeedRule(rule="listed", count=len(seeds), seeds=seeds)
    rule = manifest.seeds.rule or ("key" if manifest.keyed else "slot")
    root = bits(32) if rule == "random" else manifest.seeds.root or 0
    return SeedRule(rule=rule, count=manifest.seeds.count, root=root)


def _sizes(plan: Plan, frozen: Frozen) -> dict[tuple[int, int], int]:
    sizes: dict[tuple[int, int], int] = {}
    for (width, height), rows in frozen.sizes.items():
        for point in plan.sweep:
            params = merged(plan.params, point, ParamOverrides(width=width, height=height))
            size = params.width, params.height
            sizes[size] = sizes.get(size, 0) + rows * plan.seeds.count
    return sizes


def _stride(per_row: int) -> int:
    """Return a step through the first images that shows several prompts where each has many images."""
    return max(per_row // 2, 1)
