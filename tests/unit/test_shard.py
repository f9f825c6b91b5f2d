"""Shards with a family without torch: receipts, the failure ladder, stores that fail, cancels."""

import threading
import time
import weakref
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.drawing import ShardProgress
from farm.errors import (
    CancelledError,
    DeviceLostError,
    ObjectMissingError,
    OutOfMemoryError,
    StoreUnavailableError,
)
from farm.ledger import Ledger
from farm.meters import Meters
from farm.plan import ImageSpec, Plan
from farm.provenance import read_provenance
from farm.receipt import Receipt
from farm.records import Totals
from farm.shard import ShardRunner
from tests.drawing import FakeFamily, engine, ledger, on_device, plan

PROMPTS = [f"prompt {i}" for i in range(8)]


def run(store: Ledger, planned: Plan, family: FakeFamily, **changes: Any) -> Receipt:
    arguments: dict[str, Any] = {
        "pass_number": 1,
        "shard": 0,
        "attempt": 1,
        "engine": lambda _: engine(family),
        "on_device": on_device(),
    }
    return ShardRunner(store, planned, renderer="renderer-1", device="cpu").run(**arguments | changes)


def writer_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("writer-")]


def test_a_shard_ends_in_a_receipt_whose_objects_are_there(tmp_path: Path) -> None:
    store, planned = ledger(tmp_path), plan(PROMPTS)
    receipt = run(store, planned, FakeFamily())
    assert store.receipt(planned, 1, 0) == receipt
    assert [row.index for row in receipt.rows] == list(range(8))
    assert {(row.status, row.alone, row.renderer, row.attempt) for row in receipt.rows} == {
        ("ok", False, "renderer-1", 1)
    }
    assert (receipt.start, receipt.stop) == (0, 8)
    assert sorted(receipt.seconds) == ["decode", "denoise", "encode", "load", "total", "write"]
    assert {"torch", "pillow", "farm"} <= set(receipt.versions)
    for row in receipt.rows:
        assert row.object is not None
        found = read_provenance(store.store.get(row.object))
        assert (found.index, found.prompt, found.seed, found.plan) == (row.index, row.prompt, row.seed, planned.digest)


def test_rows_carry_the_codes_of_what_is_known_against_their_prompts(tmp_path: Path) -> None:
    prompts = [
        "nike shoes",
        "<general_tags><objects>nike_shoes</objects></general_tags>",
        "a sound prompt",
        "long " * 100,
    ]
    receipt = run(ledger(tmp_path), plan(prompts), FakeFamily())
    assert [row.warnings for row in receipt.rows] == ["brand", "xml_unread,brand", None, "long_prompt"]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    planned = plan(PROMPTS)
    one, two = (run(ledger(tmp_path / name), planned, FakeFamily()) for name in "ab")
    assert [row.sha256 for row in one.rows] == [row.sha256 for row in two.rows]


def test_a_receipt_that_is_there_is_returned_and_nothing_rendered(tmp_path: Path) -> None:
    store, planned = ledger(tmp_path), plan(PROMPTS)
    first = run(store, planned, FakeFamily())
    family = FakeFamily()
    assert run(store, planned, family, attempt=2) == first
    assert family.denoised == []


def test_the_loser_of_a_race_returns_the_winners_receipt(tmp_path: Path) -> None:
    store, planned = ledger(tmp_path), plan(PROMPTS)
    won: list[Receipt] = []

    def overtake(specs: Sequence[ImageSpec]) -> None:
        if not won:
            won.append(run(ledger(tmp_path), planned, FakeFamily(), attempt=2))

    assert run(store, planned, FakeFamily(overtake)) == won[0]
    assert won[0].attempt == 2


def test_a_batch_that_fails_once_is_rendered_again_as_it_was(tmp_path: Path) -> None:
    family = FakeFamily()
    failures = iter([RuntimeError("a cosmic ray")])

    def trouble(specs: Sequence[ImageSpec]) -> None:
        if 4 in [image.index for image in specs]:
            for failure in failures:
                raise failure

    family.trouble = trouble
    receipt = run(ledger(tmp_path), plan(PROMPTS), family)
    assert family.denoised == [(0, 1, 2, 3), (4, 5, 6, 7), (4, 5, 6, 7)]
    assert {(row.status, row.alone) for row in receipt.rows} == {("ok", False)}


def test_a_prompt_that_fails_alone_fails_alone(tmp_path: Path) -> None:
    family = FakeFamily()

    def trouble(specs: Sequence[ImageSpec]) -> None:
        if "prompt 5" in [image.prompt for image in specs]:
            raise ValueError("cannot draw five")

    family.trouble = trouble
    progress: list[ShardProgress] = []
    receipt = run(ledger(tmp_path), plan(PROMPTS), family, on_progress=progress.append)
    assert family.denoised == [(0, 1, 2, 3), (4, 5, 6, 7), (4, 5, 6, 7), (4,), (5,), (6,), (7,)]
    assert [row.status for row in receipt.rows] == ["ok"] * 5 + ["failed"] + ["ok"] * 2
    assert [row.alone for row in receipt.rows] == [False] * 4 + [True] * 4
    failed = receipt.rows[5]
    assert (failed.error_code, failed.object, failed.sha256) == ("render", None, None)
    assert failed.error_message == "could not denoise images 5: ValueError: cannot draw five"
    assert [step.in_hand for step in progress if step.announce] == [(4,), (5,), (6,), (7,)]


def test_a_prompt_that_cannot_be_encoded_ahead_fails_alone(tmp_path: Path) -> None:
    class Choosy(FakeFamily):
        encodes_ahead = True

        def encode(self, tokens: Any) -> Any:
            if bytes(tokens.ids) == b"prompt 2":
                raise ValueError("no such word")
            return super().encode(tokens)

    receipt = run(ledger(tmp_path), plan(PROMPTS), Choosy())
    assert [row.index for row in receipt.rows if row.status == "failed"] == [2]
    assert receipt.rows[2].error_message == "could not encode a prompt: ValueError: no such word"


def test_out_of_memory_halves_the_batch_and_fails_nothing(tmp_path: Path) -> None:
    family = FakeFamily()

    def trouble(specs: Sequence[ImageSpec]) -> None:
        if len(specs) > 1 and specs[0].index >= 4:
            raise OutOfMemoryError("no memory left")

    family.trouble = trouble
    receipt = run(ledger(tmp_path), plan(PROMPTS), family)
    assert family.denoised == [(0, 1, 2, 3), (4, 5, 6, 7), (4, 5), (4,), (5,), (6, 7), (6,), (7,)]
    assert {row.status for row in receipt.rows} == {"ok"}
    assert [row.alone for row in receipt.rows] == [False] * 4 + [True] * 4


def test_out_of_memory_for_a_single_image_is_its_own_failure(tmp_path: Path) -> None:
    def trouble(specs: Sequence[ImageSpec]) -> None:
        if 6 in [image.index for image in specs]:
            raise OutOfMemoryError("no memory left")

    receipt = run(ledger(tmp_path), plan(PROMPTS), FakeFamily(trouble))
    assert [(row.index, row.error_code) for row in receipt.rows if row.status == "failed"] == [(6, "out_of_memory")]


def test_images_to_skip_become_failed_rows_and_their_batch_mates_are_marked(tmp_path: Path) -> None:
    family = FakeFamily()
    receipt = run(ledger(tmp_path), plan(PROMPTS), family, skip=frozenset({5}))
    assert family.denoised == [(0, 1, 2, 3), (4, 6, 7)]
    assert (receipt.rows[5].status, receipt.rows[5].error_code) == ("failed", "renderer_died")
    assert [row.index for row in receipt.rows if row.alone] == [4, 6, 7]


def test_a_shard_of_nothing_but_skipped_images_needs_no_model(tmp_path: Path) -> None:
    def no_engine(_: Plan) -> Any:
        raise AssertionError("the model was asked for")

    receipt = run(ledger(tmp_path), plan(PROMPTS), FakeFamily(), skip=frozenset(range(8)), engine=no_engine)
    assert receipt.failed == 8


def test_images_to_render_alone_are_announced_and_leave_their_batch(tmp_path: Path) -> None:
    family = FakeFamily()
    progress: list[ShardProgress] = []
    receipt = run(
        ledger(tmp_path),
        plan(PROMPTS),
        family,
        alone=frozenset({1, 2}),
        skip=frozenset({2}),
        on_progress=progress.append,
    )
    assert family.denoised == [(0, 3), (1,), (4, 5, 6, 7)]
    assert [step.in_hand for step in progress if step.announce] == [(1,)]
    assert [row.index for row in receipt.rows if row.alone] == [0, 1, 3]


def test_a_picture_of_no_numbers_is_a_failed_row_and_a_black_one_is_flagged(tmp_path: Path) -> None:
    receipt = run(ledger(tmp_path), plan(["a", "nan", "black"], shard_images=4), FakeFamily())
    assert [(row.status, row.error_code, row.flag) for row in receipt.rows] == [
        ("ok", None, None),
        ("failed", "nan_picture", None),
        ("ok", None, "black"),
    ]
    assert receipt.rows[1].error_message is not None
    assert "no finite numbers (NaN)" in receipt.rows[1].error_message


def test_a_store_that_fails_is_raised_and_leaves_no_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, planned = ledger(tmp_path), plan(PROMPTS)
    device = on_device()

    def put(key: str, data: bytes, **_: Any) -> None:
        raise StoreUnavailableError("the bucket does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(store.store, "put", put)
        with pytest.raises(StoreUnavailableError, match="does not answer"):
            run(store, planned, FakeFamily(), on_device=device)
    with pytest.raises(ObjectMissingError):
        store.receipt(planned, 1, 0)
    assert not device.locked()
    assert writer_threads() == []
    assert run(store, planned, FakeFamily()).failed == 0


def test_a_cancelled_shard_leaves_no_receipt_and_no_threads(tmp_path: Path) -> None:
    store, planned = ledger(tmp_path), plan(PROMPTS)
    progress: list[ShardProgress] = []
    device = on_device()
    with pytest.raises(CancelledError):
        run(
            store,
            planned,
            FakeFamily(),
            on_progress=progress.append,
            cancelled=lambda: bool(progress) and progress[-1].fraction > 0.6,
            on_device=device,
        )
    assert progress[-1].in_hand == (4, 5, 6, 7)
    with pytest.raises(ObjectMissingError):
        store.receipt(planned, 1, 0)
    assert not device.locked()
    assert writer_threads() == []


def test_a_shard_that_waits_for_the_device_hears_a_cancel(tmp_path: Path) -> None:
    device = on_device()
    with device, pytest.raises(CancelledError, match="while it waited for the device"):
        run(ledger(tmp_path), plan(PROMPTS), FakeFamily(), on_device=device, cancelled=lambda: True)


def test_progress_only_grows_and_tells_the_last_batch(tmp_path: Path) -> None:
    progress: list[ShardProgress] = []
    run(ledger(tmp_path), plan(PROMPTS), FakeFamily(), on_progress=progress.append)
    drawing = [step for step in progress if step.stage != "write"]
    assert [step.fraction for step in drawing] == sorted(step.fraction for step in drawing)
    assert sorted(step.ticks for step in progress) == list(range(1, len(progress) + 1))
    assert {step.in_hand for step in drawing if step.last_batch} == {(4, 5, 6, 7), ()}
    assert progress[-1].fraction == 1.0
    assert [step.ticks for step in progress] == list(range(1, len(progress) + 1))


def test_nothing_is_in_hand_between_batches(tmp_path: Path) -> None:
    progress: list[ShardProgress] = []
    run(ledger(tmp_path), plan(PROMPTS), FakeFamily(), on_progress=progress.append)
    hands = [hand for hand, _ in groupby(step.in_hand for step in progress)]
    assert hands == [(), (0, 1, 2, 3), (), (4, 5, 6, 7), ()]


def test_from_the_second_attempt_on_every_batch_is_announced_before_it_starts(tmp_path: Path) -> None:
    family = FakeFamily()
    announced: list[tuple[tuple[int, ...], int]] = []

    def on_progress(step: ShardProgress) -> None:
        if step.announce:
            announced.append((step.in_hand, len(family.denoised)))

    def trouble(specs: Sequence[ImageSpec]) -> None:
        if len(specs) > 2 and specs[0].index >= 4:
            raise OutOfMemoryError("no memory left")

    family.trouble = trouble
    run(ledger(tmp_path), plan(PROMPTS), family, attempt=2, on_progress=on_progress)
    assert announced == [((0, 1, 2, 3), 0), ((4, 5, 6, 7), 1), ((4, 5), 2), ((6, 7), 3)]


def test_progress_of_the_writers_threads_never_overtakes_the_renders(tmp_path: Path) -> None:
    inside = threading.Lock()
    ticks: list[int] = []

    def on_progress(step: ShardProgress) -> None:
        assert inside.acquire(blocking=False), "two threads publish at once"
        time.sleep(0.001)
        ticks.append(step.ticks)
        inside.release()

    assert run(ledger(tmp_path), plan(PROMPTS), FakeFamily(), on_progress=on_progress).failed == 0
    assert ticks == list(range(1, len(ticks) + 1))


def test_a_failed_batch_is_let_go_of_before_its_halves_are_drawn(tmp_path: Path) -> None:
    held: list[weakref.ref[np.ndarray]] = []
    alive: list[tuple[tuple[int, ...], list[bool]]] = []

    class Hungry(FakeFamily):
        def denoise(self, specs: Sequence[ImageSpec], noise: Any, **options: Any) -> Any:
            alive.append((tuple(image.index for image in specs), [ref() is not None for ref in held]))
            tensor = np.zeros(16)
            held.append(weakref.ref(tensor))
            if len(specs) == 4:
                raise OutOfMemoryError("no memory left")
            if specs[0].index == 4:
                raise ValueError(f"no such shape: {tensor.shape}")
            return super().denoise(specs, noise, **options)

    family = Hungry()
    receipt = run(ledger(tmp_path), plan(PROMPTS), family)
    assert [indexes for indexes, _ in alive] == [
        *[(0, 1, 2, 3), (0, 1), (2, 3)],
        *[(4, 5, 6, 7), (4, 5), (4, 5), (4,), (5,), (6, 7)],
    ]
    assert not any(flag for _, flags in alive for flag in flags)
    assert family.recovered == 5
    assert [row.index for row in receipt.rows if row.status == "failed"] == [4]


def test_a_lost_device_is_nobodys_row_and_leaves_no_receipt(tmp_path: Path) -> None:
    def trouble(specs: Sequence[ImageSpec]) -> None:
        raise DeviceLostError("cuda:0 failed and could not denoise: an illegal memory access was encountered")

    store, device, family = ledger(tmp_path), on_device(), FakeFamily(trouble)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        run(store, plan(PROMPTS), family, on_device=device)
    assert family.denoised == [(0, 1, 2, 3)]
    with pytest.raises(ObjectMissingError):
        store.receipt(plan(PROMPTS), 1, 0)
    assert not device.locked()
    assert writer_threads() == []


def test_a_prompt_that_the_tokenizer_fails_on_fails_alone(tmp_path: Path) -> None:
    class Choosy(FakeFamily):
        def tokenize(self, prompt: str) -> Any:
            if prompt == "prompt 2":
                raise ValueError("no such word")
            return super().tokenize(prompt)

    family = Choosy()
    receipt = run(ledger(tmp_path), plan(PROMPTS), family)
    assert [(row.index, row.error_code) for row in receipt.rows if row.status == "failed"] == [(2, "render")]
    assert receipt.rows[2].error_message == "could not cut a prompt into tokens: ValueError: no such word"
    assert family.denoised == [(0, 1, 3, 4), (5, 6, 7)]


def test_a_tokenizer_that_fails_once_changes_no_batch(tmp_path: Path) -> None:
    class Once(FakeFamily):
        failures = iter([ValueError("a cosmic ray")])

        def tokenize(self, prompt: str) -> Any:
            for failure in self.failures:
                raise failure
            return super().tokenize(prompt)

    family = Once()
    assert run(ledger(tmp_path), plan(PROMPTS), family).failed == 0
    assert family.denoised == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_shards_of_a_later_pass_render_its_list(tmp_path: Path) -> None:
    store, planned = ledger(tmp_path), plan(PROMPTS)
    first = run(store, planned, FakeFamily())
    totals = Totals(
        images=8,
        ok=8,
        failed=0,
        flagged=0,
        failures_by_code={},
        bytes=1,
        seconds={},
        renderers=1,
        started_at=first.finished_at,
        finished_at=first.finished_at,
        wall_seconds=1.0,
    )
    store.put_totals(planned, 1, totals)
    assert store.open_pass(planned, 2, np.array([2, 7]))
    receipt = run(store, planned, FakeFamily(), pass_number=2)
    assert [row.index for row in receipt.rows] == [2, 7]
    assert (receipt.start, receipt.stop, receipt.rows[0].pass_number) == (0, 2, 2)
    assert ".p2a1-" in str(receipt.rows[0].object)


def test_shards_of_a_pilot_and_of_the_others_name_their_places_in_the_pass(tmp_path: Path) -> None:
    store = ledger(tmp_path)
    planned = plan(PROMPTS, shard_images=4).model_copy(update={"pilot": 3, "pilot_shard_images": 2})
    last = run(store, planned, FakeFamily(), shard=1)
    assert ([row.index for row in last.rows], last.start, last.stop) == ([5], 2, 3)
    run(store, planned, FakeFamily(), shard=0)
    store.put_totals(
        planned,
        1,
        Totals(
            images=3,
            ok=3,
            failed=0,
            flagged=0,
            failures_by_code={},
            bytes=1,
            seconds={},
            renderers=1,
            started_at="2026-01-01T00:00:00+00:00",
            finished_at="2026-01-01T00:00:00+00:00",
            wall_seconds=1.0,
        ),
    )
    store.open_pass(planned, 2, None)
    other = run(store, planned, FakeFamily(), pass_number=2, shard=0)
    assert (other.start, other.stop, len(other.rows)) == (0, 4, 4)
    assert {row.prompt for row in other.rows} == {PROMPTS[row.index] for row in other.rows}


def test_a_cautious_shard_draws_and_encodes_each_image_in_its_turn_and_announces_it(tmp_path: Path) -> None:
    family = FakeFamily()
    progress: list[ShardProgress] = []
    receipt = run(ledger(tmp_path), plan(PROMPTS), family, cautious=True, on_progress=progress.append)
    assert family.denoised == [(index,) for index in range(8)]
    assert [step.in_hand for step in progress if step.announce] == [(index,) for index in range(8)]
    assert all(row.alone for row in receipt.rows)
    first_encode = next(number for number, step in enumerate(progress) if step.stage == "encode")
    assert progress[first_encode].in_hand == (0,)


def test_what_a_receipt_tells_is_counted_once_by_who_stored_it(tmp_path: Path) -> None:
    store, planned = ledger(tmp_path), plan(["a", "nan", "black"], shard_images=4)
    meters = Meters("renderer-1", "a")
    runner = ShardRunner(store, planned, renderer="renderer-1", device="cpu", meters=meters)
    arguments: dict[str, Any] = {"pass_number": 1, "shard": 0, "attempt": 1, "on_device": on_device()}
    receipt = runner.run(**arguments, engine=lambda _: engine(FakeFamily()))
    assert runner.run(**arguments, engine=lambda _: engine(FakeFamily())) == receipt
    model, counted = planned.card.name, {(s.name, *dict(s.labels).values()): s.value for s in meters.snapshot().samples}
    assert counted["farm_images_total", model, "bulk", "ok"] == 2
    assert counted["farm_images_total", model, "bulk", "failed"] == 1
    assert counted["farm_failures_total", "bulk", "nan_picture"] == 1
    assert counted["farm_stored_bytes_total", "bulk"] == sum(row.size_bytes or 0 for row in receipt.rows) > 0
    for stage in ("encode", "denoise", "decode", "write"):
        assert counted["farm_stage_seconds_total", model, "bulk", stage] == receipt.seconds[stage]


def test_the_loser_of_a_race_counts_nothing(tmp_path: Path) -> None:
    store, planned, meters = ledger(tmp_path), plan(PROMPTS), Meters("renderer-2", "a")
    won: list[Receipt] = []

    def overtake(specs: Sequence[ImageSpec]) -> None:
        if not won:
            won.append(run(ledger(tmp_path), planned, FakeFamily()))

    runner = ShardRunner(store, planned, renderer="renderer-2", device="cpu", meters=meters)
    receipt = runner.run(
        pass_number=1, shard=0, attempt=1, engine=lambda _: engine(FakeFamily(overtake)), on_device=on_device()
    )
    assert receipt == won[0]
    assert meters.snapshot().samples == ()
