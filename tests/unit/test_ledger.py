"""The ledger over a folder: what is created once stays, and what is read back is what was meant."""

import io
import pickle
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.cardparts import Acceleration
from farm.errors import ControlError, NewerVersionError, ObjectMissingError, RecordError, UnknownJobError
from farm.ledger import Ledger
from farm.passes import Everything, Others
from farm.plan import Plan
from farm.receipt import ImageRow, Receipt
from farm.records import Control, Totals
from farm.status import images_done
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import make_plan
from tests.unit.profiles import make_profile, make_stages
from tests.unit.storage.test_contract import Unconditional

PLAN = make_plan(rows=5, seeds=2, shard_images=4)
ROOT = f"jobs/{PLAN.job}/{PLAN.run}"
TOTALS = Totals(
    images=10,
    ok=8,
    failed=2,
    flagged=0,
    failures_by_code={"render": 2},
    bytes=1000,
    seconds={"denoise": 4.0},
    renderers=1,
    started_at="2026-11-21T10:00:00+00:00",
    finished_at="2026-11-21T10:01:00+00:00",
    wall_seconds=60.0,
)


class CountingStore(LocalStore):
    """Counts what is read."""

    gets = 0

    def get(self, key: str) -> bytes:
        self.gets += 1
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path / "farm-data")


@pytest.fixture
def ledger(store: CountingStore) -> Ledger:
    return Ledger(store)


def row(index: int, *, pass_number: int = 1, failed: bool = False) -> ImageRow:
    return ImageRow(
        index=index,
        key=None,
        prompt=f"prompt of {index}",
        negative_prompt="",
        width=64,
        height=64,
        num_inference_steps=4,
        guidance_scale=2.5,
        seed=index,
        status="failed" if failed else "ok",
        object=None if failed else f"images/{index}.png",
        thumbnail=None,
        size_bytes=None if failed else 100,
        sha256=None,
        phash=None,
        flag=None,
        error_code="render" if failed else None,
        error_message=None,
        pass_number=pass_number,
        attempt=1,
        alone=False,
        seconds=0.1,
        renderer="renderer-0",
        device="CPU",
        carry={"source": "test"},
    )


def receipt(
    ledger: Ledger, shard: int, *, plan: Plan = PLAN, pass_number: int = 1, failed: Collection[int] = ()
) -> Receipt:
    indexes = ledger.shard_indexes(plan, pass_number, shard)
    return Receipt(
        job=plan.job,
        run=plan.run,
        pass_number=pass_number,
        shard=shard,
        start=shard * plan.pass_shard_images(pass_number),
        stop=shard * plan.pass_shard_images(pass_number) + len(indexes),
        attempt=1,
        renderer="renderer-0",
        device="CPU",
        versions={},
        finished_at="2026-11-21T10:00:00+00:00",
        seconds={},
        rows=tuple(row(index, pass_number=pass_number, failed=index in failed) for index in indexes),
    )


def commit_all(
    ledger: Ledger, *, plan: Plan = PLAN, pass_number: int = 1, failed: Collection[int] = (), but: Collection[int] = ()
) -> None:
    for shard in range(ledger.pass_shards(plan, pass_number)):
        if shard not in but:
            assert ledger.commit(plan, receipt(ledger, shard, plan=plan, pass_number=pass_number, failed=failed))


def open_second_pass(ledger: Ledger, indexes: list[int]) -> None:
    ledger.put_totals(PLAN, 1, TOTALS)
    assert ledger.open_pass(PLAN, 2, np.array(indexes))


def test_a_plan_is_created_once_and_reads_back_equal(ledger: Ledger) -> None:
    assert ledger.plans("shapes") == []
    assert ledger.create_plan(PLAN, 1) is True
    assert ledger.create_plan(make_plan(run="ffffffff"), 1) is False
    assert ledger.plan("shapes") == PLAN
    second = make_plan(run="11112222")
    assert ledger.create_plan(second, 2) is True
    assert ledger.plans("shapes") == [PLAN, second]
    assert ledger.plan("shapes") == second


def test_an_unknown_job_gets_the_nearest_name(ledger: Ledger) -> None:
    with pytest.raises(UnknownJobError, match=r"no job 'shapes' in .*; there are 0 jobs; see `farm status`"):
        ledger.plan("shapes")
    ledger.create_plan(PLAN, 1)
    with pytest.raises(UnknownJobError, match=r"no job 'shpaes' in .*; did you mean 'shapes'\?"):
        ledger.plan("shpaes")
    for odd in ("", "..", "a/b", "../../etc", "x" * 300, "nul\0"):
        with pytest.raises(UnknownJobError):
            ledger.plan(odd)


def test_a_plan_that_does_not_parse_is_said_where_it_is(ledger: Ledger, store: CountingStore) -> None:
    for broken in (b"", b"{", b"{}", b"\xff", PLAN.model_dump_json().encode()[:-5]):
        store.put("jobs/shapes/plans/0001.json", broken)
        with pytest.raises(RecordError, match=r"jobs/shapes/plans/0001.json: not a plan \(.+\); restore the object"):
            ledger.plans("shapes")
    store.put("jobs/shapes/plans/0001.json", b'{"version": 99, "job": "shapes"}')
    with pytest.raises(NewerVersionError, match=r"jobs/shapes/plans/0001.json: .*upgrade this farm"):
        ledger.plans("shapes")


def test_open_jobs_are_those_marked(ledger: Ledger) -> None:
    for job in ("b", "a"):
        ledger.open(job)
    assert ledger.open_jobs() == ["a", "b"]
    ledger.close("a")
    ledger.close("a")
    assert ledger.open_jobs() == ["b"]
    assert ledger.jobs() == []
    ledger.create_plan(PLAN, 1)
    assert ledger.jobs() == ["shapes"]


def test_prompt_parts_read_back(ledger: Ledger) -> None:
    ledger.put_prompt_part(PLAN.job, PLAN.run, 3, b"parquet")
    assert ledger.prompt_part(PLAN, 3) == b"parquet"
    with pytest.raises(ObjectMissingError, match="part-00004"):
        ledger.prompt_part(PLAN, 4)


def test_controls_from_many_at_once_are_all_kept_in_order(ledger: Ledger) -> None:
    start = threading.Barrier(8)

    def say(number: int) -> int:
        start.wait()
        return ledger.append_control("shapes", "cancel", at="2026-11-21T10:00:00+00:00", by=f"person {number}").seq

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(say, range(8)))
    assert sorted(numbers) == list(range(1, 9))
    controls = ledger.controls("shapes")
    assert [control.seq for control in controls] == list(range(1, 9))
    assert [control.by for control in controls] == [f"person {numbers.index(seq)}" for seq in range(1, 9)]


class Together(Unconditional):
    """Ignores the condition on a put: two that create one of `keys` have both looked before either writes, and write both
    before either reads back."""

    def __init__(self, folder: Path, keys: Collection[str] = ()):
        super().__init__(folder)
        self.keys = keys
        self.barrier = threading.Barrier(2, timeout=20)

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> bool:
        if self.head(key) is not None:
            return False
        if key in self.keys:
            self.barrier.wait()
        self.put(key, data)
        if key in self.keys:
            self.barrier.wait()
        return True


def test_without_conditional_puts_two_words_of_one_moment_are_both_kept(tmp_path: Path) -> None:
    ledger = Ledger(Together(tmp_path, {"jobs/shapes/control/000001.json"}))

    def say(who: str) -> Control:
        return ledger.append_control("shapes", "pause", at="2026-11-21T10:00:00+00:00", by=who)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(say, ("alice", "bob")))
    assert sorted(said, key=lambda control: control.seq) == ledger.controls("shapes")
    assert [control.seq for control in ledger.controls("shapes")] == [1, 2]


def test_without_conditional_puts_of_two_lists_for_one_pass_the_one_that_stands_is_opened(tmp_path: Path) -> None:
    ledger = Ledger(Together(tmp_path, {f"{ROOT}/passes/0002.npy"}))
    ledger.put_totals(PLAN, 1, TOTALS)
    with ThreadPoolExecutor(2) as pool:
        opened = list(pool.map(lambda image: ledger.open_pass(PLAN, 2, np.array([image])), (0, 1)))
    assert sorted(opened) == [False, True]
    assert ledger.selection(PLAN, 2).indexes.tolist() == [opened.index(True)]


def test_a_receipt_is_committed_once(ledger: Ledger) -> None:
    first = receipt(ledger, 1)
    assert ledger.commit(PLAN, first) is True
    assert ledger.commit(PLAN, replace(first, attempt=2)) is False
    assert ledger.receipt(PLAN, 1, 1) == first
    assert ledger.done_shards(PLAN, 1).tolist() == [False, True, False]


def test_rows_are_committed_in_index_order(ledger: Ledger) -> None:
    ordered = receipt(ledger, 0)
    ledger.commit(PLAN, replace(ordered, rows=ordered.rows[::-1]))
    assert ledger.receipt(PLAN, 1, 0) == ordered


def test_a_receipt_that_is_not_the_shards_is_refused(ledger: Ledger, store: CountingStore) -> None:
    whole = receipt(ledger, 0, failed={0})
    for wrong, reason in (
        (replace(whole, rows=whole.rows[:-1]), "has 3 rows, which are not the shard's 4 images"),
        (replace(whole, rows=(*whole.rows[:-1], row(9))), "are not the shard's 4 images"),
        (replace(whole, run="ffffffff"), "names run ffffffff of job shapes, the plan is run 0a1b2c3d"),
        (replace(whole, shard=99), "has no shard 99 in pass 1"),
    ):
        with pytest.raises(RecordError) as caught:
            ledger.commit(PLAN, wrong)
        assert reason in caught.value.message
    assert list(store.list("")) == []


def test_a_receipt_in_anothers_place_is_refused(ledger: Ledger, store: CountingStore) -> None:
    commit_all(ledger)
    store.put(f"{ROOT}/receipts/0001/00000000.parquet", store.get(f"{ROOT}/receipts/0001/00000001.parquet"))
    with pytest.raises(RecordError, match=r"00000000.parquet: is the receipt of run 0a1b2c3d, pass 1, shard 1"):
        ledger.receipt(PLAN, 1, 0)
    store.put(f"{ROOT}/receipts/0001/00000000.parquet", b"garbage")
    with pytest.raises(RecordError, match=r"00000000.parquet: not a receipt"):
        list(ledger.rows(PLAN))


def test_strangers_among_receipts_are_passed_over_but_not_shards_that_cannot_be(
    ledger: Ledger, store: CountingStore
) -> None:
    for name in ("notes.txt", "00000001.parquet.bak", "x.parquet", ".parquet", "٣.parquet"):
        store.put(f"{ROOT}/receipts/0001/{name}", b"")
    assert not ledger.done_shards(PLAN, 1).any()
    store.put(f"{ROOT}/receipts/0001/00000003.parquet", b"")
    with pytest.raises(RecordError, match=r"00000003.parquet: pass 1 has only 3 shards"):
        ledger.done_shards(PLAN, 1)


def test_rows_come_in_index_order_once_each(ledger: Ledger) -> None:
    commit_all(ledger, but={1})
    assert [found.index for found in ledger.rows(PLAN)] == [0, 1, 2, 3, 8, 9]


def test_a_later_passs_row_wins(ledger: Ledger) -> None:
    commit_all(ledger, failed={0, 5, 9})
    open_second_pass(ledger, [0, 1, 5, 8, 9])
    assert ledger.pass_shards(PLAN, 2) == 2
    assert list(ledger.shard_indexes(PLAN, 2, 0)) == [0, 1, 5, 8]
    assert list(ledger.shard_indexes(PLAN, 2, 1)) == [9]
    ledger.commit(PLAN, receipt(ledger, 0, pass_number=2, failed={1}))
    rows = list(ledger.rows(PLAN))
    assert [(found.index, found.pass_number) for found in rows] == [
        (0, 2), (1, 2), (2, 1), (3, 1), (4, 1), (5, 2), (6, 1), (7, 1), (8, 2), (9, 1),
    ]  # fmt: skip
    assert ledger.failed_indexes(PLAN).tolist() == [1, 9]
    assert [found.index for found in rows if found.status == "failed"] == [1, 9]
    ledger.commit(PLAN, receipt(ledger, 1, pass_number=2))
    assert ledger.failed_indexes(PLAN).tolist() == [1]


def test_failed_images_are_found_from_markers_alone(ledger: Ledger, store: CountingStore) -> None:
    plan = make_plan(rows=100, seeds=2, shard_images=4)
    commit_all(ledger, plan=plan, failed={4, 7, 199})
    store.gets = 0
    assert ledger.failed_indexes(plan).tolist() == [4, 7, 199]
    assert store.gets == 2


def test_a_marker_without_its_receipt_means_nothing(ledger: Ledger, store: CountingStore) -> None:
    for name in ("00000000", "99999999", "stranger"):
        store.put(f"{ROOT}/failures/0001/{name}", b"")
    assert ledger.failed_indexes(PLAN).tolist() == []
    ledger.commit(PLAN, receipt(ledger, 0))
    assert ledger.failed_indexes(PLAN).tolist() == []


def test_rows_read_only_a_little_ahead(ledger: Ledger, store: CountingStore) -> None:
    plan = make_plan(rows=100, seeds=2, shard_images=2)
    commit_all(ledger, plan=plan)
    store.gets = 0
    rows = ledger.rows(plan)
    assert next(rows).index == 0
    assert store.gets <= 9
    rows.close()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    assert threads == []


def test_receipts_come_in_shard_order(ledger: Ledger) -> None:
    plan = make_plan(rows=60, seeds=1, shard_images=1)
    commit_all(ledger, plan=plan, but={7})
    assert [found.shard for found in ledger.receipts(plan, 1, threads=3)] == [n for n in range(60) if n != 7]


def test_a_pass_opens_only_when_the_one_before_is_closed(ledger: Ledger) -> None:
    assert ledger.passes(PLAN) == 1
    assert ledger.selection(PLAN, 1) == Everything(10)
    with pytest.raises(ControlError, match="pass 2 of job shapes cannot open while pass 1 is unfinished"):
        ledger.open_pass(PLAN, 2, np.array([1]))
    ledger.put_totals(PLAN, 1, TOTALS)
    with pytest.raises(ControlError, match="pass 3 of job shapes cannot open while pass 1 is unfinished"):
        ledger.open_pass(PLAN, 3, np.array([1]))
    assert ledger.open_pass(PLAN, 2, np.array([1, 4])) is True
    assert ledger.open_pass(PLAN, 2, np.array([5])) is False
    assert ledger.selection(PLAN, 2).indexes.tolist() == [1, 4]
    assert ledger.passes(PLAN) == 2
    with pytest.raises(ControlError, match="while pass 2 is unfinished"):
        ledger.open_pass(PLAN, 3, np.array([1]))


@pytest.mark.parametrize("indexes", [[], [3, 1], [1, 1], [-1, 2], [5, 10], [[1], [2]]])
def test_a_pass_needs_images_that_are_there(ledger: Ledger, indexes: list[int]) -> None:
    ledger.put_totals(PLAN, 1, TOTALS)
    with pytest.raises(ControlError, match=r"would be empty|needs ascending image indexes below 10, each once"):
        ledger.open_pass(PLAN, 2, np.array(indexes))
    assert ledger.passes(PLAN) == 1


def test_a_pass_that_does_not_parse_is_said(ledger: Ledger, store: CountingStore) -> None:
    key = f"{ROOT}/passes/0002.npy"
    for broken in (b"", b"garbage", b"\x93NUMPY\x01\x00", pickle.dumps([1, 2])):
        store.put(key, broken)
        with pytest.raises(RecordError, match=r"0002.npy: not a list of image indexes"):
            ledger.selection(PLAN, 2)


def test_totals_are_those_of_the_latest_pass(ledger: Ledger, store: CountingStore) -> None:
    assert ledger.totals(PLAN) is None
    ledger.put_totals(PLAN, 1, TOTALS)
    assert ledger.totals(PLAN) == TOTALS
    ledger.open_pass(PLAN, 2, np.array([1]))
    assert ledger.totals(PLAN) is None
    assert ledger.totals(PLAN, 1) == TOTALS
    store.put(f"{ROOT}/totals/0002.json", TOTALS.model_copy(update={"version": 7}).model_dump_json().encode())
    with pytest.raises(NewerVersionError, match=r"totals/0002.json: totals of version 7 was written by a newer farm"):
        ledger.totals(PLAN)


def test_a_profile_reads_back_and_a_broken_one_counts_as_none(ledger: Ledger, store: CountingStore) -> None:
    profile = make_profile(device="NVIDIA RTX 4090 / 16 GiB")
    assert ledger.profile("shapes", profile.device) is None
    ledger.put_profile(profile)
    assert ledger.profile("shapes", profile.device) == profile
    assert [info.key for info in store.list("profiles/")] == ["profiles/shapes/nvidia-rtx-4090-16-gib.json"]
    store.put("profiles/shapes/nvidia-rtx-4090-16-gib.json", b"{")
    assert ledger.profile("shapes", profile.device) is None


def test_what_is_accelerated_has_a_profile_of_its_own(ledger: Ledger, store: CountingStore) -> None:
    quick = Acceleration(compile=True, attention="_native_cudnn")
    plain = make_profile(device="NVIDIA L4", seconds_per_image=0.5)
    faster = plain.model_copy(update={"acceleration": quick, "seconds_per_image": 0.25})
    ledger.put_profile(faster)
    assert ledger.profile("shapes", "NVIDIA L4") is None
    ledger.put_profile(plain)
    assert ledger.profile("shapes", "NVIDIA L4") == plain
    assert ledger.profile("shapes", "NVIDIA L4", quick) == faster
    assert [info.key for info in store.list("profiles/")] == [
        "profiles/shapes/nvidia-l4--compile-attention-_native_cudnn.json",
        "profiles/shapes/nvidia-l4.json",
    ]
    assert ledger.profiles("shapes") == [plain]
    assert ledger.profiles("shapes", quick) == [faster]


def test_a_jobs_profile_leaves_the_stages_that_a_benchmark_measured(ledger: Ledger) -> None:
    stages, later = make_stages(), make_profile(device="cpu", seconds_per_image=0.5)
    ledger.put_profile(make_profile(device="cpu", seconds_per_image=0.25, stages=stages))
    ledger.put_profile(later)
    found = ledger.profile("shapes", "cpu")
    assert found is not None
    assert (found.seconds_per_image, found.stages) == (0.5, stages)
    for identity, kept in (("of these weights", stages), ("of these weights", stages), ("of others", None)):
        ledger.put_profile(later.model_copy(update={"identity": identity}))
        found = ledger.profile("shapes", "cpu")
        assert found is not None
        assert found.stages == kept


def test_ten_million_images_take_little_to_look_over(ledger: Ledger, store: CountingStore) -> None:
    plan = make_plan(rows=10, seeds=1_000_000, shard_images=100)
    assert ledger.pass_shards(plan, 1) == 100_000
    ledger.commit(plan, receipt(ledger, 99_999, plan=plan))
    store.gets = 0
    done = ledger.done_shards(plan, 1)
    assert done.nbytes == 100_000
    assert np.flatnonzero(done).tolist() == [99_999]
    assert store.gets == 0


PILOT = make_plan(rows=5, seeds=2, shard_images=4, pilot=3, pilot_shard_images=2)


def test_a_pilot_is_rendered_first_and_the_others_once_it_is_approved(ledger: Ledger, store: CountingStore) -> None:
    assert ledger.selection(PILOT, 1).indexes.tolist() == [0, 4, 6]
    assert (ledger.pass_images(PILOT, 1), ledger.pass_shards(PILOT, 1), ledger.covered(PILOT, 1)) == (3, 2, 3)
    assert [list(ledger.shard_indexes(PILOT, 1, shard)) for shard in (0, 1)] == [[0, 4], [6]]
    commit_all(ledger, plan=PILOT, failed={4})
    assert (ledger.finished(PILOT), ledger.left_out(PILOT)) == (False, 7)
    with pytest.raises(ControlError, match="pass 2 of job shapes cannot open while pass 1 is unfinished"):
        ledger.open_pass(PILOT, 2, None)
    ledger.put_totals(PILOT, 1, TOTALS)
    assert (ledger.closed(PILOT, 1), ledger.finished(PILOT)) == (True, False)
    with pytest.raises(ControlError, match="is for the 7 images that its pilot left out; approve the pilot first"):
        ledger.open_pass(PILOT, 2, np.array([4]))
    assert ledger.open_pass(PILOT, 2, None) is True
    assert ledger.open_pass(PILOT, 2, None) is False
    assert np.load(io.BytesIO(store.get(f"{ROOT}/passes/0002.npy"))).tolist() == []
    assert isinstance(ledger.selection(PILOT, 2), Others)
    assert (ledger.pass_images(PILOT, 2), ledger.pass_shards(PILOT, 2), ledger.covered(PILOT, 2)) == (7, 2, 10)
    assert [list(ledger.shard_indexes(PILOT, 2, shard)) for shard in (0, 1)] == [[1, 2, 3, 5], [7, 8, 9]]
    commit_all(ledger, plan=PILOT, pass_number=2, failed={9})
    assert [(found.index, found.pass_number) for found in ledger.rows(PILOT)] == [
        (0, 1), (1, 2), (2, 2), (3, 2), (4, 1), (5, 2), (6, 1), (7, 2), (8, 2), (9, 2),
    ]  # fmt: skip
    assert ledger.failed_indexes(PILOT).tolist() == [4, 9]
    assert ledger.finished(PILOT) is False
    ledger.put_totals(PILOT, 2, TOTALS)
    assert (ledger.finished(PILOT), ledger.left_out(PILOT)) == (True, 0)
    assert ledger.open_pass(PILOT, 3, ledger.failed_indexes(PILOT)) is True
    commit_all(ledger, plan=PILOT, pass_number=3, failed={9})
    assert ledger.failed_indexes(PILOT).tolist() == [9]


def test_a_pass_over_every_image_again_builds_no_list(ledger: Ledger, store: CountingStore) -> None:
    commit_all(ledger, failed={3, 9})
    ledger.put_totals(PLAN, 1, TOTALS)
    assert ledger.open_pass(PLAN, 2, None)
    assert len(store.get(f"{ROOT}/passes/0002.npy")) == 128
    assert (ledger.selection(PLAN, 2), ledger.pass_shards(PLAN, 2)) == (Everything(10), 3)
    assert ledger.commit(PLAN, receipt(ledger, 0, pass_number=2, failed={1}))
    assert ledger.failed_indexes(PLAN).tolist() == [1, 9]
    assert [found.pass_number for found in ledger.rows(PLAN)] == [2] * 4 + [1] * 6


def test_the_others_of_a_huge_job_cost_what_the_pilot_does(ledger: Ledger) -> None:
    plan = make_plan(rows=1000, seeds=1_000_000, shard_images=10_000, pilot=200, pilot_shard_images=4)
    ledger.put_totals(plan, 1, TOTALS)
    ledger.open_pass(plan, 2, None)
    assert (ledger.pass_images(plan, 2), ledger.pass_shards(plan, 2)) == (999_999_800, 100_000)
    last = ledger.shard_indexes(plan, 2, 99_999)
    assert (len(last), last[-1]) == (9_800, 999_999_999)


def test_a_deleted_job_is_there_for_nobody(ledger: Ledger, store: CountingStore) -> None:
    ledger.create_plan(PLAN, 1)
    assert (ledger.deleted("shapes"), ledger.deleted("a/b"), ledger.deleted_jobs()) == (False, False, [])
    store.put("deleted/shapes", b"")
    assert (ledger.deleted("shapes"), ledger.deleted_jobs(), ledger.jobs(), ledger.plans("shapes")) == (
        True,
        ["shapes"],
        [],
        [],
    )
    with pytest.raises(UnknownJobError, match=r"is being deleted; run farm delete shapes again, which ends it"):
        ledger.plan("shapes")


def test_a_change_carries_its_values(ledger: Ledger) -> None:
    assert ledger.last_control("shapes") == 0
    said = ledger.append_control(
        "shapes", "change", at="2026-11-21T10:00:00+00:00", by="alice", priority=80, max_images=9
    )
    assert ledger.controls("shapes") == [said]
    assert (said.priority, said.max_images, said.gpu_hours, said.finish_by) == (80, 9, None, None)
    assert ledger.last_control("shapes") == 1


def test_a_control_of_a_newer_farm_is_refused(ledger: Ledger, store: CountingStore) -> None:
    store.put("jobs/shapes/control/000001.json", b'{"version": 99, "seq": 1, "action": "teleport"}')
    with pytest.raises(
        NewerVersionError, match=r"control/000001.json: control of version 99 was written by a newer farm"
    ):
        ledger.controls("shapes")


def test_a_ledger_goes_to_another_process(ledger: Ledger) -> None:
    ledger.create_plan(PLAN, 1)
    assert pickle.loads(pickle.dumps(ledger)).plan("shapes") == PLAN


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_passes_there_were_each_image_has_its_latest_row(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    ledger = Ledger(LocalStore(tmp_path_factory.mktemp("store")))
    plan = make_plan(
        rows=data.draw(st.integers(1, 12), "rows"),
        seeds=2,
        shard_images=data.draw(st.integers(1, 7), "shard_images"),
        pilot=data.draw(st.none() | st.integers(1, 10), "pilot"),
        pilot_shard_images=data.draw(st.integers(1, 4), "pilot_shard_images"),
    )
    every = range(plan.images)
    latest: dict[int, tuple[int, bool]] = {}
    last = data.draw(st.integers(1, 4), "passes")
    for number in range(1, last + 1):
        if number > 1:
            ledger.put_totals(plan, number - 1, TOTALS)
            left = ledger.covered(plan, number - 1) < plan.images
            wanted = None if left else data.draw(st.none() | st.sets(st.sampled_from(every), min_size=1), "again")
            assert ledger.open_pass(plan, number, None if wanted is None else np.array(sorted(wanted)))
        failed = data.draw(st.sets(st.sampled_from(every)), "failed")
        shards = range(ledger.pass_shards(plan, number))
        done = data.draw(st.sets(st.sampled_from(shards)), "done") if number == last else set(shards)
        for shard in done:
            ledger.commit(plan, receipt(ledger, shard, plan=plan, pass_number=number, failed=failed))
            latest |= {index: (number, index in failed) for index in ledger.shard_indexes(plan, number, shard)}
    rows = [(row.index, (row.pass_number, row.status == "failed")) for row in ledger.rows(plan)]
    assert rows == sorted(latest.items())
    assert ledger.failed_indexes(plan).tolist() == [index for index, (_, failed) in sorted(latest.items()) if failed]
    in_last = [index for shard in shards for index in ledger.shard_indexes(plan, last, shard)]
    rendered = sum(latest.get(index, (0, False))[0] == last for index in in_last)
    assert ledger.rendered(plan, last, ledger.done_shards(plan, last)) == rendered
    assert images_done(ledger, plan) == ledger.covered(plan, last) - len(in_last) + rendered
    assert ledger.finished(plan) is False
