"""`farm lint`, and warnings of the commands that render."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from farm.cli.advice import warn
from farm.cli.exits import Exit
from farm.lint import Advice
from farm.manifest import load_manifest
from farm.scene import Character, GeneralTags, Scene, read_scene
from tests.unit.cli.conftest import FakeFarm, Place
from tests.unit.finished_jobs import CARD

README = Path(__file__).parents[3] / "README.md"
SCENES = """\
name: pair
model: pair
prompts:
  - a quiet street
  - characters:
      - {n: a, gender: girl, pose: flying}
"""
FOUND = [
    (
        "unknown_gender",
        "'girl' is no gender that the model knows and falls back to 1girl; write that",
        "job.yaml:5: prompt 2, character_1.gender",
    ),
    (
        "unknown_pose",
        "'flying' is no pose that the model knows and falls back to standing; write one of standing, sitting, jumping, "
        "waving, leaning_against_wall, or say it in <action>",
        "job.yaml:5: prompt 2, character_1.pose",
    ),
]


@pytest.fixture
def pair(farm: Place) -> Place:
    """A card of a model whose weights are nowhere."""
    card = CARD.model_dump(mode="json", exclude_none=True) | {"name": "pair", "family": "newbie"}
    card["source"] = {"path": "not-there"}
    farm.write("cards/pair.yaml", json.dumps(card))
    return farm


def warnings(err: str) -> list[str]:
    return [line.removeprefix("warning: ") for line in err.splitlines() if line.startswith("warning: ")]


def test_lint_prints_every_warning_with_its_line_and_needs_no_weights(pair: Place) -> None:
    ended = pair("lint", pair.write("job.yaml", SCENES))
    assert (ended.code, ended.out) == (0, "")
    assert warnings(ended.err) == [f"{where}: {text}" for _, text, where in FOUND]
    assert ended.err.endswith("looked at 2 different prompts: 2 warnings\n")
    assert not pair.store.exists()


def test_lint_as_json_says_what_was_looked_at(pair: Place) -> None:
    record = json.loads(pair("lint", pair.write("job.yaml", SCENES), "--json").out)
    assert record == {
        "job": "pair",
        "model": "pair",
        "looked_at": 2,
        "whole": True,
        "warnings": [{"code": code, "text": text, "where": where} for code, text, where in FOUND],
    }


def test_strict_lint_ends_with_a_code_of_its_own_where_there_are_warnings(pair: Place) -> None:
    assert pair("lint", pair.write("job.yaml", SCENES), "--strict").code == Exit.WARNED
    sound = SCENES.replace("girl", "1girl").replace("flying", "sitting")
    ended = pair("lint", pair.write("job.yaml", sound), "--strict")
    assert (ended.code, ended.err) == (Exit.OK, "looked at 2 different prompts: 0 warnings\n")


def test_lint_reads_stdin_with_files_beside_the_working_folder(pair: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.write("people.yaml", "characters:\n  ann: {n: ann, gender: woman}\n")
    text = "name: pair\nmodel: pair\ninclude: people.yaml\nprompts:\n  - characters: [{use: ann}]\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert warnings(pair("lint", "-").err) == [
        "stdin:5: prompt 1, character_1.gender: 'woman' is no gender that the model knows and falls back to 1girl; write that"
    ]


def test_lint_of_files_names_the_file_s_line(pair: Place) -> None:
    pair.write("prompts.csv", "id,text\n1,a cat\n2,a nike shoe\n")
    ended = pair("lint", pair.manifest(prompts={"file": "prompts.csv", "column": "text"}))
    assert warnings(ended.err) == [
        f"{pair.folder}/prompts.csv:3: prompt 2: names a brand (nike), which tends to be drawn as a logo; take it out"
    ]


def test_lint_of_templates_numbers_the_prompts(pair: Place) -> None:
    prompts = {"template": "a {brand} shoe", "vary": {"brand": ["red", "gucci"]}}
    ended = pair("lint", pair.manifest(prompts=prompts))
    assert warnings(ended.err) == [
        "prompts.template: prompt 2: names a brand (gucci), which tends to be drawn as a logo; take it out"
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "nothing"}, "job.yaml:3: no model card is called 'nothing'"),
        ({"preset": "nothing"}, "job.yaml:14: shapes has no preset 'nothing'"),
        ({"prompts": {"template": "a {b}"}}, "job.yaml:5: prompts.template: variable {b} has no values"),
    ],
)
def test_lint_of_what_cannot_be_planned_is_an_error(farm: Place, fields: dict[str, object], message: str) -> None:
    ended = farm("lint", farm.manifest(**fields))
    assert ended.code == Exit.INPUT
    assert ended.error.startswith(message)


def test_plan_and_render_warn_of_prompts(farm: Place, fake_farm: FakeFarm) -> None:
    manifest = farm.manifest(prompts=["a circle", "nike shoes"])
    said = "job.yaml:6: prompt 2: names a brand (nike), which tends to be drawn as a logo; take it out"
    record = {"code": "brand", "text": said.partition("prompt 2: ")[2], "where": "job.yaml:6: prompt 2"}
    assert warnings(farm("plan", manifest).err) == [said]
    planned = farm("plan", manifest, "--json")
    assert json.loads(planned.out)["warnings"] == [record]
    rendered = farm("render", manifest, "--json")
    assert (rendered.code, warnings(rendered.err)) == (0, [said])
    assert json.loads(rendered.out)["warnings"] == [record]
    assert warnings(farm("render", manifest).err) == [said]
    assert json.loads(farm("plan", farm.manifest(name="plain"), "--json").out)["warnings"] == []


def test_what_a_card_warns_of_is_said_with_the_prompts(farm: Place) -> None:
    card = json.loads(Path("cards/shapes.yaml").read_text()) | {"licence_warning": "not for sale"}
    farm.write("cards/shapes.yaml", json.dumps(card))
    for command in ("plan", "lint"):
        ended = farm(command, farm.manifest(prompts=["sony"]))
        assert warnings(ended.err) == [
            f"job.yaml:3: shapes is under {CARD.licence}: not for sale",
            "job.yaml:5: prompt 1: names a brand (sony), which tends to be drawn as a logo; take it out",
        ]


def test_a_licence_alone_does_not_fail_a_strict_lint(farm: Place) -> None:
    card = json.loads(Path("cards/shapes.yaml").read_text()) | {"licence_warning": "not for sale"}
    farm.write("cards/shapes.yaml", json.dumps(card))
    assert farm("lint", farm.manifest(), "--strict").code == Exit.OK


def test_the_readme_s_scenes_are_sound(farm: Place) -> None:
    section = README.read_text().partition("## Structured prompts")[2].partition("\n## ")[0]
    characters, manifest = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    farm.write("characters.yaml", characters)
    ended = farm("lint", farm.write("pair.yaml", manifest), "--strict")
    assert (ended.code, ended.err.splitlines()[-1]) == (Exit.OK, "looked at 2 different prompts: 1 warning")
    scene, plain = load_manifest("pair.yaml").manifest.prompts
    assert read_scene(scene) == Scene(
        (
            Character(n="ann", gender="1girl", appearance="blue_hair, long_twintails, teal_eyes", pose="waving"),
            Character(
                n="ben",
                gender="1boy",
                appearance="black_hair, short_hair, red_eyes",
                clothing="black_coat",
                pose="leaning_against_wall",
            ),
        ),
        GeneralTags(count="1girl, 1boy", style="cyberpunk_anime", background="neon_lights, rain_wet_streets"),
    )
    assert plain == "1girl, blue hair, long twintails"


def test_of_many_prompts_planning_looks_at_the_first_and_says_so(farm: Place) -> None:
    manifest = farm.manifest(prompts=[f"nike shoe {number}" for number in range(300)])
    said = warnings(farm("plan", manifest).err)
    assert said[0] == "job.yaml:4: only the first 200 different prompts were looked at"
    assert len(json.loads(farm("plan", manifest, "--json").out)["warnings"]) == 201
    assert len(warnings(farm("lint", manifest).err)) == 300


def test_no_more_than_twenty_warnings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    advice = [Advice("brand", f"text {number}") for number in range(1_021)]
    warn(advice)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: text 0"
    assert lines[19:] == ["warning: text 19", "… and 1,001 more; farm lint shows all of them"]
    warn(advice[:20])
    assert len(capsys.readouterr().err.splitlines()) == 20


def test_a_warning_has_nothing_in_it_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    warn([Advice("brand", "\x1b[31mred", "a")])
    assert capsys.readouterr().err == "warning: a: \ufffd[31mred\n"
