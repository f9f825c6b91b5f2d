"""Small jobs in a folder, as a farm would have left them: for tests of what reads them."""

import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from PIL import Image

from farm.cardparts import Source
from farm.export import finalise
from farm.ledger import Ledger
from farm.manifest import Manifest
from farm.modelcard import ModelCard, ParamOverrides, RenderParams
from farm.plan import Numerics, Plan, PromptTable, Scalar, SeedRule
from farm.receipt import ImageRow, Receipt
from farm.records import Totals
from farm.storage.local import LocalStore
from farm.sweep import Template

CARD = ModelCard(
    name="shapes",
    title="Shapes",
    family="sleep",
    source=Source(),
    licence="Apache-2.0",
    dtypes={"cpu": ("float32",)},
    batch={"cpu": 4},
    defaults=RenderParams(width=64, height=64, num_inference_steps=4, guidance_scale=2.5),
)


def make_ledger(folder: Path) -> Ledger:
    """An empty ledger in a folder."""
    return Ledger(LocalStore(folder))


def make_plan(
    *,
    job: str = "shapes",
    run: str = "0a1b2c3d",
    rows: int = 5,
    seeds: int = 2,
    shard_images: int = 4,
    pilot: int | None = None,
    pilot_shard_images: int | None = None,
    **manifest_fields: object,
) -> Plan:
    """A plan of rows x seeds images."""
    prompts = [f"shape number {row}" for row in range(rows)]
    manifest = Manifest.model_validate(
        {"name": job, "model": "shapes", "prompts": prompts, "seeds": {"count": seeds}, "pilot": pilot}
        | manifest_fields
    )
    return Plan.build(
        run=run,
        created_at="2026-11-21T10:00:00+00:00",
        manifest=manifest,
        card=CARD,
        prompts=PromptTable(
            rows=rows,
            parts=0,
            keyed=False,
            digest="0" * 64,
            template=Template(text="shape number {number}", vary={"number": tuple(str(row) for row in range(rows))}),
        ),
        seeds=SeedRule(rule="slot", count=seeds),
        sweep=(ParamOverrides(),),
        params=CARD.defaults,
        numerics=Numerics(device="cpu", dtype="float32", batch=4, threads=1, versions={"torch": "2.13.0"}),
        shard_images=shard_images,
        pilot=pilot,
        pilot_shard_images=pilot_shard_images,
    )


def make_row(
    ledger: Ledger,
    plan: Plan,
    index: int,
    *,
    pass_number: int = 1,
    failed: bool = False,
    key: str | None = None,
    carry: Mapping[str, Scalar] = {},
) -> ImageRow:
    """The row of one image, its picture stored."""
    place, _, slot = plan.locate(index)
    data = picture_bytes(index)
    sha256 = hashlib.sha256(data).hexdigest()
    named = f"{index:09d}_{key}" if key else f"{index:09d}"
    object_key = f"jobs/{plan.job}/{plan.run}/images/{index // 1000:06d}/{named}.p{pass_number}a1-{sha256[:8]}.png"
    if not failed:
        ledger.store.put(object_key, data)
    return ImageRow(
        index=index,
        key=key,
        prompt=f"shape number {place}",
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=2.5,
        seed=plan.seeds.seed(place, None, slot),
        status="failed" if failed else "ok",
        object=None if failed else object_key,
        thumbnail=None,
        size_bytes=None if failed else len(data),
        sha256=None if failed else sha256,
        phash=None if failed else "0f" * 8,
        flag=None,
        error_code="render" if failed else None,
        error_message="the pipeline failed: tensor of the wrong shape" if failed else None,
        pass_number=pass_number,
        attempt=1,
        alone=False,
        seconds=0.5,
        renderer="renderer-0",
        device="CPU",
        carry=dict(carry),
    )


def picture_bytes(index: int) -> bytes:
    """A small PNG that differs from image to image."""
    picture = Image.new("RGB", (64, 64), (index * 37 % 256, index * 91 % 256, 120))
    picture.paste((255, 255, 255), (8, 8, 24, 24))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def commit_shard(
    ledger: Ledger,
    plan: Plan,
    shard: int,
    *,
    pass_number: int = 1,
    failed: Collection[int] = (),
    keys: Sequence[str | None] = (),
    carry: Mapping[int, Mapping[str, Scalar]] = {},
) -> Receipt:
    """Store a shard's pictures and its receipt."""
    indexes = ledger.shard_indexes(plan, pass_number, shard)
    start = shard * plan.pass_shard_images(pass_number)
    receipt = Receipt(
        job=plan.job,
        run=plan.run,
        pass_number=pass_number,
        shard=shard,
        start=start,
        stop=start + len(indexes),
        attempt=1,
        renderer="renderer-0",
        device="CPU",
        versions={"torch": "2.13.0"},
        finished_at=f"2026-11-2{pass_number}T10:0{min(shard, 9)}:10+00:00",
        seconds={"denoise": 4.0, "write": 0.5, "total": 5.0},
        rows=tuple(
            make_row(
                ledger,
                plan,
                index,
                pass_number=pass_number,
                failed=index in failed,
                key=keys[plan.locate(index)[0]] if keys else None,
                carry=carry.get(index, {}),
            )
            for index in indexes
        ),
    )
    ledger.commit(plan, receipt)
    return receipt


def render_pass(ledger: Ledger, plan: Plan, number: int, *, failed: Collection[int] = ()) -> None:
    """Store every shard of a pass and close it, without a dataset."""
    for shard in range(ledger.pass_shards(plan, number)):
        commit_shard(ledger, plan, shard, pass_number=number, failed=failed)
    ledger.put_totals(plan, number, make_totals(images=ledger.covered(plan, number), failed=len(failed)))


def make_totals(*, images: int = 10, failed: int = 0, seconds: Mapping[str, float] = {}) -> Totals:
    """What a pass came to."""
    return Totals(
        images=images,
        ok=images - failed,
        failed=failed,
        flagged=0,
        failures_by_code={"render": failed} if failed else {},
        bytes=1000,
        seconds=dict(seconds),
        renderers=1,
        started_at="2026-11-21T10:00:00+00:00",
        finished_at="2026-11-21T10:01:00+00:00",
        wall_seconds=60.0,
    )


def make_job(
    folder: Path, *, job: str = "shapes", rows: int = 5, failed: Collection[int] = (), shards: int | None = None
) -> tuple[Ledger, Plan]:
    """A whole job, finalised; or with `shards` its first so many shards, open."""
    ledger, plan = make_ledger(folder), make_plan(job=job, rows=rows)
    ledger.open(plan.job)
    ledger.create_plan(plan, 1)
    for shard in range(plan.shards if shards is None else shards):
        commit_shard(ledger, plan, shard, failed=failed)
    if shards is None:
        finalise(ledger, plan, 1)
        ledger.close(plan.job)
    return ledger, plan
