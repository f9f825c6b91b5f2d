"""Prompt files into tables and back, and every way a file can be wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.errors import ManifestError, PromptError, RecordError
from farm.ledger import Ledger
from farm.manifest import Manifest
from farm.modelcard import ParamOverrides
from farm.plan import Numerics, Plan, SeedRule
from farm.prompts import Frozen, PromptReader, freeze
from farm.rowhash import column_hashes, row_hashes
from farm.storage.base import ObjectStore
from farm.storage.local import LocalStore
from tests.unit.finished_jobs import CARD


def manifest_of(prompts: Any) -> Manifest:
    return Manifest.model_validate({"name": "job", "model": "shapes", "prompts": prompts})


def no_store(url: str) -> ObjectStore:
    raise AssertionError(f"{url} was opened")


def frozen_of(
    prompts: Any,
    *,
    sink: Callable[[int, bytes], None] | None = None,
    open_store: Callable[[str], ObjectStore] = no_store,
) -> Frozen:
    return freeze(
        manifest_of(prompts),
        card=CARD,
        params=CARD.defaults,
        points=(ParamOverrides(),),
        root=1,
        open_store=open_store,
        sink=sink,
    )


def reader_of(prompts: Any, folder: Path) -> PromptReader:
    ledger = Ledger(LocalStore(folder / "store"))
    frozen = frozen_of(prompts, sink=lambda n, data: ledger.put_prompt_part("job", "0a1b2c3d", n, data))
    plan = Plan.build(
        run="0a1b2c3d",
        created_at="",
        manifest=manifest_of(prompts),
        card=CARD,
        prompts=frozen.table,
        seeds=SeedRule(rule="shared", count=1),
        sweep=(ParamOverrides(),),
        params=CARD.defaults,
        numerics=Numerics(device="cpu", dtype="float32", batch=4, threads=1, versions={}),
        shard_images=4,
    )
    return PromptReader(plan, ledger)


def refusal(prompts: Any, folder: Path) -> str:
    with pytest.raises(PromptError) as caught:
        frozen_of(prompts)
    return caught.value.message.replace(f"{folder}/", "")


def test_inline_prompts_come_back_in_order(tmp_path: Path) -> None:
    specs = reader_of(["one", "two {x}", "drei"], tmp_path).specs([2, 0, 1])
    assert [(spec.row, spec.prompt) for spec in specs] == [(2, "drei"), (0, "one"), (1, "two {x}")]


def test_txt_skips_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffeins\r\n\r\n  zwei  \ndrei".encode())
    reader = reader_of({"file": str(tmp_path / "p.txt")}, tmp_path)
    assert [reader.row(at).prompt for at in range(3)] == ["eins", "zwei", "drei"]


def test_csv_rows_bring_overrides_and_carried_texts(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text('caption,w,g,src\n"a, b",128,,web\nc,,0,\n', encoding="utf-8")
    prompts = {
        "file": str(tmp_path / "p.csv"),
        "column": "caption",
        "per_row": {"width": "w", "guidance_scale": "g"},
        "carry": ["src"],
    }
    first, second = reader_of(prompts, tmp_path).specs([0, 1])
    assert (first.prompt, first.params.width, first.params.guidance_scale, first.carry) == (
        "a, b",
        128,
        2.5,
        {"src": "web"},
    )
    assert (second.prompt, second.params.width, second.params.guidance_scale, second.carry) == (
        "c",
        64,
        0.0,
        {"src": None},
    )


def test_jsonl_and_parquet_of_equal_rows_give_one_digest(tmp_path: Path) -> None:
    rows = [{"id": n, "prompt": f"número {n}", "score": n / 2, "ok": n % 2 == 0} for n in range(50)]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=7)
    tables = [
        frozen_of({"file": str(tmp_path / f"p.{kind}"), "key": "id", "carry": ["score", "ok"]}).table
        for kind in ("jsonl", "parquet")
    ]
    assert tables[0] == tables[1]
    assert (tables[0].rows, tables[0].keyed) == (50, True)


def test_glob_takes_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"from {name}\n")
    reader = reader_of({"file": str(tmp_path / "*.txt")}, tmp_path)
    assert [reader.row(at).prompt for at in range(3)] == ["from a", "from b", "from c"]


def test_s3_globs_stay_within_a_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "bucket")
    for key in ("captions/a.txt", "captions/deep/b.txt", "captions/c.csv"):
        store.put(key, b"prompt\n")
    opened: list[str] = []

    def open_store(url: str) -> ObjectStore:
        opened.append(url)
        return store

    assert frozen_of({"file": "s3://data/captions/*.txt"}, open_store=open_store).table.rows == 1
    assert frozen_of({"file": "s3://data/captions/**/*.txt"}, open_store=open_store).table.rows == 2
    assert opened == ["s3://data", "s3://data"]
    with pytest.raises(PromptError, match=r"s3://data/none/\*\.txt: no file matches; check the path"):
        frozen_of({"file": "s3://data/none/*.txt"}, open_store=open_store)


def test_table_is_cut_into_parts_of_65536_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"p{n}" for n in range(150_000)]}), tmp_path / "p.parquet")
    prompts = {"file": str(tmp_path / "p.parquet")}
    reader = reader_of(prompts, tmp_path)
    assert [spec.prompt for spec in reader.specs([149_999, 0, 65_535, 65_536, 131_072])] == [
        "p149999",
        "p0",
        "p65535",
        "p65536",
        "p131072",
    ]
    table = frozen_of(prompts).table
    assert (table.rows, table.parts) == (150_000, 3)


def test_digest_follows_order_and_content(tmp_path: Path) -> None:
    digests = {frozen_of(prompts).table.digest for prompts in (["a", "bc"], ["bc", "a"], ["ab", "c"], ["a", "bc", "d"])}
    assert len(digests) == 4


def test_part_that_is_not_what_was_written_is_an_error(tmp_path: Path) -> None:
    reader = reader_of(["one"], tmp_path)
    part = next((tmp_path / "store").rglob("part-00000.parquet"))
    part.write_bytes(b"rubbish")
    with pytest.raises(RecordError, match=r"job job, prompt part 0: not Parquet"):
        reader.specs([0])


def test_template_values_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("red\nblue\n")
    (tmp_path / "t.csv").write_text("x,thing\n1,star\n")
    prompts = {
        "template": "a {c} {thing} {n}",
        "vary": {"c": {"file": str(tmp_path / "c.txt")}, "thing": {"file": str(tmp_path / "t.csv")}, "n": [1, 2.5]},
    }
    reader = reader_of(prompts, tmp_path)
    assert [reader.row(at).prompt for at in range(4)] == [
        "a red star 1",
        "a red star 2.5",
        "a blue star 1",
        "a blue star 2.5",
    ]
    assert list((tmp_path / "store").rglob("*.parquet")) == []


def test_empty_template_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("\n\n")
    message = refusal({"template": "{c}", "vary": {"c": {"file": str(tmp_path / "c.txt")}}}, tmp_path)
    assert message == "c.txt: no values for c; write one a line"
    with pytest.raises(ManifestError, match=r"prompts\.template: prompt 1 comes out empty"):
        frozen_of({"template": "{c}", "vary": {"c": ["a", " "]}})


KEYED = {"key": "id"}
BAD: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("p.txt", b"", {}, "p.txt: the file is empty; put prompts into it, or take it away"),
    ("p.txt", "\n \n", {}, "prompts: there are none; write at least one"),
    ("p.txt", b"ok\ncaf\xe9\n", {}, "p.txt:2: not UTF-8"),
    ("p.txt", b"\0\1\2", {}, "p.txt: binary data, not text; name a file of text, or set prompts.encoding"),
    ("p.txt", "a", {"column": "x"}, "prompts.column: 'x': a .txt file has no columns; leave it out, or use a .csv"),
    ("p.txt", "a", {"carry": ["x"]}, "prompts: a .txt file has no columns to carry or to override from; use a .csv"),
    (
        "p.xlsx",
        "a",
        {},
        "p.xlsx: files of prompts are .txt, .jsonl, .ndjson, .csv, .parquet; convert it, or narrow the path",
    ),
    (
        "p.csv",
        "captoin\na\n",
        {"column": "caption"},
        "p.csv: no column `caption`; did you mean captoin? it has: captoin",
    ),
    ("p.csv", "prompt,prompt\na,b\n", {}, "p.csv:1: two columns are called `prompt`; rename one"),
    (
        "p.csv",
        "prompt,x\na,b\nc\n",
        {},
        "p.csv:3: 1 cells where the header has 2; put quotes around a cell with commas in it",
    ),
    ("p.csv", 'prompt\n"a\n', {}, "p.csv:2: not CSV: unexpected end of data; mend the line"),
    ("p.csv", "prompt,x\na,b\n ,c\n", {}, "p.csv:3: the prompt is empty; write one, or take the row out"),
    ("p.csv", "prompt,id\na,\n", KEYED, "p.csv:2: `id` has no value; every row needs one"),
    (
        "p.csv",
        "prompt,id\na,1\nb,2\nc,1\n",
        KEYED,
        "p.csv:4: the key '1' stands at p.csv:2 too; give every row a key of its own",
    ),
    (
        "p.csv",
        "prompt,w\na,64\nb,wide\n",
        {"per_row": {"width": "w"}},
        "p.csv:3: `w` must be a whole number, got 'wide'; mend the row",
    ),
    (
        "p.csv",
        "prompt,w\na,64\nb,65\n",
        {"per_row": {"width": "w"}},
        "p.csv:3: width: 65 in 65x64 is not a multiple of 16, as shapes needs; nearest is 64x64",
    ),
    ("p.csv", "prompt,w\na,-64\n", {"per_row": {"width": "w"}}, "p.csv:2: `w` must be above 0, got -64; change it"),
    (
        "p.csv",
        "prompt,g\na,nan\n",
        {"per_row": {"guidance_scale": "g"}},
        "p.csv:2: `g` must be a number, got 'nan'; mend the row",
    ),
    (
        "p.csv",
        "prompt,g\na,-1\n",
        {"per_row": {"guidance_scale": "g"}},
        "p.csv:2: `g` must be 0 or more, got -1.0; change it",
    ),
    (
        "p.csv",
        "prompt,s\na,500\n",
        {"per_row": {"num_inference_steps": "s"}},
        "p.csv:2: num_inference_steps: 500 is more than shapes's 200; lower it",
    ),
    (
        "p.csv",
        "prompt,seed\na,1\n",
        {"carry": ["seed"]},
        "prompts.carry: 'seed' is a column of every receipt already; rename yours, or leave it out",
    ),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', {}, "p.jsonl:2: not JSON: Expecting value"),
    (
        "p.jsonl",
        '{"prompt": "a"}\n["b"]\n',
        {},
        'p.jsonl:2: must be an object {...}, got ["b"]; write one object a line',
    ),
    ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', {}, "p.jsonl:2: no column `prompt`; it has: text"),
    ("p.jsonl", '{"prompt": 3}\n', {}, "p.jsonl:1: `prompt` must be text, got 3; mend the row"),
    ("p.jsonl", '{"prompt": null}\n', {}, "p.jsonl:1: `prompt` has no value; every row needs one"),
    ("p.jsonl", '{"prompt": "\\ud800"}\n', {}, "p.jsonl:1: `prompt` has half of a surrogate pair; mend the text"),
    (
        "p.jsonl",
        '{"prompt": "a", "w": 64}\n{"prompt": "b", "w": "64"}\n',
        {"per_row": {"width": "w"}},
        "p.jsonl:2: `w` must be a whole number, got '64'; mend the row",
    ),
    (
        "p.jsonl",
        '{"prompt": "a", "w": true}\n',
        {"per_row": {"width": "w"}},
        "p.jsonl:1: `w` must be a whole number, got true; mend the row",
    ),
    (
        "p.jsonl",
        '{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "c"}\n',
        {"carry": ["x"]},
        "p.jsonl:2: `x` must be int, as in the rows before, got 'c'; mend the row",
    ),
    (
        "p.jsonl",
        '{"prompt": "a", "x": [1]}\n',
        {"carry": ["x"]},
        "p.jsonl:1: `x` must be text, a number or true/false, got [1]; mend the row",
    ),
    (
        "p.jsonl",
        '{"prompt": "a", "x": 99999999999999999999}\n',
        {"carry": ["x"]},
        "p.jsonl:1: `x`: 99999999999999999999 does not fit 64 bits; write it as text",
    ),
    ("p.csv", "prompt;key\na;b\n", {}, "p.csv:1: the columns are divided by semicolons; save the file with commas"),
    (
        "p.csv",
        "prompt,w\na,64_0\n",
        {"per_row": {"width": "w"}},
        "p.csv:2: `w` must be a whole number, got '64_0'; mend the row",
    ),
    ("p.parquet", b"PAR1 not really", {}, "p.parquet: cannot be read as Parquet: "),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), BAD)
def test_bad_file_is_refused_with_its_row(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal({"file": str(tmp_path / name), **options}, tmp_path).startswith(message)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"prompt": [1, 2]}, {}, "p.parquet: column `prompt` has type int64, must be text; cast it in the file"),
        ({"prompt": ["a", None]}, {}, "p.parquet: row 2: `prompt` has no value; every row needs one"),
        ({"prompt": ["a", ""]}, {}, "p.parquet: row 2: the prompt is empty; write one, or take the row out"),
        (
            {"prompt": ["a"], "id": [0.5]},
            KEYED,
            "p.parquet: row 1: the key `id` must be text or a whole number, got double",
        ),
        (
            {"prompt": ["a", "b"], "id": ["k", "k"]},
            KEYED,
            "p.parquet: row 2: the key 'k' stands at p.parquet: row 1 too",
        ),
        (
            {"prompt": ["a"], "w": [1.5]},
            {"per_row": {"width": "w"}},
            "p.parquet: column `w` has type double, must be a whole number; cast it in the file",
        ),
        (
            {"prompt": ["a"], "tags": [["x"]]},
            {"carry": ["tags"]},
            "p.parquet: column `tags` has type list<",
        ),
        ({"text": ["a"]}, {}, "p.parquet: no column `prompt`; it has: text"),
    ],
)
def test_bad_parquet_is_refused(tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    assert refusal({"file": str(tmp_path / "p.parquet"), **options}, tmp_path).startswith(message)


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    (tmp_path / "b.txt").write_text("y\n")
    assert refusal({"file": str(tmp_path / "*")}, tmp_path).endswith("matches .txt files and others; keep to one kind")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    assert refusal({"file": str(tmp_path / "no.csv")}, tmp_path).startswith("no.csv: no such file; check the path")
    assert refusal({"file": str(tmp_path / "*.csv")}, tmp_path) == "*.csv: no file matches; check the path"
    assert "this is a folder; name a file in it" in refusal({"file": str(tmp_path)}, tmp_path)
    assert "read from files and s3:// alone" in refusal({"file": "https://host/p.csv"}, tmp_path)
    os.mkfifo(tmp_path / "p.txt")
    assert "is a pipe or a device" in refusal({"file": str(tmp_path / "p.txt")}, tmp_path)


def test_a_csv_cell_may_be_as_long_as_a_line_of_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\n" + "x" * 200_000 + "\n")
    assert frozen_of({"file": str(tmp_path / "p.csv")}).table.rows == 1


def test_other_encodings_are_read_when_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("café".encode("latin-1"))
    reader = reader_of({"file": str(tmp_path / "p.txt"), "encoding": "latin-1"}, tmp_path)
    assert reader.row(0).prompt == "café"


def test_failed_sink_stops_the_freeze(tmp_path: Path) -> None:
    def full(n: int, data: bytes) -> None:
        raise RecordError("the disk is full")

    with pytest.raises(RecordError, match="the disk is full"):
        frozen_of(["a"], sink=full)


@given(st.lists(st.none() | st.text(max_size=6), min_size=1, max_size=30))
def test_row_hashes_are_equal_only_for_equal_texts(texts: list[str | None]) -> None:
    texts = [None if text is None else text.encode("utf-8", "replace").decode() for text in texts]
    hashes = column_hashes(pa.array(texts, pa.string()))
    assert len(set(hashes.tolist())) == len(set(texts))
    padded = pa.array(["before", *texts, "after"], pa.string()).slice(1, len(texts))
    assert np.array_equal(column_hashes(padded), hashes)


def test_row_hashes_tell_columns_apart() -> None:
    columns = [pa.array(["a", "b"]), pa.array([1, None]), pa.array([0.5, 1.5]), pa.array([True, False])]
    assert len({*row_hashes(columns).tolist(), *row_hashes(columns[::-1]).tolist()}) == 4
