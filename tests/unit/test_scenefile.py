"""Scenes in manifests: what they come to, what they use, and what is wrong with them."""

import json
import os
from pathlib import Path

import pytest

from farm.errors import ManifestError, PromptError
from farm.manifest import Manifest, load_manifest, manifest_of
from farm.scene import Character, GeneralTags, Scene, read_scene
from farm.sources import read_object
from farm.storage.local import LocalStore
from farm.yamlfile import parse_json

HEAD = "name: job\nmodel: newbie\n"
CHARACTERS = """\
characters:
  miku: {n: hatsune_miku, gender: 1girl, appearance: [blue_hair, long_twintails], clothing: stage_dress}
  len: {n: kagamine_len, gender: 1boy}
general_tags:
  night: {style: anime_style, background: [city_street, neon_lights]}
"""


def load(folder: Path, text: str, **files: str) -> Manifest:
    (folder / "m.yaml").write_text(HEAD + text)
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    return load_manifest(folder / "m.yaml").manifest


def refusal(folder: Path, text: str, **files: str) -> str:
    with pytest.raises(ManifestError) as caught:
        load(folder, text, **files)
    return caught.value.message.replace(f"{folder}/", "")


def test_scenes_and_texts_stand_in_one_list_and_come_out_as_texts(tmp_path: Path) -> None:
    manifest = load(
        tmp_path,
        """\
prompts:
  - a girl with blue hair
  - characters:
      - {n: $character_1$, gender: 1girl, appearance: [蓝发, teal_eyes]}
      - {n: $character_2$, gender: 1boy, pose: standing}
    general_tags: {count: "1girl, 1boy", caption: "a walk (at night)"}
  - general_tags: {background: forest}
""",
    )
    assert manifest.prompts == (
        "a girl with blue hair",
        "<character_1>\n<n>$character_1$</n>\n<gender>1girl</gender>\n<appearance>蓝发, teal_eyes</appearance>\n"
        "</character_1>\n\n<character_2>\n<n>$character_2$</n>\n<gender>1boy</gender>\n<pose>standing</pose>\n"
        "</character_2>\n\n<general_tags>\n<count>1girl, 1boy</count>\n"
        r"<caption>a walk \(at night\)</caption>" + "\n</general_tags>",
        "<general_tags>\n<background>forest</background>\n</general_tags>",
    )


def test_a_plan_reads_the_manifest_of_texts_back(tmp_path: Path) -> None:
    manifest = load(tmp_path, "include: c.yaml\nprompts: [{characters: [{use: miku}]}]\n", c=CHARACTERS)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert "include" not in manifest.model_dump_json()


def test_a_used_character_takes_what_stands_beside_it(tmp_path: Path) -> None:
    manifest = load(
        tmp_path,
        """\
include: c.yaml
prompts:
  - characters:
      - {use: miku, clothing: [], expression: smile, appearance: short_hair}
      - use: len
    general_tags: {use: night, count: 2}
""".replace("count: 2", 'count: "2"'),
        c=CHARACTERS,
    )
    assert isinstance(manifest.prompts, tuple)
    assert read_scene(manifest.prompts[0]) == Scene(
        (
            Character(n="hatsune_miku", gender="1girl", appearance="short_hair", expression="smile"),
            Character(n="kagamine_len", gender="1boy"),
        ),
        GeneralTags(count="2", style="anime_style", background="city_street, neon_lights"),
    )


def test_several_files_may_be_included_from_other_folders(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "tags.yaml").write_text("general_tags: {day: {background: sky}}\n")
    manifest = load(
        tmp_path,
        "include: [c.yaml, shared/tags.yaml]\nprompts: [{characters: [{use: len}], general_tags: {use: day}}]\n",
        c=CHARACTERS,
    )
    assert isinstance(manifest.prompts, tuple)
    assert "<background>sky</background>" in manifest.prompts[0]


SCENE = "prompts:\n  - characters:\n      - "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SCENE + "apearance: tall\n",
            "m.yaml:5: unknown key `apearance` in prompts.0.characters.0; did you mean appearance?",
        ),
        (SCENE + "name: a\n", "m.yaml:5: unknown key `name` in prompts.0.characters.0; it is called n"),
        (
            "prompts:\n  - general_tags: {}\n    characters: []\n    tags: x\n",
            "m.yaml:6: unknown key `tags` in prompts.0; it is called general_tags",
        ),
        (
            "prompts:\n  - general_tags:\n      backround: x\n",
            "m.yaml:5: unknown key `backround` in prompts.0.general_tags; did you mean background?",
        ),
        (SCENE + "gender: 1\n", "m.yaml:5: prompts.0.characters.0.gender: must be text, got 1; put quotes around it"),
        (
            SCENE + "gender:\n",
            "m.yaml:5: prompts.0.characters.0.gender: must be text, got null; give it a value, or leave the key out",
        ),
        (
            SCENE + "appearance: [a, 3]\n",
            "m.yaml:5: prompts.0.characters.0.appearance.1: must be text, got 3; put quotes around it",
        ),
        (
            "prompts:\n  - characters: {n: a}\n",
            'm.yaml:4: prompts.0.characters: must be a list, got {"n": "a"}; write [a, b, c]',
        ),
        (SCENE + "{}\n", "m.yaml:5: prompts.0.characters.0: says nothing; write what is to be seen, or take it out"),
        ("prompts:\n  - {}\n", "m.yaml:4: prompts.0: says nothing; write what is to be seen, or take it out"),
        (
            "prompts:\n  - characters: [{n: a}]\n  - 3\n",
            "m.yaml:5: prompts.1: must be text, got 3; put quotes around it",
        ),
        (
            SCENE + "use: miku\n",
            "m.yaml:5: prompts.0.characters.0.use: there is no 'miku' in what is included; the included files have: none",
        ),
        (
            "prompts: [a]\ninclude: c.yaml\n",
            "m.yaml:4: include: scenes in a list of prompts use it, and there are none; take it out",
        ),
        (
            "prompts:\n  characters: [{n: a}]\n",
            "m.yaml:4: unknown key `characters` in prompts; a scene is an item of a list: prompts: [{characters: ...}] "
            "(and 1 more)",
        ),
        (SCENE + "n: a\ninclude: nowhere.yaml\n", "nowhere.yaml: no such file; check the path"),
        (SCENE + "n: a\ninclude: {file: c.yaml}\n", "m.yaml:6: unknown key `file` in include; take it out"),
        (
            SCENE + "n: a\ninclude: https://example.org/c.yaml\n",
            "m.yaml:6: include: is read from files and s3:// alone, got 'https://example.org/c.yaml'; download it",
        ),
        (
            SCENE + "n: a\ninclude: s3://bucket/c.yaml\n",
            "m.yaml:6: include: no bucket can be read from here, got 's3://bucket/c.yaml'; download the file",
        ),
        (SCENE + "n: a\nincludes: c.yaml\n", "m.yaml:6: unknown key `includes`; did you mean include?"),
    ],
)
def test_what_is_wrong_with_a_scene_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text) == message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"c": CHARACTERS},
            "m.yaml:5: prompts.0.characters.0.use: there is no 'mikku' in what is included; did you mean miku?",
        ),
        (
            {"c": "characters:\n  mikku:\n    hair: blue\n"},
            "c.yaml:3: unknown key `hair` in characters.mikku; it is called appearance",
        ),
        (
            {"c": "characters:\n  mikku:\n    posture: a\n"},
            "c.yaml:3: unknown key `posture` in characters.mikku; did you mean pose?",
        ),
        ({"c": "people: {}\n"}, "c.yaml:1: unknown key `people`; known here: characters, general_tags"),
        ({"c": "characters: [a]\n"}, 'c.yaml:1: characters: must be a mapping of keys to values, got ["a"]; change it'),
    ],
)
def test_what_is_wrong_with_an_included_file_names_its_line(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    assert refusal(tmp_path, SCENE + "use: mikku\ninclude: c.yaml\n", **files) == message


def test_a_name_stands_in_one_included_file_alone(tmp_path: Path) -> None:
    again = "characters:\n  miku: {n: other}\n"
    assert refusal(tmp_path, SCENE + "use: miku\ninclude: [c.yaml, d.yaml]\n", c=CHARACTERS, d=again) == (
        "d.yaml:2: characters.miku stands at c.yaml:2 too; rename one of them"
    )


def test_an_include_from_a_bucket_is_read_by_who_may(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(HEAD + SCENE + "use: len\ninclude: s3://bucket/c.yaml\n")
    asked: list[str] = []

    def read_url(url: str) -> bytes:
        asked.append(url)
        return CHARACTERS.encode()

    prompts = load_manifest(tmp_path / "m.yaml", read_url=read_url).manifest.prompts
    assert asked == ["s3://bucket/c.yaml"]
    assert prompts == (Scene((Character(n="kagamine_len", gender="1boy"),)).xml(),)

    def away(url: str) -> bytes:
        raise PromptError(f"{url}: no such object; check the address")

    with pytest.raises(
        ManifestError, match=r"m.yaml:6: include: s3://bucket/c.yaml: no such object; check the address"
    ):
        load_manifest(tmp_path / "m.yaml", read_url=away)


def test_a_document_of_json_has_scenes_without_lines() -> None:
    def refused(body: object) -> str:
        document = parse_json(json.dumps(body).encode(), "manifest", ManifestError, what="manifest")
        with pytest.raises(ManifestError) as caught:
            manifest_of(document)
        return caught.value.message

    body = {"name": "job", "model": "newbie", "prompts": [{"characters": [{"n": "a", "sex": "f"}]}]}
    assert refused(body) == "manifest: unknown key `sex` in prompts.0.characters.0; it is called gender"
    body = {"name": "job", "model": "newbie", "include": "c.yaml", "prompts": [{"characters": [{"use": "a"}]}]}
    assert refused(body) == "include: files cannot be read from here, got 'c.yaml'; write the characters out"


def test_an_object_is_read_from_its_bucket_if_it_is_there_and_small(tmp_path: Path) -> None:
    LocalStore(tmp_path / "bucket").put("people/c.yaml", CHARACTERS.encode())

    def read(url: str) -> bytes:
        def open_store(bucket: str) -> LocalStore:
            return LocalStore(tmp_path / bucket.removeprefix("s3://"))

        return read_object(url, open_store=open_store, most_bytes=2**20)

    assert read("s3://bucket/people/c.yaml") == CHARACTERS.encode()
    for url, message in (
        ("s3://bucket", "s3://bucket: names no object; write s3://bucket/path/file.yaml"),
        ("s3://bucket/people/d.yaml", "s3://bucket/people/d.yaml: no such object; check the address"),
    ):
        with pytest.raises(PromptError) as caught:
            read(url)
        assert caught.value.message == message
    LocalStore(tmp_path / "bucket").put("large.yaml", b"#" * (2**20 + 1))
    with pytest.raises(PromptError, match=r"s3://bucket/large.yaml: larger than 1 MiB; cut it into several"):
        read("s3://bucket/large.yaml")


def test_a_use_of_an_unknown_name_tells_the_first_names_alone(tmp_path: Path) -> None:
    many = "characters:\n" + "".join(f"  c{number:03}: {{n: a}}\n" for number in range(500))
    assert refusal(tmp_path, "include: c.yaml\nprompts: [{characters: [{use: zzz}]}]\n", c=many).endswith(
        "there is no 'zzz' in what is included; the included files have: "
        "'c000', 'c001', 'c002', 'c003', 'c004', 'c005', 'c006', 'c007', 'c008', 'c009' … and 490 more"
    )


def test_a_use_of_the_other_kind_says_so(tmp_path: Path) -> None:
    include = "include: c.yaml\nprompts:\n  - "
    assert refusal(tmp_path, include + "characters: [{use: night}]\n", c=CHARACTERS) == (
        "m.yaml:5: prompts.0.characters.0.use: 'night' is no character but general_tags in what is included; write it under "
        "general_tags"
    )
    assert refusal(tmp_path, include + "general_tags: {use: len}\n", c=CHARACTERS) == (
        "m.yaml:5: prompts.0.general_tags.use: 'len' is a character in what is included, no general_tags; write it under "
        "characters"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("[c.yaml, c.yaml]", "m.yaml:3: include: 'c.yaml' stands twice; take one of them out"),
        ("[c.yaml, ./c.yaml]", "c.yaml: is included twice; take one of them out of include"),
        (r'"c\0.yaml"', r"m.yaml:3: include: 'c\x00.yaml' has a NUL, which no path has; take it out"),
        (
            "~nobody-at-all/c.yaml",
            "m.yaml:3: include: no home is known for the user of '~nobody-at-all/c.yaml'; write the path out",
        ),
        ("pipe.yaml", "pipe.yaml: is no regular file; name one"),
    ],
)
def test_an_include_that_cannot_be_read_is_named(tmp_path: Path, files: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert refusal(tmp_path, f"include: {files}\nprompts: [{{characters: [{{use: miku}}]}}]\n", c=CHARACTERS) == message


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (r'{file: "a\0.txt"}', r"m.yaml:3: prompts.file: 'a\x00.txt' has a NUL, which no path has; take it out"),
        (
            "{file: ~nobody-at-all/a.txt}",
            "m.yaml:3: prompts.file: no home is known for the user of '~nobody-at-all/a.txt'; write the path out",
        ),
        (
            "{template: '{a}', vary: {a: {file: ~nobody-at-all/a.txt}}}",
            "m.yaml:3: prompts.vary.a.file: no home is known for the user of '~nobody-at-all/a.txt'; write the path out",
        ),
    ],
)
def test_a_path_that_is_none_is_named(tmp_path: Path, prompts: str, message: str) -> None:
    assert refusal(tmp_path, f"prompts: {prompts}\n") == message
