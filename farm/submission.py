"""From a manifest to a plan: draft one, create it, or find the one that exists and say whether it is the same.

A plan is written last, after its prompt parts and the job's `open/` marker, and only if there is none: whatever kills
this between two writes leaves parts that nothing refers to, or a marker, and the next try completes the job. What was
drawn once (roots, seeds of -1, the run's name) is never drawn again: an equal manifest gets the plan that exists.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

from farm.comparison import compare, numerics_differences
from farm.errors import FarmError, ManifestError, PlanChangedError, PromptError, RowsAppendedError
from farm.knownrows import KnownRows
from farm.ledger import Ledger
from farm.manifest import PromptTemplate, SeedCount
from farm.modelcard import ParamOverrides, merged
from farm.plan import ImageSpec, Plan, SeedRule, shard_size
from farm.prompts import Frozen, freeze, known_rows
from farm.request import Request, Speed, prepare, speed_of

__all__ = ["Draft", "Request", "Speed", "Submission", "draft", "prepare", "submit"]

Bits = Callable[[int], int]
"""From a count of bits to that many random ones."""

MAX_IMAGES = 1_000_000_000
"""Indexes have nine digits in file names, and a job's shards are held in memory as a byte each."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a manifest would come to. Nothing was written for it.

    `sizes`: images by (width, height). `drawn`: seeds or prompts in `first` will be drawn anew when it is submitted.
    `state`: what submitting would do; `changes` says what differs. `seconds`: on all renderers together. `size_bytes`:
    of the pictures, where an earlier run of the job tells.
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


@dataclass(frozen=True, slots=True)
class Submission:
    """A job's plan, and whether it was there before.

    `numerics_differ`: what of this machine differs, as `torch: 2.13.0 -> 2.14.0`, from the plan's numerics, where rendering
    the plan here would mix; of a run created for appended rows, from those of the run before it. `waiting_rows`: appended
    rows that wait until the run in hand has ended.
    """

    plan: Plan
    outcome: Literal["created", "resumed"]
    numerics_differ: tuple[str, ...] = ()
    waiting_rows: int = 0


def draft(request: Request, ledger: Ledger | None = None) -> Draft:
    """Work out what submitting would do, without writing. Raises ManifestError, PromptError, StoreError."""
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
    if plans and ledger:
        found = compare(request, frozen.table, plans, ledger)
        state, changes = found.state, found.changes
        if state == "resume":
            plan = plans[-1]
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
    )


def submit(
    request: Request, ledger: Ledger, *, now: str, append: bool = False, bits: Bits = secrets.randbits
) -> Submission:
    """Create the job, or find the equal one that exists; `now` is ISO 8601, UTC.

    `append`: rows appended to a keyed prompt file become a new run of just those. While the run before is unfinished
    that one is resumed first, and `waiting_rows` says how many wait. Raises PlanChangedError when the job was planned
    from something else, RowsAppendedError when rows were appended and `append` is not set, and what `draft` raises.
    """
    plans = ledger.plans(request.manifest.name)
    if not plans:
        plan = _create(request, ledger, plans, now=now, bits=bits)
        if plan is not None:
            return Submission(plan, "created")
        plans = ledger.plans(request.manifest.name)
    newest = plans[-1]
    found = compare(request, _freeze(request, root=0).table, plans, ledger)
    if found.state == "changed":
        raise PlanChangedError(
            f"job {newest.job} exists and was planned from something else: {'; '.join(found.changes)}. "
            "Give this manifest a new name, or put the old values back"
        )
    finished = ledger.totals(newest) is not None
    if found.state == "appended":
        if not append:
            raise RowsAppendedError(
                f"job {newest.job} exists and {found.new} rows were added to its prompts since; --append renders just "
                "those, as a new run of the job"
            )
        if finished:
            plan = _create(request, ledger, plans, now=now, bits=bits)
            if plan is not None:
                return Submission(plan, "created", numerics_differences(newest.numerics, plan.numerics))
            return submit(request, ledger, now=now, append=append, bits=bits)
    if not finished:
        ledger.open(newest.job)
    return Submission(newest, "resumed", numerics_differences(newest.numerics, request.numerics), found.new)


def _create(request: Request, ledger: Ledger, plans: Sequence[Plan], *, now: str, bits: Bits) -> Plan | None:
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
        created = ledger.create_plan(plan, len(plans) + 1)
    except FarmError:
        _discard(ledger, job, run, written)
        raise
    if not created:
        _discard(ledger, job, run, written)
        return None
    return plan


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
    document = request.document
    try:
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
    except (ManifestError, PromptError) as exc:
        key = tuple(exc.message.partition(":")[0].split("."))
        if key[0] != "prompts":
            raise
        raise type(exc)(f"{document.where(key)}: {exc.message}") from exc


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
        shard_images=shard_size(
            images=images,
            batch=request.numerics.batch,
            renderers=request.renderers,
            seconds_per_image=speed.seconds_per_image,
        ),
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
