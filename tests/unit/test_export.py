import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from farm import export
from farm.errors import ControlError
from farm.export import finalise
from farm.receipt import Receipt
from tests.unit.finished_jobs import commit_shard, make_job, make_ledger, make_plan, make_row


def read_dataset(ledger, plan) -> pa.Table:
    parts = [pq.read_table(pa.BufferReader(ledger.store.get(key))) for key in dataset_keys(ledger, plan)]
    return pa.concat_tables(parts)


def dataset_keys(ledger, plan) -> list[str]:
    return [info.key for info in ledger.store.list(f"jobs/{plan.job}/{plan.run}/dataset/")]


def test_dataset_has_a_row_per_image_in_order_failed_ones_too(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    table = read_dataset(ledger, plan)
    assert table["index"].to_pylist() == list(range(10))
    assert table["status"].to_pylist().count("failed") == 1
    assert table["error_code"].to_pylist()[3] == "render"
    assert table["object"].to_pylist()[3] is None


def test_file_name_is_the_objects_key_below_the_run(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    names = read_dataset(ledger, plan)["file_name"].to_pylist()
    assert names[0].startswith("images/000000/000000000.p1a1-")
    assert (tmp_path / "jobs" / plan.job / plan.run / names[0]).is_file()
    assert names[3] is None


def test_totals_sum_up_receipts_and_close_the_pass(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    totals = ledger.totals(plan)
    assert totals is not None
    assert (totals.images, totals.ok, totals.failed) == (10, 9, 1)
    assert totals.failures_by_code == {"render": 1}
    assert totals.seconds == {"denoise": 12.0, "write": 1.5, "total": 15.0}
    assert totals.started_at == "2026-11-21T10:00:05+00:00"
    assert totals.finished_at == "2026-11-21T10:02:10+00:00"
    assert totals.wall_seconds == 125.0
    assert totals.renderers == 1


def test_finalising_twice_leaves_the_same_objects(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    finalise(ledger, plan, 1, rewrite=True)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_a_later_pass_replaces_the_rows_that_it_has(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3, 7})
    ledger.open_pass(plan, 2, np.array([3, 7]))
    commit_shard(ledger, plan, 0, pass_number=2, failed={7})
    totals = finalise(ledger, plan, 2)
    table = read_dataset(ledger, plan)
    assert table["index"].to_pylist() == list(range(10))
    assert [table["status"][3].as_py(), table["pass_number"][3].as_py()] == ["ok", 2]
    assert [table["status"][7].as_py(), table["pass_number"][7].as_py()] == ["failed", 2]
    assert (totals.ok, totals.failed) == (9, 1)
    assert totals.wall_seconds == 125.0 + 5.0


def test_a_closed_pass_is_not_written_again_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    ledger.open_pass(plan, 2, np.array([3]))
    commit_shard(ledger, plan, 0, pass_number=2)
    finalise(ledger, plan, 2)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    monkeypatch.setattr(ledger.store, "put", lambda *args, **options: pytest.fail("something was written"))
    assert finalise(ledger, plan, 1).failed == 1
    assert finalise(ledger, plan, 1, rewrite=True).failed == 1
    assert finalise(ledger, plan, 2).failed == 0
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize("late_at", ["dataset/part-00000.parquet", "dataset/part-00002.parquet", "sheet.png"])
def test_who_finalises_too_late_does_not_overwrite_a_later_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_at: str
) -> None:
    monkeypatch.setattr(export, "CHUNK_ROWS", 2)
    monkeypatch.setattr(export, "PART_ROWS", 4)
    ledger, plan = make_job(tmp_path, shards=0)
    for shard in range(plan.shards):
        commit_shard(ledger, plan, shard, failed={0, 9})
    swift = make_ledger(tmp_path)
    real = ledger.store.put
    after: list[dict[Path, bytes]] = []

    def put(key: str, data: bytes, **options: str) -> None:
        real(key, data, **options)
        if key.endswith(late_at) and not after:
            finalise(swift, plan, 1)
            swift.open_pass(plan, 2, np.array([0, 9]))
            commit_shard(swift, plan, 0, pass_number=2)
            finalise(swift, plan, 2)
            after.append({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})

    monkeypatch.setattr(ledger.store, "put", put)
    assert finalise(ledger, plan, 1).failed == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == after[0]
    assert read_dataset(swift, plan)["status"].to_pylist() == ["ok"] * 10


def test_an_unfinished_pass_is_not_finalised(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, shards=2)
    with pytest.raises(ControlError, match=r"pass 1 lacks 1 of 3 receipts, the first that of shard 2; farm render"):
        finalise(ledger, plan, 1)
    assert dataset_keys(ledger, plan) == []
    assert ledger.totals(plan) is None


def test_the_dataset_is_cut_into_parts_and_stale_parts_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "CHUNK_ROWS", 2)
    monkeypatch.setattr(export, "PART_ROWS", 4)
    ledger, plan = make_job(tmp_path)
    assert [key[-13:] for key in dataset_keys(ledger, plan)] == ["00000.parquet", "00001.parquet", "00002.parquet"]
    monkeypatch.setattr(export, "PART_ROWS", 100)
    finalise(ledger, plan, 1, rewrite=True)
    assert [key[-13:] for key in dataset_keys(ledger, plan)] == ["00000.parquet"]
    assert read_dataset(ledger, plan)["index"].to_pylist() == list(range(10))


def test_carried_columns_have_one_type_in_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "CHUNK_ROWS", 2)
    monkeypatch.setattr(export, "PART_ROWS", 4)
    ledger, plan = make_ledger(tmp_path), make_plan()
    first = {index: {"source": None, "score": 1, "mixed": "a"} for index in range(8)}
    later = {index: {"source": "web", "score": 0.5, "mixed": 3} for index in range(8, 10)}
    for shard in range(plan.shards):
        commit_shard(ledger, plan, shard, carry=first | later)
    finalise(ledger, plan, 1)
    schemas = {str(pq.read_schema(pa.BufferReader(ledger.store.get(key)))) for key in dataset_keys(ledger, plan)}
    assert len(schemas) == 1
    table = read_dataset(ledger, plan)
    assert table["source"].to_pylist() == [None] * 8 + ["web"] * 2
    assert table["score"].to_pylist() == [1.0] * 8 + [0.5] * 2
    assert table["mixed"].to_pylist() == ['"a"'] * 8 + ["3"] * 2


def test_a_carried_column_called_file_name_keeps_its_values_under_another_name(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan(rows=1, seeds=1)
    commit_shard(ledger, plan, 0, carry={0: {"file_name": "theirs.png"}})
    finalise(ledger, plan, 1)
    table = read_dataset(ledger, plan)
    assert table["carried_file_name"].to_pylist() == ["theirs.png"]
    assert table["file_name"].to_pylist()[0].startswith("images/")


def test_the_contact_sheet_is_a_picture_even_where_one_is_missing(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    next(tmp_path.rglob("000000005*.png")).unlink()
    finalise(ledger, plan, 1)
    with Image.open(io.BytesIO(ledger.store.get(f"jobs/{plan.job}/{plan.run}/sheet.png"))) as sheet:
        assert sheet.width > 800
        assert sheet.height > 300


def test_a_night_between_two_shards_is_no_part_of_the_wall_time(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    plan = make_plan(rows=4, seeds=2, shard_images=4)
    ledger.create_plan(plan, 1)
    for shard, finished_at in enumerate(["2026-01-01T20:00:00+00:00", "2026-01-02T08:00:00+00:00"]):
        rows = tuple(make_row(ledger, plan, index) for index in plan.shard_range(shard))
        receipt = Receipt(
            job=plan.job,
            run=plan.run,
            pass_number=1,
            shard=shard,
            start=rows[0].index,
            stop=rows[-1].index + 1,
            attempt=1,
            renderer="renderer-0",
            device="cpu",
            versions={},
            finished_at=finished_at,
            seconds={"total": 7.0},
            rows=rows,
        )
        assert ledger.commit(plan, receipt)
    assert finalise(ledger, plan, 1).wall_seconds == 14.0


def test_the_measured_speed_is_kept_for_later_plans(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    rows = [row for row in ledger.rows(plan) if row.status == "ok"]
    profile = ledger.profile(plan.card.name, rows[0].device)
    assert profile is not None
    assert profile.images == 9
    assert profile.seconds_per_image == pytest.approx(sum(row.seconds for row in rows) / 9)
    assert (profile.width, profile.height, profile.num_inference_steps, profile.batch) == (64, 64, 4, 4)


def test_a_pilots_pass_covers_the_pilots_images_and_the_next_one_all(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan(rows=50, seeds=2, pilot=7)
    ledger.create_plan(plan, 1)
    for shard in range(ledger.pass_shards(plan, 1)):
        commit_shard(ledger, plan, shard, failed={0})
    totals = finalise(ledger, plan, 1)
    shown = read_dataset(ledger, plan)["index"].to_pylist()
    assert shown == ledger.selection(plan, 1).indexes.tolist()
    assert (totals.images, totals.ok, totals.failed) == (7, len(shown) - (0 in shown), int(0 in shown))
    assert ledger.totals(plan) == totals
    assert not ledger.finished(plan)
    ledger.open_pass(plan, 2, None)
    for shard in range(ledger.pass_shards(plan, 2)):
        commit_shard(ledger, plan, shard, pass_number=2)
    assert finalise(ledger, plan, 1, rewrite=True) == totals
    assert read_dataset(ledger, plan)["index"].to_pylist() == shown
    totals = finalise(ledger, plan, 2)
    assert read_dataset(ledger, plan)["index"].to_pylist() == list(range(100))
    assert totals.images == 100
    assert ledger.finished(plan)


def test_the_sheet_of_a_large_pilot_is_spread_over_the_pilots_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan(rows=100, seeds=4, pilot=80, shard_images=100)
    ledger.create_plan(plan, 1)
    for shard in range(ledger.pass_shards(plan, 1)):
        commit_shard(ledger, plan, shard)
    drawn: list[list[int]] = []

    def draw_sheet(title: str, subtitle: str, tiles: list) -> bytes:
        drawn.append([tile.row.index for tile in tiles])
        assert subtitle.startswith("80 images · 48 of them shown")
        return b""

    monkeypatch.setattr(export, "draw_sheet", draw_sheet)
    finalise(ledger, plan, 1)
    pilot = ledger.selection(plan, 1).indexes.tolist()
    assert len(drawn[0]) == 48
    assert set(drawn[0]) <= set(pilot)
    assert drawn[0][-1] in pilot[-3:]


def test_two_that_finalise_at_once_leave_what_one_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "CHUNK_ROWS", 2)
    monkeypatch.setattr(export, "PART_ROWS", 4)
    left = []
    for name, finishers in (("one", 1), ("many", 4)):
        ledger, plan = make_job(tmp_path / name, shards=0)
        for shard in range(plan.shards):
            commit_shard(ledger, plan, shard, failed={3})
        start = threading.Barrier(finishers)

        def end(start: threading.Barrier = start, plan=plan, folder: Path = tmp_path / name) -> object:
            start.wait()
            return finalise(make_ledger(folder), plan, 1)

        with ThreadPoolExecutor(finishers) as pool:
            totals = [one.result() for one in [pool.submit(end) for _ in range(finishers)]]
        assert all(one == totals[0] for one in totals)
        left.append({info.key: ledger.store.get(info.key) for info in ledger.store.list("")})
    assert left[0] == left[1]


def test_totals_say_how_long_the_devices_worked_and_what_was_planned(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan()
    plan = plan.model_copy(update={"estimated_seconds_per_image": 0.75})
    ledger.create_plan(plan, 1)
    for shard in range(plan.shards):
        commit_shard(ledger, plan, shard)
    totals = finalise(ledger, plan, 1)
    assert (totals.gpu_seconds, totals.planned_gpu_seconds) == (12.0, 7.5)
    unknown, plan = make_job(tmp_path / "unknown")
    found = unknown.totals(plan)
    assert found is not None
    assert (found.gpu_seconds, found.planned_gpu_seconds) == (12.0, None)


def test_totals_of_an_older_farm_still_read(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    key = f"jobs/{plan.job}/{plan.run}/totals/0001.json"
    fields = json.loads(ledger.store.get(key))
    del fields["planned_gpu_seconds"]
    ledger.store.put(key, json.dumps(fields).encode())
    found = ledger.totals(plan)
    assert found is not None
    assert (found.gpu_seconds, found.planned_gpu_seconds) == (12.0, None)
