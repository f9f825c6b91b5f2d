"""Receipts as Parquet: what is written reads back equal, and nothing else reads at all."""

import io
import json
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from farm.errors import NewerVersionError, RecordError
from farm.plan import Scalar
from farm.receipt import COLUMNS, ImageRow, Receipt

OK = ImageRow(
    index=7,
    key="row 7",
    prompt="a red circle, 红色的圆 🎨",
    negative_prompt="",
    width=64,
    height=64,
    num_inference_steps=8,
    guidance_scale=2.5,
    seed=2**32 - 1,
    status="ok",
    object="jobs/j/r/images/000000/x.png",
    thumbnail=None,
    size_bytes=1234,
    sha256="ab" * 32,
    phash="0f" * 8,
    flag="black",
    error_code=None,
    error_message=None,
    pass_number=1,
    attempt=1,
    alone=False,
    seconds=0.125,
    renderer="renderer-0",
    device="NVIDIA H200",
    carry={},
)
FAILED = replace(
    OK,
    index=8,
    key=None,
    status="failed",
    object=None,
    size_bytes=None,
    sha256=None,
    phash=None,
    flag=None,
    error_code="render",
    error_message="no such tensor",
    alone=True,
)
RECEIPT = Receipt(
    job="j",
    run="0a1b2c3d",
    pass_number=1,
    shard=3,
    start=7,
    stop=9,
    attempt=1,
    renderer="renderer-0",
    device="NVIDIA H200",
    versions={"torch": "2.13.0", "diffusers": "0.42.1"},
    finished_at="2026-11-21T10:00:00+00:00",
    seconds={"denoise": 1.5, "total": 2.0},
    rows=(OK, FAILED),
)


def carrying(*carried: dict[str, Scalar]) -> Receipt:
    return replace(RECEIPT, rows=tuple(replace(OK, index=number, carry=carry) for number, carry in enumerate(carried)))


def read(receipt: Receipt) -> Receipt:
    return Receipt.from_parquet(receipt.to_parquet(), "here")


def rewritten(data: bytes, change: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(change(pq.read_table(io.BytesIO(data))), sink)
    return sink.getvalue()


def with_head(table: pa.Table, **changes: Any) -> pa.Table:
    head = json.loads(table.schema.metadata[b"farm.receipt"]) | changes
    return table.replace_schema_metadata({b"farm.receipt": json.dumps(head).encode()})


def test_a_receipt_reads_back_equal() -> None:
    assert read(RECEIPT) == RECEIPT
    assert RECEIPT.failed == 1


def test_equal_receipts_give_equal_bytes() -> None:
    assert RECEIPT.to_parquet() == replace(RECEIPT).to_parquet()


def test_a_receipt_may_have_no_rows_at_all() -> None:
    assert read(replace(RECEIPT, rows=())) == replace(RECEIPT, rows=())


def test_the_table_is_one_that_others_can_read() -> None:
    table = pq.read_table(io.BytesIO(carrying({"source": "coco", "score": 0.5}).to_parquet()))
    assert tuple(table.schema.names) == (*COLUMNS, "source", "score")
    assert table.column("source").to_pylist() == ["coco"]
    assert table.schema.field("score").type == pa.float64()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None, "ü"], pa.string()),
        ([1, None, -(2**63)], pa.int64()),
        ([True, False, None], pa.bool_()),
        ([0.5, None, float("inf")], pa.float64()),
        ([None, None, None], pa.null()),
        ([1, 0.5, None], pa.float64()),
        ([1, "a", True, None, 0.5], pa.string()),
        ([2**63, 1, 2], pa.string()),
        ([2**53 + 1, 0.5, 1], pa.string()),
        ([True, 1, 0], pa.string()),
    ],
)
def test_carried_columns_keep_their_values(values: list[Scalar], kind: pa.DataType) -> None:
    receipt = carrying(*({"carried": value} for value in values))
    back = read(receipt)
    assert [row.carry["carried"] for row in back.rows] == values
    assert pq.read_schema(io.BytesIO(receipt.to_parquet())).field("carried").type == kind


def test_a_column_that_one_row_lacks_is_null_there() -> None:
    assert [row.carry for row in read(carrying({"a": "x"}, {"b": 1})).rows] == [
        {"a": "x", "b": None},
        {"a": None, "b": 1},
    ]


def test_a_newer_receipt_is_refused() -> None:
    data = rewritten(RECEIPT.to_parquet(), lambda table: with_head(table, version=3, invented="later"))
    with pytest.raises(NewerVersionError) as caught:
        Receipt.from_parquet(data, "s3://b/k")
    assert caught.value.message == "s3://b/k: a receipt of version 3, this farm reads up to 2; upgrade this farm"


def test_a_receipt_of_before_warnings_reads_as_having_none() -> None:
    def as_before(table: pa.Table) -> pa.Table:
        head = with_head(table, version=1).schema.metadata
        names = [
            "warnings" if name == "carried_warnings" else name for name in table.schema.names if name != "warnings"
        ]
        return table.drop_columns(["warnings"]).rename_columns(names).replace_schema_metadata(head)

    old = rewritten(carrying({"score": 0.5, "warnings": "mine"}, {"score": 1.5}).to_parquet(), as_before)
    rows = Receipt.from_parquet(old, "here").rows
    assert [row.warnings for row in rows] == [None, None]
    assert [row.carry for row in rows] == [
        {"score": 0.5, "carried_warnings": "mine"},
        {"score": 1.5, "carried_warnings": None},
    ]


def test_warnings_read_back() -> None:
    warned = replace(RECEIPT, rows=(replace(OK, warnings="unknown_pose,brand"), FAILED))
    assert read(warned) == warned


@pytest.mark.parametrize("cut", [0, 1, 4, 100, -1, -8, -100])
def test_a_truncated_receipt_does_not_parse(cut: int) -> None:
    with pytest.raises(RecordError, match=r"^s3://b/k: not a receipt \(.+\); restore the object, or delete it"):
        Receipt.from_parquet(RECEIPT.to_parquet()[:cut], "s3://b/k")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.replace_schema_metadata({}), "farm.receipt"),
        (lambda table: table.replace_schema_metadata({b"farm.receipt": b"{"}), "Expecting property name"),
        (lambda table: table.replace_schema_metadata({b"farm.receipt": b"[]"}), "validation error"),
        (lambda table: with_head(table, shard="three"), "validation error"),
        (lambda table: with_head(table, version="1"), "not supported between"),
        (lambda table: with_head(table, invented=1), "validation error"),
        (lambda table: table.slice(1), "1 rows, its head says 2"),
        (lambda table: table.drop_columns(["seed"]), "its columns begin with index, key, prompt"),
        (
            lambda table: table.set_column(8, "seed", pa.array(["1", "2"])),
            "column seed is string with 0 nulls, not",
        ),
        (
            lambda table: table.set_column(0, "index", pa.array([7, None], type=pa.int64())),
            "column index is int64 with 1 nulls",
        ),
        (lambda table: table.set_column(9, "status", pa.array(["ok", "maybe"])), "image 8 has the status 'maybe'"),
    ],
)
def test_what_is_not_a_receipt_is_said(change: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        Receipt.from_parquet(rewritten(RECEIPT.to_parquet(), change), "s3://b/k")
    assert not isinstance(caught.value, NewerVersionError)
    assert reason in caught.value.message
    assert caught.value.message.startswith("s3://b/k: not a receipt (")
