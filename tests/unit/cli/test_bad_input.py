"""What a person may get wrong: one readable line with a next step, code 2, and nothing of a job written."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.cli.conftest import FakeFarm, Place

Write = Callable[[Place], str]


def rows(text: str, **prompts: object) -> Write:
    def write(farm: Place) -> str:
        farm.write("rows.csv", text)
        return farm.manifest(prompts={"file": "rows.csv", **prompts})

    return write


def fields(**changed: object) -> Write:
    return lambda farm: farm.manifest(**changed)


def raw(data: bytes) -> Write:
    def write(farm: Place) -> str:
        (farm.folder / "job.yaml").write_bytes(data)
        return "job.yaml"

    return write


def prompts_bytes(name: str, data: bytes) -> Write:
    def write(farm: Place) -> str:
        (farm.folder / name).write_bytes(data)
        return farm.manifest(prompts={"file": name})

    return write


def wrong_type(farm: Place) -> str:
    pq.write_table(pa.table({"prompt": [1, 2, 3]}), farm.folder / "rows.parquet")
    return farm.manifest(prompts={"file": "rows.parquet"})


BAD: dict[str, tuple[Write, tuple[str, ...]]] = {
    "no such manifest": (lambda farm: "nothing.yaml", ("nothing.yaml: no such file",)),
    "bad YAML": (raw(b"name: [unclosed\n"), ("job.yaml:",)),
    "an empty manifest": (raw(b""), ("job.yaml",)),
    "a manifest that is not UTF-8": (raw(b"name: caf\xe9\n"), ("job.yaml", "UTF-8")),
    "an unknown key": (fields(prompst=["x"]), ("job.yaml:", "prompst", "prompts")),
    "another farm's word for a parameter": (fields(params={"steps": 4}), ("job.yaml:", "num_inference_steps")),
    "an unknown model": (fields(model="shaps"), ("job.yaml:", "did you mean shapes?")),
    "an unknown preset": (fields(preset="drft"), ("job.yaml:", "drft")),
    "no prompts": (fields(prompts=[]), ("job.yaml:", "prompts")),
    "no prompts at all": (fields(prompts=None), ("job.yaml", "prompts")),
    "a name that is none": (fields(name="My Job"), ("job.yaml:", "my-job would do")),
    "a variable without values": (fields(prompts={"template": "a {colour} star"}), ("colour",)),
    "a variable with an empty list": (
        fields(prompts={"template": "a {colour} star", "vary": {"colour": []}}),
        ("job.yaml:", "colour"),
    ),
    "a size off the grid": (fields(params={"width": 100}), ("job.yaml:", "multiple of 16", "nearest is")),
    "a size over the limit": (fields(params={"width": 4096}), ("job.yaml:", "longest side", "nearest is")),
    "too many steps": (fields(params={"num_inference_steps": 5000}), ("job.yaml:", "lower it")),
    "a seed out of range": (fields(seeds=[2**32]), ("job.yaml:", "4294967295")),
    "a swept parameter that is none": (fields(sweep={"cfg": [1, 2]}), ("job.yaml:", "guidance_scale")),
    "a missing prompt file": (fields(prompts={"file": "gone.txt"}), ("gone.txt",)),
    "a missing column": (rows("caption\nx\n"), ("rows.csv", "prompt", "caption")),
    "a row of the wrong type": (wrong_type, ("rows.parquet",)),
    "a row with a width that is no number": (
        rows("prompt,w\nx,64\ny,wide\n", per_row={"width": "w"}),
        ("rows.csv", "wide"),
    ),
    "a row with a size off the grid": (rows("prompt,w\nx,64\ny,65\n", per_row={"width": "w"}), ("rows.csv", "65")),
    "a doubled key": (rows("id,prompt\na,x\na,y\n", key="id"), ("rows.csv", "a")),
    "an empty prompt file": (prompts_bytes("rows.txt", b""), ("rows.txt",)),
    "a prompt file that is not UTF-8": (prompts_bytes("rows.txt", b"a caf\xe9\n"), ("rows.txt", "UTF-8")),
    "a prompt file that is no Parquet": (prompts_bytes("rows.parquet", b"no parquet"), ("rows.parquet",)),
    "broken JSON lines": (prompts_bytes("rows.jsonl", b'{"prompt": "x"}\n{"prompt": \n'), ("rows.jsonl", "2")),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("command", ["plan", "render"])
def test_bad_input_is_one_line_and_leaves_nothing(farm: Place, fake_farm: FakeFarm, what: str, command: str) -> None:
    write, said = BAD[what]
    ended = farm(command, write(farm))
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert "Traceback" not in ended.err
    for part in said:
        assert part.lower() in ended.error.lower()
    assert farm.jobs_written() == []
    assert fake_farm.opened == []


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("ftp://bucket", "there is no store of the kind 'ftp'"),
        ("s3://B", "is no bucket's name"),
        ("", "names no folder"),
    ],
)
def test_a_store_that_is_none_is_bad_input(farm: Place, fake_farm: FakeFarm, store: str, said: str) -> None:
    ended = farm("render", farm.manifest(), "--store", store)
    assert ended.code == 2
    assert said in ended.error


def test_a_folder_of_cards_that_is_not_there_is_bad_input(farm: Place) -> None:
    ended = farm("models", "--models", "nowhere")
    assert (ended.code, ended.error) == (2, "FARM_MODELS: nowhere is not a folder; make it, or unset it")
