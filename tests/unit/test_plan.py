"""Index arithmetic, seeds, shard sizes and digests."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.cardparts import Acceleration, Adapter, Source
from farm.errors import ManifestError, NewerVersionError
from farm.manifest import Manifest
from farm.modelcard import ParamOverrides
from farm.plan import (
    Numerics,
    Plan,
    PromptRow,
    PromptTable,
    SeedRule,
    canonical_digest,
    card_identity,
    shard_size,
)
from tests.unit.finished_jobs import CARD

KEY_SEED = 728784653
SLOT_SEED = 280176289


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "run": "0a1b2c3d",
        "created_at": "2026-01-01T00:00:00Z",
        "manifest": Manifest.model_validate({"name": "job", "model": "shapes", "prompts": ["a"]}),
        "card": CARD,
        "prompts": PromptTable(rows=3, parts=1, keyed=False, digest="0" * 64),
        "seeds": SeedRule(rule="shared", count=2),
        "sweep": (ParamOverrides(num_inference_steps=4), ParamOverrides(num_inference_steps=8)),
        "params": CARD.defaults,
        "numerics": Numerics(device="cpu", dtype="float32", batch=4, threads=1, versions={"torch": "2.13.0"}),
        "shard_images": 4,
    }
    return Plan.build(**{**fields, **changes})


COUNTS = st.integers(1, 2**17)


@given(rows=COUNTS, points=st.integers(1, 6), seeds=COUNTS, data=st.data())
def test_index_and_place_are_each_others_inverse(rows: int, points: int, seeds: int, data: st.DataObject) -> None:
    made = plan(
        prompts=PromptTable(rows=rows, parts=1, keyed=False, digest=""),
        sweep=tuple(ParamOverrides(width=64 * (at + 1)) for at in range(points)),
        seeds=SeedRule(rule="slot", count=seeds),
    )
    assert made.images == rows * points * seeds
    index = data.draw(st.integers(0, made.images - 1))
    row, point, slot = made.locate(index)
    assert (row in range(rows), point in range(points), slot in range(seeds)) == (True, True, True)
    assert made.index(row, point, slot) == index == (row * points + point) * seeds + slot


@given(rows=st.integers(1, 300), shard_images=st.integers(1, 500))
def test_shards_partition_the_images(rows: int, shard_images: int) -> None:
    made = plan(prompts=PromptTable(rows=rows, parts=1, keyed=False, digest=""), shard_images=shard_images)
    ranges = [made.shard_range(shard) for shard in range(made.shards)]
    assert [index for one in ranges for index in one] == list(range(made.images))
    assert all(len(one) == shard_images for one in ranges[:-1])
    assert ranges[-1]


@given(
    images=st.integers(1, 10**9),
    batch=st.integers(1, 64),
    renderers=st.integers(1, 2000),
    seconds=st.none() | st.floats(1e-4, 1e4),
)
def test_shards_are_whole_batches_and_never_hoard(
    images: int, batch: int, renderers: int, seconds: float | None
) -> None:
    size = shard_size(images=images, batch=batch, renderers=renderers, seconds_per_image=seconds)
    assert size % batch == 0
    assert batch <= size <= 10_000
    assert size == batch or size * renderers * 4 <= images


@pytest.mark.parametrize(
    ("images", "renderers", "seconds", "size"),
    [
        (10_000_000, 10, 1.0, 176),  # three minutes in whole batches
        (10_000_000, 10, 0.001, 10_000),
        (10_000_000, 10, None, 64),
        (10_000_000, 10, 1000.0, 8),
        (40, 1, 0.1, 8),
        (400, 1, 0.1, 96),
        (0 + 5, 1, 0.1, 8),
    ],
)
def test_shard_size_by_speed(images: int, renderers: int, seconds: float | None, size: int) -> None:
    assert shard_size(images=images, batch=8, renderers=renderers, seconds_per_image=seconds) == size


def test_spec_merges_params_sweep_and_row() -> None:
    row = PromptRow("a star", "k1", ParamOverrides(guidance_scale=0.0, negative_prompt="blur"), {"source": "web"})
    spec = plan().spec(7, row)
    assert (spec.index, spec.row, spec.key, spec.prompt, spec.seed, spec.carry) == (
        7,
        1,
        "k1",
        "a star",
        1,
        {"source": "web"},
    )
    assert spec.params == CARD.defaults.model_copy(
        update={"num_inference_steps": 8, "guidance_scale": 0.0, "negative_prompt": "blur"}
    )


def test_indexes_out_of_range_are_refused() -> None:
    with pytest.raises(IndexError, match="job job has images 0 to 11, not 12"):
        plan().locate(12)
    with pytest.raises(IndexError, match="job job has shards 0 to 2, not 3"):
        plan().shard_range(3)


def test_seed_rules() -> None:
    assert [SeedRule(rule="listed", count=2, seeds=(7, 9)).seed(5, None, slot) for slot in (0, 1)] == [7, 9]
    assert [SeedRule(rule="shared", count=2, root=10).seed(row, None, 1) for row in (0, 9)] == [11, 11]
    by_key = SeedRule(rule="key", count=2)
    assert by_key.seed(0, "cap-1", 1) == by_key.seed(99, "cap-1", 1) != by_key.seed(0, "cap-2", 1)
    by_row = SeedRule(rule="slot", count=2)
    assert by_row.seed(3, "a", 0) == by_row.seed(3, "b", 0) != by_row.seed(4, "a", 0)
    assert SeedRule(rule="random", count=1, root=5).seed(0, None, 0) != SeedRule(rule="random", count=1, root=6).seed(
        0, None, 0
    )


def test_seeds_never_change_between_versions() -> None:
    assert SeedRule(rule="key", count=1).seed(0, "cap-001", 0) == KEY_SEED
    assert SeedRule(rule="slot", count=1).seed(12, None, 3) == SLOT_SEED


@given(
    st.sampled_from(["shared", "slot", "random", "key"]),
    st.integers(0, 2**31),
    st.integers(0, 2**53),
    st.integers(0, 99),
)
def test_seeds_stay_in_range(rule: Any, root: int, row: int, slot: int) -> None:
    assert 0 <= SeedRule(rule=rule, count=100, root=root).seed(row, "key", slot) < 2**32


def test_all_sweep_points_share_seeds() -> None:
    row = PromptRow("a", None, ParamOverrides(), {})
    made = plan(seeds=SeedRule(rule="slot", count=2))
    assert made.spec(0, row).seed == made.spec(2, row).seed != made.spec(1, row).seed


def test_digest_follows_pixels_and_nothing_else() -> None:
    digest = plan().digest
    manifest = Manifest.model_validate({"name": "job", "model": "shapes", "prompts": ["a"], "priority": 90})
    assert plan(run="ffffffff", created_at="later", manifest=manifest).digest == digest
    changed = [
        plan(seeds=SeedRule(rule="shared", count=2, root=1)),
        plan(sweep=(ParamOverrides(),)),
        plan(params=CARD.defaults.model_copy(update={"guidance_scale": 1.0})),
        plan(shard_images=8),
        plan(prompts=PromptTable(rows=3, parts=1, keyed=False, digest="1" * 64)),
        plan(card=CARD.model_copy(update={"source": CARD.source.model_copy(update={"revision": "abc"})})),
        plan(numerics=plan().numerics.model_copy(update={"batch": 8})),
    ]
    assert len({digest, *(one.digest for one in changed)}) == 8


def test_plan_survives_json() -> None:
    made = plan()
    assert Plan.model_validate_json(made.model_dump_json()) == made


def test_plan_of_version_1_has_no_owner_and_no_pilot() -> None:
    old = json.loads(plan().model_dump_json()) | {"version": 1}
    for name in ("owner", "pilot", "pilot_shard_images", "estimated_seconds_per_image"):
        del old[name]
    for name in ("pilot", "finish_by", "budget"):
        del old["manifest"][name]
    read = Plan.model_validate_json(json.dumps(old))
    assert (read.version, read.owner, read.pilot, read.digest) == (1, "", None, plan().digest)


def test_a_pilot_is_in_the_digest_and_has_shards_of_its_own() -> None:
    made = plan(pilot=5, pilot_shard_images=2, owner="alice")
    assert (made.pass_shard_images(1), made.pass_shard_images(2), made.shards) == (2, 4, 3 + 2)
    assert len({plan().digest, made.digest, plan(pilot=6, pilot_shard_images=2).digest, plan(pilot=5).digest}) == 4
    assert plan(pilot=5, pilot_shard_images=2, owner="bob").digest == made.digest


def test_a_pilot_of_all_images_is_none() -> None:
    made = plan(pilot=12, pilot_shard_images=2)
    assert (made.pilot, made.pilot_shard_images, made.shards, made.digest) == (None, None, 3, plan().digest)


def test_plan_of_a_newer_farm_is_refused_before_anything_else() -> None:
    data = {"version": 99, "job": "job", "unheard": 1}
    with pytest.raises(NewerVersionError, match="plan of job job: version 99 was written by a newer farm"):
        Plan.model_validate_json(json.dumps(data))


def test_more_than_2_to_the_53_images_are_refused() -> None:
    with pytest.raises(ManifestError, match="images, more than the 9007199254740992 a job may have"):
        plan(prompts=PromptTable(rows=2**52, parts=0, keyed=False, digest=""))


def test_what_is_laid_over_a_models_weights_is_part_of_its_identity() -> None:
    plain = card_identity(CARD, "cuda")
    adapter = Adapter(path="/loras", file="l.safetensors", name="l", revision="sha256:1")
    changes: list[dict[str, object]] = [
        {"adapters": (adapter,)},
        {"adapters": (adapter.model_copy(update={"weight": 0.5}),)},
        {"decoder": Source(hub="some/vae", revision="0" * 40)},
        {"quantise": {"encoder": "nf4"}},
        {"options": {"shift": 6.0}},
        {"acceleration": {"cuda": Acceleration(compile=True)}},
        {"code": {"pipeline.py": "0" * 64}},
        {"code": {"pipeline.py": "1" * 64}},
    ]
    identities = [plain, *(card_identity(CARD.model_copy(update=change), "cuda") for change in changes)]
    assert len({canonical_digest(identity) for identity in identities}) == 9
    moved = adapter.model_copy(update={"path": "/elsewhere"})
    assert card_identity(CARD.model_copy(update={"adapters": (moved,)}), "cuda") == identities[1]
    assert not {"adapters", "code"} & plain.keys()
    for nothing in ({"cuda": Acceleration()}, {"cpu": Acceleration(compile=True)}):
        assert card_identity(CARD.model_copy(update={"acceleration": nothing}), "cuda") == plain
