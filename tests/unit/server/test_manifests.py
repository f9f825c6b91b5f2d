"""Manifests as bodies: what they may say, and what they may not read."""

import json
from pathlib import Path

import pytest

from farm.errors import ManifestError
from farm.manifest import PromptFile
from farm.server.manifests import manifest_from, source_fault

SOURCES = ("s3://captions/public/", "s3://team")
PLAIN = {"name": "captions", "model": "sketch", "prompts": ["a red square"]}


def of(body: object, *, sources: tuple[str, ...] = SOURCES, name: str | None = None):
    return manifest_from(json.dumps(body).encode(), is_yaml=False, sources=sources, name=name).manifest


def of_yaml(text: str | bytes, *, sources: tuple[str, ...] = SOURCES, name: str | None = None):
    data = text.encode() if isinstance(text, str) else text
    return manifest_from(data, is_yaml=True, sources=sources, name=name).manifest


def test_json_and_yaml_say_the_same() -> None:
    text = "name: captions\nmodel: sketch\nprompts:\n  - a red square\nseeds: {count: 2, from: slot}\n"
    assert of_yaml(text) == of(PLAIN | {"seeds": {"count": 2, "from": "slot"}})


def test_the_name_may_come_from_the_address() -> None:
    nameless = {key: value for key, value in PLAIN.items() if key != "name"}
    assert of(nameless, name="captions").name == "captions"
    assert of(PLAIN, name="captions").name == "captions"
    with pytest.raises(ManifestError, match="name: is 'captions', and the address says 'other'; make them one"):
        of(PLAIN, name="other")
    with pytest.raises(ManifestError, match="`name` is missing; add it"):
        of(nameless)


@pytest.mark.parametrize(
    "file",
    [
        "s3://captions/public/a.txt",
        "s3://captions/public/x/*.parquet",
        "s3://captions/public/*",
        "s3://team/a/b/**/c.csv",
    ],
)
def test_files_below_an_allowed_prefix_may_be_read(file: str) -> None:
    prompts = of(PLAIN | {"prompts": {"file": file}}).prompts
    assert isinstance(prompts, PromptFile)
    assert prompts.file == file


@pytest.mark.parametrize(
    "file",
    [
        "prompts.txt",
        "/etc/passwd",
        "~/secrets.txt",
        "../a.txt",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "S3://team/a.txt",
        "s3:/team/a.txt",
        "http://169.254.169.254/latest/meta-data.txt",
        "s3://captions/a.txt",
        "s3://captions/public",
        "s3://captions/public-not/a.txt",
        "s3://captions/p*/a.txt",
        "s3://captions/*",
        "s3://cap*/public/a.txt",
        "s3://teams/a.txt",
        "s3://other/s3://team/a.txt",
        "s3://team/../captions/a.txt",
        "s3://captions/public/../a.txt",
        "s3://captions/public/./a.txt",
        "s3://captions/public//a.txt",
        "s3://captions/public/..",
        "s3://captions/public/x/../../a.txt",
        "s3:///etc/passwd",
        "s3://team",
        "s3://team/",
        "s3://team\\..\\a.txt",
        "s3://team/a\n.txt",
        "s3://team/a\u202e.txt",
        " s3://team/a.txt",
    ],
)
def test_everything_else_is_out_of_reach(file: str) -> None:
    with pytest.raises(ManifestError, match=r"^manifest: prompts\.file: must (lie below|be a whole address)"):
        of(PLAIN | {"prompts": {"file": file}})
    with pytest.raises(ManifestError, match=r"^manifest: prompts\.vary\.colour\.file: must "):
        of(PLAIN | {"prompts": {"template": "{colour}", "vary": {"colour": {"file": file}}}})


def test_without_sources_no_file_is_read_at_all() -> None:
    with pytest.raises(ManifestError, match="a manifest sent over HTTP reads no files here"):
        of(PLAIN | {"prompts": {"file": "s3://team/a.txt"}}, sources=())
    assert source_fault("/etc/passwd", ["/etc"]) is not None
    assert source_fault("s3://team/a.txt", ["/etc", "s3://team"]) is None


def test_a_local_file_is_never_looked_at(tmp_path: Path) -> None:
    there = tmp_path / "prompts.txt"
    there.write_text("secret\n")
    messages = set()
    for file in (str(there), str(tmp_path / "not-there.txt")):
        with pytest.raises(ManifestError) as raised:
            of(PLAIN | {"prompts": {"file": file}})
        messages.add(raised.value.message.replace(file[:50], "").partition(", got")[0])
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is empty; send a manifest in it"),
        (b" \n", "the body is empty; send a manifest in it"),
        (b"[]", "manifest: a manifest is an object of keys and values, got a list; write {...}"),
        (b'"text"', "manifest: a manifest is an object of keys and values, got a single value; write {...}"),
        (b"null", "manifest: a manifest is an object of keys and values, got a single value; write {...}"),
        (b"{", "manifest:1: not JSON: Expecting property name enclosed in double quotes in column 2; mend it there"),
        (b'{"name": NaN}', "manifest: NaN is no JSON number; write a finite one"),
        (b'{"priority": 1e999}', "manifest: a number is too large to be one; write a finite one"),
        (b'{"name": "a", "name": "b"}', "manifest: the key 'name' stands twice in one object; keep one of them"),
        (b'{"name": "\\ud800"}', "manifest: a text has half of a surrogate pair; write the character itself"),
        (b'{"\\ud800": 1}', "manifest: a text has half of a surrogate pair; write the character itself"),
        (b'{"name": "\xff"}', "manifest:1: not UTF-8 (byte 0xff); save the file as UTF-8"),
        ('{"name": "a"}'.encode("utf-16"), "manifest:1: not UTF-8 (byte 0xff); save the file as UTF-8"),
        (b'{"name": "a\0"}', "manifest: binary data, not a manifest; name a YAML file"),
        (b"[" * 100_000, "manifest: nested too deep; a manifest needs a few levels only"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "manifest: nested deeper than 50 levels; write it flat"),
        (b'{"a": [' + b"0," * 300_000 + b"0]}", "manifest: more than 300000 values; write less, or use files"),
    ],
)
def test_json_that_is_no_manifest_is_refused_in_words(body: bytes, message: str) -> None:
    with pytest.raises(ManifestError) as raised:
        manifest_from(body, is_yaml=False, sources=SOURCES)
    assert raised.value.message == message


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(
        ManifestError, match=r"^manifest: a whole number has more than 4300 digits; write a smaller one$"
    ):
        manifest_from(b'{"priority": ' + b"9" * 5000 + b"}", is_yaml=False, sources=SOURCES)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 300000 values once its anchors are expanded"),
        ("a: &a [*a]\n", "nested deeper than 50 levels|undefined alias"),
        ("- a\n- b\n", "manifest:1: a manifest is a mapping of keys to values, got a list"),
        ("text", "got a single value"),
        ("name: a\nname: b\n", "manifest:2: `name` stands here and on line 1; keep one of them"),
        ("name: !!python/object/apply:os.system [id]\n", "is not supported"),
        ("<<: {name: a}\n", "`<<` is not supported"),
        ("name: .nan\n", "must be a finite number"),
        ("name: a\n---\nname: b\n", "a second document starts here"),
        ("? [a, b]\n: 1\n", "a key must be text"),
        ("[" * 1000, "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("name: 7\nmodel: sketch\nprompts: [a]\n", "manifest:1: name: must be text, got 7; put quotes around it"),
        ("name: a\nmodel: sketch\nprompts: [a]\nseeds: x\n", "manifest:4: seeds: must be a list, got 'x'; write"),
        ("name: a\nmodel: sketch\nprompts: [a]\nsteps: 4\n", "unknown key `steps`; it is called num_inference_steps"),
        ("name: ../a\nmodel: sketch\nprompts: [a]\n", "manifest:1: name: must be 1 to 63 of a-z"),
    ],
)
def test_yaml_that_is_no_manifest_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        of_yaml(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_yaml_in_another_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(ManifestError, match=r"not UTF-8|binary data"):
        of_yaml("name: Größe\nmodel: sketch\n".encode(encoding))


SCENE = PLAIN | {"prompts": [{"characters": [{"use": "miku"}]}]}


def test_an_include_below_an_allowed_prefix_is_read() -> None:
    asked: list[str] = []

    def read_url(url: str) -> bytes:
        asked.append(url)
        return b"characters:\n  miku: {n: hatsune_miku}\n"

    body = json.dumps(SCENE | {"include": "s3://team/c.yaml"}).encode()
    loaded = manifest_from(body, is_yaml=False, sources=SOURCES, read_url=read_url)
    assert loaded.manifest.prompts == ("<character_1>\n<n>hatsune_miku</n>\n</character_1>",)
    assert asked == ["s3://team/c.yaml"]


@pytest.mark.parametrize("file", ["c.yaml", "/etc/passwd", "file:///etc/passwd", "s3://captions/private/c.yaml"])
def test_nothing_else_is_included(file: str) -> None:
    def read_url(url: str) -> bytes:
        raise AssertionError(url)

    for sources, said in (
        (SOURCES, "must lie below s3://captions/public/ or s3://team, got"),
        ((), "reads no files here"),
    ):
        body = json.dumps(SCENE | {"include": [file]}).encode()
        with pytest.raises(ManifestError, match=f"manifest: include.0: .*{said}"):
            manifest_from(body, is_yaml=False, sources=sources, read_url=read_url)
