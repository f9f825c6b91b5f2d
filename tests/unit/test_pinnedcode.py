"""What a card pins of code: its digest, the permission for it, and the bytes of its files."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from farm.errors import ModelCardError
from farm.modelcard import ModelCard
from farm.pinnedcode import MAX_BYTES, digest_of, how_to_allow, is_allowed, read_code, refuse_unallowed
from farm.settings import Settings
from tests.drawing import card

DATA = b"x = 1\n"
SHA256 = hashlib.sha256(DATA).hexdigest()
FILES = ("pipeline.py", "transformer/my_blocks.py")


def coded(folder: Path, *files: str) -> ModelCard:
    return card(folder, family="diffusers", code=dict.fromkeys(files or FILES, SHA256))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "transformer").mkdir()
    for file in FILES:
        (tmp_path / file).write_bytes(DATA)
    return tmp_path


def test_the_digest_is_of_names_and_hashes_alone(tmp_path: Path) -> None:
    text = f'{{"pipeline.py":"{SHA256}","transformer/my_blocks.py":"{SHA256}"}}'
    assert digest_of(coded(tmp_path)) == hashlib.sha256(text.encode()).hexdigest()
    assert digest_of(coded(tmp_path / "elsewhere", *reversed(FILES))) == digest_of(coded(tmp_path))
    assert digest_of(coded(tmp_path, "pipeline.py")) != digest_of(coded(tmp_path))


def test_nothing_is_allowed_unless_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARM_REMOTE_CODE", raising=False)
    made = coded(tmp_path)
    with pytest.raises(ModelCardError) as caught:
        refuse_unallowed(made)
    assert caught.value.message == (
        "model sketch: it runs code that comes with its weights (pipeline.py, transformer/my_blocks.py), which this machine "
        f"does not allow; read that code, and to trust it set FARM_REMOTE_CODE='[\"{digest_of(made)}\"]' where it is rendered, "
        "or choose another model"
    )
    monkeypatch.setenv("FARM_REMOTE_CODE", f'["{digest_of(made)}"]')
    refuse_unallowed(made)
    assert is_allowed(card(tmp_path), Settings(remote_code=()))


def test_what_is_allowed_already_stays_in_what_to_set(tmp_path: Path) -> None:
    made, before = coded(tmp_path), "0" * 64
    assert how_to_allow(made, Settings(remote_code=(before,))) == (
        f"""FARM_REMOTE_CODE='["{before}", "{digest_of(made)}"]'"""
    )


def test_many_files_are_not_all_named(tmp_path: Path) -> None:
    with pytest.raises(ModelCardError, match=r"\(a\.py, b\.py, c\.py and 2 more\)"):
        refuse_unallowed(coded(tmp_path, *(f"{name}.py" for name in "abcde")), Settings())


def test_bytes_are_read_where_they_are_as_pinned(folder: Path) -> None:
    (folder / "pipeline.py").rename(folder / "blob")  # as in the cache of the hub's client
    (folder / "pipeline.py").symlink_to("blob")
    assert read_code(coded(folder), folder) == dict.fromkeys(FILES, DATA)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (
            lambda file: None,
            "cannot be read: No such file or directory; fetch the weights again, or mend the card's code",
        ),
        (lambda file: file.mkdir(), "cannot be read: Is a directory; fetch"),
        (os.mkfifo, "is no regular file; name one"),
        (lambda file: file.symlink_to("/dev/zero"), "is no regular file; name one"),
        (lambda file: file.write_bytes(bytes(MAX_BYTES + 1)), "is larger than 2 MiB; name another file"),
        (lambda file: file.symlink_to(__file__), "is not the code that the card pins (sha256 "),
        (
            lambda file: file.write_bytes(b""),
            f"pinned {SHA256[:12]}…), and is not run; fetch the weights again, or read it",
        ),
    ],
    ids=["missing", "a folder", "a pipe", "a device", "too large", "a link", "empty"],
)
def test_other_bytes_are_refused(folder: Path, put: Callable[[Path], object], message: str) -> None:
    file = folder / "pipeline.py"
    file.unlink()
    put(file)
    with pytest.raises(ModelCardError) as caught:
        read_code(coded(folder), folder)
    assert caught.value.message.startswith(f"model sketch: {file}")
    assert message in caught.value.message
