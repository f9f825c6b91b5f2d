"""What people write, right and wrong."""

from pathlib import Path

import pytest

from farm import yamlfile
from farm.errors import ManifestError
from farm.manifest import Budget, Manifest, PromptFile, PromptTemplate, SeedCount, VaryFile, load_manifest

HEAD = "name: job\nmodel: sketch\nprompts: [a]\n"


def load(folder: Path, text: str | bytes) -> Manifest:
    path = folder / "m.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_manifest(path).manifest


def refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        load(folder, text)
    return caught.value.message.replace(f"{folder}/m.yaml", "m.yaml")


def test_reference_manifest_is_read_whole(tmp_path: Path) -> None:
    manifest = load(
        tmp_path,
        """\
name: captions-v1
model: z-image-turbo
prompts:
  file: s3://data/captions/*.parquet
  column: caption
  key: id
  per_row: {width: w, height: h}
  carry: [source]
seeds: {count: 4, from: key}
preset: draft
params: {num_inference_steps: 9, guidance_scale: 0, negative_prompt: ""}
sweep: {}
output: {format: webp, quality: 95}
priority: 60
""",
    )
    assert manifest.prompts == PromptFile(
        file="s3://data/captions/*.parquet",
        column="caption",
        key="id",
        per_row={"width": "w", "height": "h"},
        carry=("source",),
    )
    assert manifest.seeds == SeedCount(count=4, rule="key")
    assert (manifest.preset, manifest.params.guidance_scale, manifest.params.negative_prompt) == ("draft", 0.0, "")
    assert (manifest.output.format, manifest.output.quality, manifest.priority) == ("webp", 95, 60)


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2026-12-01T09:00+08:00", "2026-12-01T09:00:00+08:00"),
        ("2026-12-01 09:00:00 +08:00", "2026-12-01T09:00:00+08:00"),
        ("'2026-12-01T09:00:30Z'", "2026-12-01T09:00:30+00:00"),
        ("2026-12-01T09:00:00 Z", "2026-12-01T09:00:00+00:00"),
    ],
)
def test_limits_are_read(tmp_path: Path, written: str, moment: str) -> None:
    text = HEAD + f"pilot: 200\nfinish_by: {written}\nbudget: {{gpu_hours: 1.5, images: 5000}}\n"
    manifest = load(tmp_path, text)
    assert (manifest.pilot, manifest.finish_by) == (200, moment)
    assert manifest.budget == Budget(gpu_hours=1.5, images=5000)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert load(tmp_path, HEAD + "budget: {gpu_hours: 2}\n").budget == Budget(gpu_hours=2.0)


@pytest.mark.parametrize(
    "prompts",
    ["[a, b]", "{file: x.csv, key: id}", "{template: 'a {c}', vary: {c: [red, 2, 1.5]}, draw: 3}"],
)
def test_manifest_survives_json(tmp_path: Path, prompts: str) -> None:
    manifest = load(tmp_path, f"name: job\nmodel: sketch\nprompts: {prompts}\nseeds: {{count: 2, from: shared}}\n")
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_sweep_keeps_the_order_it_is_written_in(tmp_path: Path) -> None:
    manifest = load(tmp_path, HEAD + "sweep: {num_inference_steps: [4, 8], guidance_scale: [1, 2.5]}\n")
    assert list(manifest.sweep.items()) == [("num_inference_steps", (4, 8)), ("guidance_scale", (1, 2.5))]


def test_files_are_relative_to_the_manifest(tmp_path: Path) -> None:
    manifest = load(tmp_path, "name: job\nmodel: m\nprompts: {template: '{c}', vary: {c: {file: c.txt}}}\n")
    assert isinstance(manifest.prompts, PromptTemplate)
    assert manifest.prompts.vary == {"c": VaryFile(file=str(tmp_path / "c.txt"))}
    manifest = load(tmp_path, "name: job\nmodel: m\nprompts: {file: ../p.txt}\n")
    assert isinstance(manifest.prompts, PromptFile)
    assert manifest.prompts.file == str(tmp_path / "../p.txt")


def test_byte_order_mark_and_anchors_are_fine(tmp_path: Path) -> None:
    text = "name: job\nmodel: sketch\nprompts: &p [one, two]\noutput: {format: webp}\n"
    assert load(tmp_path, b"\xef\xbb\xbf" + text.encode()).prompts == ("one", "two")


def test_yes_and_dates_are_text(tmp_path: Path) -> None:
    assert load(tmp_path, "name: job\nmodel: sketch\nprompts: [yes, 2024-01-01]\n").prompts == ("yes", "2024-01-01")


BAD = [
    ("", "m.yaml: the file is empty; write a manifest into it"),
    ("# nothing\n", "m.yaml: the file is empty; write a manifest into it"),
    ("- a", "m.yaml:1: a manifest is a mapping of keys to values, got a list; write `key: value` lines"),
    ("text", "m.yaml:1: a manifest is a mapping of keys to values, got a single value; write `key: value` lines"),
    (b"\x89PNG\0\1", "m.yaml: binary data, not a manifest; name a YAML file"),
    (b"name: job\nmodel: caf\xe9\n", "m.yaml:2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
    ("name: a\nname: b\n", "m.yaml:2: `name` stands here and on line 1; keep one of them"),
    ("name: a\n\tmodel: b\n", "m.yaml:2: a tab where YAML wants blanks; indent with blanks"),
    ("name: a\nmodel: [\n", "m.yaml:3: not YAML"),
    (HEAD + "---\nname: b\n", "m.yaml:4: a second document starts here; keep one to a file"),
    ("name: !!python/name:os.system x\n", "m.yaml:1: the tag"),
    ("1: a\n", "m.yaml:1: a key must be text, got 1; put quotes around it"),
    ("x: &x {a: 1}\ny:\n  <<: *x\n", "m.yaml:3: `<<` is not supported; write the keys out"),
    ("a: &a [*a]\n", "m.yaml:1: nested deeper than 50 levels; anchors must not contain themselves"),
    ("a: " + "[" * 50_000, "m.yaml: nested too deep; a manifest needs a few levels only"),
    ("name: job\nmodel: m\n", "m.yaml:1: `prompts` is missing; add it"),
    (HEAD + "steps: 9\n", "m.yaml:4: unknown key `steps`; it is called num_inference_steps, in params"),
    (HEAD + "priorty: 9\n", "m.yaml:4: unknown key `priorty`; did you mean priority?"),
    (HEAD + "deadline: tomorrow\n", "m.yaml:4: unknown key `deadline`; it is called finish_by, at the top"),
    (HEAD + "finish-by: x\n", "m.yaml:4: unknown key `finish-by`; did you mean finish_by?"),
    (
        HEAD + "gpu_hours: 3\n",
        "m.yaml:4: unknown key `gpu_hours`; write budget: {gpu_hours: N, images: N}, or one of them",
    ),
    (HEAD + "preview: 9\n", "m.yaml:4: unknown key `preview`; it is called pilot, at the top"),
    (HEAD + "owner: me\n", "m.yaml:4: unknown key `owner`; the owner is a setting: FARM_OWNER"),
    (HEAD + "pilot: 0\n", "m.yaml:4: pilot: must be above 0, got 0; change it"),
    (HEAD + "pilot: 2.5\n", "m.yaml:4: pilot: must be a whole number, got 2.5; change it"),
    (HEAD + "pilot: 1000001\n", "m.yaml:4: pilot: must be at most 1000000, got 1000001; change it"),
    (
        HEAD + "finish_by: 2026-12-01T09:00\n",
        "m.yaml:4: finish_by: needs an offset from UTC, got '2026-12-01T09:00'; write 2026-12-01T09:00Z for UTC, or an "
        "offset of yours as 2026-12-01T09:00+08:00",
    ),
    (
        HEAD + "finish_by: 2026-12-01\n",
        "m.yaml:4: finish_by: needs an offset from UTC, got '2026-12-01'; write 2026-12-01T00:00Z for UTC",
    ),
    (
        HEAD + "finish_by: noon\n",
        "m.yaml:4: finish_by: must be a moment such as 2026-12-01T09:00+08:00, got 'noon'; write date, time and offset",
    ),
    (HEAD + "finish_by: 1764550800\n", "m.yaml:4: finish_by: must be a moment such as"),
    (HEAD + "finish_by: [1]\n", "m.yaml:4: finish_by: must be a moment such as"),
    (HEAD + "budget: {}\n", "m.yaml:4: budget: limits nothing; write gpu_hours, images or both, or leave budget out"),
    (HEAD + "budget:\n  gpu_hours: 0\n", "m.yaml:5: budget.gpu_hours: must be above 0.0, got 0; change it"),
    (HEAD + "budget:\n  images: 2.5\n", "m.yaml:5: budget.images: must be a whole number, got 2.5; change it"),
    (HEAD + "budget: {hours: 3}\n", "m.yaml:4: unknown key `hours` in budget; did you mean gpu_hours?"),
    (HEAD + "budget: 30\n", "m.yaml:4: budget: must be a mapping of keys to values, got 30; change it"),
    (
        HEAD + "params:\n  cfg_scale: 7\n",
        "m.yaml:5: unknown key `cfg_scale` in params; it is called guidance_scale, in params",
    ),
    (
        HEAD + "params: {sampler: euler}\n",
        "m.yaml:4: unknown key `sampler` in params; the model's card decides it; leave it out",
    ),
    (HEAD + "params: {widht: 64}\n", "m.yaml:4: unknown key `widht` in params; did you mean width?"),
    (HEAD + "params: {size: 64}\n", "m.yaml:4: unknown key `size` in params; write width and height, in params"),
    (
        HEAD + "params:\n  num_inference_steps: '20'\n",
        "m.yaml:5: params.num_inference_steps: must be a whole number, got '20'; take the quotes away",
    ),
    (
        HEAD + "params: {num_inference_steps: true}\n",
        "m.yaml:4: params.num_inference_steps: must be a whole number, got true; change it",
    ),
    (
        HEAD + "params: {num_inference_steps: 9.5}\n",
        "m.yaml:4: params.num_inference_steps: must be a whole number, got 9.5; change it",
    ),
    (HEAD + "params: {width: 0}\n", "m.yaml:4: params.width: must be above 0, got 0; change it"),
    (
        HEAD + "params: {guidance_scale: .nan}\n",
        "m.yaml:4: params.guidance_scale: must be a finite number, got .nan; write a number",
    ),
    (
        HEAD + "params: {guidance_scale: -.inf}\n",
        "m.yaml:4: params.guidance_scale: must be a finite number, got -.inf; write a number",
    ),
    (HEAD + "params: [1]\n", "m.yaml:4: params: must be a mapping of keys to values, got [1]; change it"),
    ("name: My Job\nmodel: m\nprompts: [a]\n", "m.yaml:1: name: must be 1 to 63 of a-z, 0-9, - and _, beginning with"),
    ("name: ../x\nmodel: m\nprompts: [a]\n", "m.yaml:1: name: must be 1 to 63"),
    ("name: job\nmodel: m\nprompts: []\n", "m.yaml:3: prompts: must not be empty; give it at least 1"),
    ("name: job\nmodel: m\nprompts: a\n", "m.yaml:3: prompts: must be a list, got 'a'; write [a, b, c]"),
    (
        "name: job\nmodel: m\nprompts:\n  - a\n  - '  '\n",
        "m.yaml:5: prompts.1: prompt 2 is empty; write one, or take the line out",
    ),
    ("name: job\nmodel: m\nprompts: [a, 3]\n", "m.yaml:3: prompts.1: must be text, got 3; put quotes around it"),
    (
        "name: job\nmodel: m\nprompts: {file: x.csv, colum: y}\n",
        "m.yaml:3: unknown key `colum` in prompts; did you mean column?",
    ),
    (
        "name: job\nmodel: m\nprompts: {file: x.csv, per_row: {steps: s}}\n",
        "m.yaml:3: unknown key `steps` in prompts.per_row; it is called num_inference_steps, in params",
    ),
    (
        "name: job\nmodel: m\nprompts: {file: x.csv, encoding: utf-9}\n",
        "m.yaml:3: prompts.encoding: no such encoding of text, got 'utf-9'; leave it out for UTF-8",
    ),
    (
        "name: job\nmodel: m\nprompts: {file: x.csv, encoding: hex}\n",
        "m.yaml:3: prompts.encoding: no such encoding of text, got 'hex'; leave it out for UTF-8",
    ),
    (
        'name: job\nmodel: m\nprompts: ["\\ud83d"]\n',
        "m.yaml:3: a text has half of a surrogate pair; write the character itself",
    ),
    (HEAD + "params: !!python/tuple [1]\n", "m.yaml:4: the tag tag:yaml.org,2002:python/tuple is not supported"),
    (
        "name: job\nmodel: m\nprompts: {template: 'a {c}', vary: {c: red}}\n",
        "m.yaml:3: prompts.vary.c: must be a list, got 'red'; write [a, b, c]",
    ),
    (
        "name: job\nmodel: m\nprompts: {template: 'a {c}', combine: cross}\n",
        "m.yaml:3: prompts.combine: must be one of product, zip, got 'cross'",
    ),
    (HEAD + "seeds: [1, -2]\n", "m.yaml:4: seeds.1: must be at least -1, got -2; change it"),
    (HEAD + "seeds: [4294967296]\n", "m.yaml:4: seeds.0: must be at most 4294967295, got 4294967296; change it"),
    (HEAD + "seeds: [1, 1]\n", "m.yaml:4: seeds.1: 1 stands twice in the list; keep it once"),
    (HEAD + "seeds: {count: 0}\n", "m.yaml:4: seeds.count: must be above 0, got 0; change it"),
    (
        HEAD + "seeds: {count: 2, from: key}\n",
        "m.yaml:4: seeds.from: from: key needs rows with keys; name their column in prompts.key, or write from: slot",
    ),
    (
        HEAD + "seeds: {from: keys}\n",
        "m.yaml:4: seeds.from: must be one of key, shared, slot, random, got 'keys'; did you mean key?",
    ),
    (
        HEAD + "sweep: {width: [64, 64.5]}\n",
        "m.yaml:4: sweep.width.1: should be a whole number, got 64.5; change it",
    ),
    (HEAD + "sweep: {width: []}\n", "m.yaml:4: sweep.width: width is an empty list; give it values, or take it out"),
    (HEAD + "sweep: {cfg: [1]}\n", "m.yaml:4: sweep.cfg: unknown parameter `cfg`; it is called guidance_scale"),
    (HEAD + "sweep: {width: 64}\n", "m.yaml:4: sweep.width: must be a list, got 64; write [a, b, c]"),
    (
        HEAD + "params: {width: 64}\nsweep: {width: [64]}\n",
        "m.yaml:5: sweep.width: width stands in params too; keep it in one of them",
    ),
    (
        HEAD + "output: {quality: 90}\n",
        "m.yaml:4: output.quality: has no effect on png, which is lossless; leave it out, or use format: webp",
    ),
    (
        HEAD + "output: {format: jpg}\n",
        "m.yaml:4: output.format: must be one of png, webp, jpeg, got 'jpg'; did you mean jpeg?",
    ),
    (
        HEAD + "output: {thumbnails: yes}\n",
        "m.yaml:4: output.thumbnails: must be true or false, got 'yes'; write true or false, without quotes",
    ),
    (HEAD + "priority: 101\n", "m.yaml:4: priority: must be at most 100, got 101; change it"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_manifest_is_refused_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message)


def test_several_faults_give_the_first_and_a_count(tmp_path: Path) -> None:
    message = refusal(tmp_path, HEAD + "priority: -1\nparams: {width: 0}\n")
    assert message == "m.yaml:4: priority: must be at least 0, got -1; change it (and 1 more)"


def test_billion_laughs_are_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    message = refusal(tmp_path, "\n".join(lines))
    assert message == ("m.yaml:6: more than 300000 values once its anchors are expanded; write less, or use files")


def test_anchors_cost_what_is_written_and_not_what_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        raise AssertionError("built before it was counted")

    monkeypatch.setattr(yamlfile._Builder, "build", build)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    for text in ("\n".join(lines), "a: &a [*a, *a]", "b: &b {c: [1, *b]}", f"a: &a [[{'x, ' * 1000}], *a]"):
        with pytest.raises(ManifestError, match="anchors"):
            yamlfile.parse_yaml(text.encode(), "m.yaml", ManifestError, what="manifest")


def test_anchors_within_bounds_are_expanded() -> None:
    text = b"a: &a [1, 2]\nb: [*a, *a]\nc: {d: *a}\n"
    found = yamlfile.parse_yaml(text, "m.yaml", ManifestError, what="manifest")
    assert found.data == {"a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"d": [1, 2]}}


def test_file_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"absent\.yaml: no such file; check the path"):
        load_manifest(tmp_path / "absent.yaml")
    with pytest.raises(ManifestError, match="this is a folder, not a manifest; name the file in it"):
        load_manifest(tmp_path)
