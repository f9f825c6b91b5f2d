from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from farm.errors import StoreUnavailableError
from farm.export import finalise
from farm.verify import Finding, Verification, verify
from tests.unit import finished_jobs
from tests.unit.finished_jobs import commit_shard, make_job, make_ledger, make_plan, make_row, picture_bytes


def verified(ledger, plan, **options) -> tuple[Verification, list[Finding]]:
    findings: list[Finding] = []
    return verify(ledger, plan, threads=2, report=findings.append, **options), findings


def picture_of(folder: Path, index: int) -> Path:
    return next(folder.rglob(f"{index:09d}.*.png"))


def test_a_whole_job_is_sound(tmp_path: Path) -> None:
    result, findings = verified(*make_job(tmp_path, failed={3}))
    assert findings == []
    assert result.sound
    assert (result.rows, result.ok, result.failed, result.checked, result.orphans) == (10, 9, 1, 9, 0)
    assert result.bytes_read == sum(len(picture_bytes(index)) for index in range(10) if index != 3)


def test_a_missing_picture_is_found(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    picture_of(tmp_path, 4).unlink()
    result, findings = verified(ledger, plan)
    assert [(finding.kind, finding.index) for finding in findings] == [("object_missing", 4)]
    assert findings[0].message.endswith("is not there")
    assert not result.sound


def test_a_changed_picture_is_found_by_size_hash_and_decoding(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    cut, swapped, resized = (picture_of(tmp_path, index) for index in (1, 2, 6))
    cut.write_bytes(cut.read_bytes()[:-40])
    swapped.write_bytes(picture_bytes(200))
    Image.new("RGB", (32, 64)).save(resized)
    _, findings = verified(ledger, plan)
    kinds = {index: sorted(one.kind for one in findings if one.index == index) for index in (1, 2, 6)}
    assert kinds[1] == ["picture", "sha256", "size"]
    assert "sha256" in kinds[2]
    assert "dimensions" in kinds[6]
    assert any("is 32x64, its row says 64x64" in finding.message for finding in findings)


def test_a_sample_reads_only_so_many_pictures_and_says_nothing_of_orphans(tmp_path: Path) -> None:
    result, findings = verified(*make_job(tmp_path), sample=3, seed=7)
    assert findings == []
    assert (result.rows, result.checked, result.orphans) == (10, 3, None)


def test_an_unfinished_job_lacks_receipts(tmp_path: Path) -> None:
    _, findings = verified(*make_job(tmp_path, shards=1))
    assert [finding.kind for finding in findings] == ["receipt_missing"]
    assert findings[0].message == (
        "pass 1: 2 of 3 shards have no receipt, the first is shard 1 (images 4 to 7); farm render goes on with them"
    )


def test_a_finished_job_that_lost_a_receipt_says_how_its_shard_is_rendered_again(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    next(tmp_path.rglob("receipts/0001/*1.parquet")).unlink()
    _, findings = verified(ledger, plan)
    assert f"or delete jobs/shapes/{plan.run}/totals/ and run farm render again" in findings[0].message


def test_a_damaged_receipt_is_a_finding_and_the_rest_is_still_looked_at(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    next(tmp_path.rglob("receipts/0001/*1.parquet")).write_bytes(b"not parquet")
    result, findings = verified(ledger, plan)
    assert [finding.kind for finding in findings] == ["receipt_unreadable"]
    assert result.checked == 6


def test_a_row_with_another_seed_than_the_plans_is_found(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, shards=0)
    other = plan.model_copy(update={"seeds": plan.seeds.model_copy(update={"root": 9})})
    for shard in range(plan.shards):
        commit_shard(ledger, other, shard)
    finalise(ledger, plan, 1)
    result, _ = verified(ledger, plan)
    assert dict(result.findings) == {"seed": 10}


def test_objects_that_no_row_names_are_counted_and_no_finding(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    ledger.store.put(f"jobs/{plan.job}/{plan.run}/images/000000/000000001.p1a2-00000000.png", picture_bytes(1))
    result, findings = verified(ledger, plan)
    assert findings == []
    assert result.orphans == 1


def test_a_later_pass_is_what_counts(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3, 7})
    ledger.open_pass(plan, 2, np.array([3, 7]))
    commit_shard(ledger, plan, 0, pass_number=2)
    finalise(ledger, plan, 2)
    result, findings = verified(ledger, plan)
    assert findings == []
    assert (result.rows, result.ok, result.failed) == (10, 10, 0)


def rewrite_dataset(ledger, plan, change) -> None:
    key = f"jobs/{plan.job}/{plan.run}/dataset/part-00000.parquet"
    table = change(pq.read_table(pa.BufferReader(ledger.store.get(key))))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    ledger.store.put(key, sink.getvalue().to_pybytes())


NOT_THE_RECEIPTS = (
    "the dataset's rows are not the receipts', the first among images 0 to 9; `farm verify --rewrite` writes it again"
)


def with_column(name: str, values: list) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, type=field.type))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(0, 9), "the dataset has 9 rows for 10 images"),
        (lambda table: pa.concat_tables([table.slice(0, 1), table]), "image 0 stands where 1 should"),
        (lambda table: table.take([0, 2, 1, *range(3, 10)]), "image 2 stands where 1 should"),
        (lambda table: pa.concat_tables([table, table.slice(9, 1)]), "image 9 stands where 10 should"),
        (with_column("sha256", ["0" * 64] * 10), NOT_THE_RECEIPTS),
        (with_column("prompt", ["another"] + [f"shape number {i // 2}" for i in range(1, 10)]), NOT_THE_RECEIPTS),
        (with_column("status", ["failed"] * 10), NOT_THE_RECEIPTS),
        (with_column("guidance_scale", [2.5] * 9 + [2.0]), NOT_THE_RECEIPTS),
    ],
)
def test_a_dataset_that_is_not_the_receipts_rows_is_found(tmp_path: Path, change, message: str) -> None:
    ledger, plan = make_job(tmp_path)
    rewrite_dataset(ledger, plan, change)
    _, findings = verified(ledger, plan)
    assert [finding.kind for finding in findings] == ["dataset_rows"]
    assert message in findings[0].message


def test_a_dataset_written_before_rows_had_warnings_is_sound(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    rewrite_dataset(ledger, plan, lambda table: table.drop_columns(["warnings"]))
    assert verified(ledger, plan)[1] == []


def test_a_dataset_is_compared_whatever_else_is_found(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    picture_of(tmp_path, 4).unlink()
    rewrite_dataset(ledger, plan, with_column("prompt", ["another"] * 10))
    _, findings = verified(ledger, plan)
    assert [finding.kind for finding in findings] == ["object_missing", "dataset_rows"]


def test_a_dataset_is_not_blamed_for_a_receipt_of_a_later_pass_that_cannot_be_read(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3, 7})
    ledger.open_pass(plan, 2, np.array([3, 7]))
    commit_shard(ledger, plan, 0, pass_number=2)
    finalise(ledger, plan, 2)
    next(tmp_path.rglob("receipts/0002/*0.parquet")).write_bytes(b"not parquet")
    _, findings = verified(ledger, plan)
    assert [finding.kind for finding in findings] == ["receipt_unreadable"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"prompt": "shape number 9"}, "prompt", "has the prompt 'shape number 9', the plan 'shape number 2'"),
        ({"key": "k"}, "key", "has the key 'k', the plan null"),
        ({"num_inference_steps": 5}, "params", "has num_inference_steps 5, the plan 4"),
        ({"seed": 1}, "seed", "has seed 1, not the plan's"),
    ],
)
def test_a_receipt_that_is_not_of_the_plans_images_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], kind: str, message: str
) -> None:
    ledger, plan = make_job(tmp_path, shards=0)

    def other_row(*args, **options):
        row = make_row(*args, **options)
        return replace(row, **change) if row.index == 5 else row

    monkeypatch.setattr(finished_jobs, "make_row", other_row)
    for shard in range(plan.shards):
        commit_shard(ledger, plan, shard)
    finalise(ledger, plan, 1)
    _, findings = verified(ledger, plan)
    assert [(finding.kind, finding.message) for finding in findings] == [(kind, f"image 5 {message}")]


def test_prompts_that_cannot_be_read_are_one_finding(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path)
    table = plan.prompts.model_copy(update={"template": None, "parts": 1})
    _, findings = verified(ledger, plan.model_copy(update={"prompts": table}))
    assert [finding.kind for finding in findings] == ["prompts_unreadable"]
    assert "prompts/part-00000.parquet is not there" in findings[0].message


def test_a_store_that_goes_away_is_an_error_and_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, plan = make_job(tmp_path)
    real = ledger.store.get

    def get(key: str) -> bytes:
        if "/images/" in key:
            raise StoreUnavailableError("no answer")
        return real(key)

    monkeypatch.setattr(ledger.store, "get", get)
    with pytest.raises(StoreUnavailableError, match="no answer"):
        verified(ledger, plan)


def test_a_pilot_that_waits_is_sound_without_the_others(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan(pilot=3, pilot_shard_images=2)
    ledger.create_plan(plan, 1)
    for shard in (0, 1):
        commit_shard(ledger, plan, shard, failed={4})
    finalise(ledger, plan, 1)
    result, findings = verified(ledger, plan)
    assert findings == []
    assert (result.images, result.rows, result.ok, result.left_out, result.orphans) == (10, 3, 2, 7, 0)
    result, findings = verified(ledger, plan, sample=1)
    assert (findings, result.checked <= 1, result.rows) == ([], True, 3)
    part = next(tmp_path.rglob("part-00000.parquet"))
    pq.write_table(pq.read_table(part).slice(1), part)
    _, findings = verified(ledger, plan)
    assert [finding.message.rpartition(": ")[2] for finding in findings] == ["image 4 stands where 0 should"]


def test_the_others_after_a_pilot_are_verified_with_it(tmp_path: Path) -> None:
    ledger, plan = make_ledger(tmp_path), make_plan(pilot=3, pilot_shard_images=2)
    ledger.create_plan(plan, 1)
    for shard in (0, 1):
        commit_shard(ledger, plan, shard, failed={4})
    finalise(ledger, plan, 1)
    ledger.open_pass(plan, 2, None)
    commit_shard(ledger, plan, 1, pass_number=2)
    result, findings = verified(ledger, plan)
    assert [finding.kind for finding in findings] == ["receipt_missing"]
    assert findings[0].message.startswith(
        "pass 2: 1 of 2 shards have no receipt, the first is shard 0 (images 1 to 5); farm render goes on"
    )
    commit_shard(ledger, plan, 0, pass_number=2)
    finalise(ledger, plan, 2)
    result, findings = verified(ledger, plan)
    assert (findings, result.rows, result.failed, result.left_out) == ([], 10, 1, 0)


def test_every_image_rendered_again_is_verified_by_its_new_row(tmp_path: Path) -> None:
    ledger, plan = make_job(tmp_path, failed={3})
    ledger.open_pass(plan, 2, None)
    for shard in range(3):
        commit_shard(ledger, plan, shard, pass_number=2)
    finalise(ledger, plan, 2)
    result, findings = verified(ledger, plan)
    assert (findings, result.rows, result.ok) == ([], 10, 10)
    assert {row.pass_number for row in ledger.rows(plan)} == {2}
