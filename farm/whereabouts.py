"""Where a farm that was started on this machine is: a note in the runtime folder, one a store, that its process keeps.

Commands on the same store find the farm by it. A note counts only while the process that wrote it lives.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Literal

import psutil

from farm.errors import FarmUnavailableError
from farm.settings import Settings

CLOCK_S = 2.0
"""How far apart two readings of one process's start may lie: it is counted from the machine's own, which drifts."""


@dataclasses.dataclass(frozen=True, slots=True)
class Whereabouts:
    """`address`: of Ray's control store, empty until it listens. `pid`, `started`: the process that keeps the farm.

    `command`: what started it. `url`: of its endpoint, empty where it has none, or not yet. `folder`: what is to be
    removed when that process did not come to it, empty for nothing.
    """

    address: str
    pid: int
    started: float
    command: Literal["render", "up"] = "render"
    url: str = ""
    folder: str = ""

    @property
    def lives(self) -> bool:
        """Whether the process that wrote the note is still there."""
        try:
            writer = psutil.Process(self.pid)
            return writer.status() != psutil.STATUS_ZOMBIE and abs(writer.create_time() - self.started) < CLOCK_S
        except psutil.Error:
            return False


def own_whereabouts(command: Literal["render", "up"], *, address: str = "", folder: str = "") -> Whereabouts:
    """Return a note on a farm that this process keeps."""
    process = psutil.Process()
    return Whereabouts(address, process.pid, process.create_time(), command=command, folder=folder)


def note_file(settings: Settings) -> Path:
    """Return where a farm on this store leaves word of itself; makes the folder, which must be this user's own."""
    folder = settings.runtime_dir
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as exc:
        raise FarmUnavailableError(f"{folder}: {exc.strerror}; set FARM_RUNTIME_DIR to a folder of yours") from exc
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise FarmUnavailableError(
            f"{folder} is open to other users, who could mislead this farm; set FARM_RUNTIME_DIR to a folder of yours"
        )
    return folder / f"{hashlib.sha256(absolute(settings.store).encode()).hexdigest()[:16]}.json"


def absolute(store: str) -> str:
    """Return a store's name as it reads from any folder."""
    return store if "://" in store else str(Path(store).resolve())


def write_note(note: Path, whereabouts: Whereabouts) -> None:
    """Leave word, whole or not at all."""
    record = {name: value for name, value in dataclasses.asdict(whereabouts).items() if value != ""}
    fresh = note.with_suffix(".new")
    try:
        fresh.write_text(json.dumps(record))
        fresh.replace(note)
    except OSError as exc:
        raise FarmUnavailableError(f"{note}: {exc.strerror}; set FARM_RUNTIME_DIR to a folder of yours") from exc


def read_note(note: Path) -> Whereabouts | None:
    """Return what a note of ours says, whether its writer lives or not; None where there is none that can be trusted."""
    try:
        if note.stat().st_uid != os.getuid():
            return None
        record = json.loads(note.read_text())
        known = {field.name for field in dataclasses.fields(Whereabouts)}
        found = Whereabouts(**{"address": "", **{name: value for name, value in record.items() if name in known}})
        return found if type(found.pid) is int and isinstance(found.started, float | int) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def living(note: Path) -> Whereabouts | None:
    """Return what a note says whose writer lives."""
    found = read_note(note)
    return found if found is not None and found.lives else None


def clear_away(note: Path) -> Whereabouts | None:
    """Remove what a farm left whose process was killed, its note too; return what the note said, None where nothing was left.

    Held for the note's lock by the caller, so that nobody starts meanwhile.
    """
    found = read_note(note)
    if found is None or found.lives:
        return None
    if found.folder:
        shutil.rmtree(found.folder, ignore_errors=True)
    note.unlink(missing_ok=True)
    return found


def refuse_second(settings: Settings) -> None:
    """Raise FarmUnavailableError while a farm on this store is kept by a process of this machine."""
    found = living(note_file(settings))
    if found is None:
        return
    store = absolute(settings.store)
    if found.command == "up":
        at = f" at {found.url}" if found.url else ""
        raise FarmUnavailableError(
            f"a farm for {store} runs already{at} (process {found.pid}); farm down ends it, or set another FARM_STORE"
        )
    raise FarmUnavailableError(
        f"farm render (process {found.pid}) runs a farm for {store} now; wait until it ends, or stop it with Ctrl-C: farm up "
        "goes on with its job"
    )
