"""Code that comes with weights: which of it a card pins, whether this machine may run it, and its bytes as they were pinned.

Runs nothing; imports no torch. A permission is for a digest, over the names and hashes of all files: it holds for exactly these
bytes, whichever card names them, whatever weights they come with and whoever asks, and for no others.
"""

import hashlib
import json
import os
import stat
from pathlib import Path

from farm.errors import ModelCardError
from farm.modelcard import ModelCard
from farm.plan import canonical_digest
from farm.settings import Settings, load_settings

MAX_BYTES = 2 * 2**20
"""Of one file: more is no code that somebody has read."""


def digest_of(card: ModelCard) -> str:
    """Return the digest of the code that a card pins, by which it is allowed: of the JSON object of names and hashes."""
    return canonical_digest(card.code)


def is_allowed(card: ModelCard, settings: Settings) -> bool:
    """Whether this machine may run what the card pins; a card without code needs no permission."""
    return not card.code or digest_of(card) in settings.remote_code


def how_to_allow(card: ModelCard, settings: Settings) -> str:
    """Return what to set so that this machine may run a card's code too."""
    return f"FARM_REMOTE_CODE='{json.dumps([*settings.remote_code, digest_of(card)])}'"


def refuse_unallowed(card: ModelCard, settings: Settings | None = None) -> None:
    """Raise ModelCardError where the card pins code that may not be run here. `settings`: this process's own where left out."""
    if not card.code:
        return
    settings = settings or load_settings()
    if is_allowed(card, settings):
        return
    names = sorted(card.code)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ModelCardError(
        f"model {card.name}: it runs code that comes with its weights ({', '.join(names[:3])}{more}), which this machine does "
        f"not allow; read that code, and to trust it set {how_to_allow(card, settings)} where it is rendered, or choose "
        "another model"
    )


def read_code(card: ModelCard, folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of code that a card pins, each read once. Raises ModelCardError; see `read_file`."""
    return {name: read_file(card, folder, name) for name in card.code}


def read_file(card: ModelCard, folder: Path, name: str) -> bytes:
    """Return one file's bytes where they are those that the card pins. Raises ModelCardError where they are not."""
    file = folder / name
    try:
        with open(file, "rb", opener=_without_waiting) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise ModelCardError(f"model {card.name}: {file}, pinned as code, is no regular file; name one")
            data = opened.read(MAX_BYTES + 1)
    except OSError as exc:
        raise ModelCardError(
            f"model {card.name}: {file}, pinned as code, cannot be read: {exc.strerror}; fetch the weights again, or mend the "
            "card's code"
        ) from exc
    if len(data) > MAX_BYTES:
        raise ModelCardError(
            f"model {card.name}: {file}, pinned as code, is larger than {MAX_BYTES // 2**20} MiB; name another file"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != card.code[name]:
        raise ModelCardError(
            f"model {card.name}: {file} is not the code that the card pins (sha256 {found[:12]}…, pinned "
            f"{card.code[name][:12]}…), and is not run; fetch the weights again, or read it and mend the card's code"
        )
    return data


def _without_waiting(path: str, flags: int) -> int:
    """Open a pipe that nobody writes to at once, rather than wait for somebody who does."""
    return os.open(path, flags | os.O_NONBLOCK)
