"""Attach to a farm that runs, or start one on this machine for as long as it is needed.

A farm started here writes where it listens into the runtime folder, so that a second command on the same store attaches
to it. It ends with the process that started it, whatever ends that: Ray's own processes die with their parent.
"""

import hashlib
import json
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
os.environ.setdefault("RAY_worker_niceness", "0")

# Ray reads these once, at its import. The last two: no stack dump of its own when this process is asked to end; and
# renderers at the priority of everything else, not below it.
import psutil
import ray
from filelock import FileLock
from ray.exceptions import RayError, RayTaskError

from actors.daemons import Daemons
from actors.dispatcher import DispatcherActor
from actors.names import DISPATCHER, NAMESPACE
from farm import __version__
from farm.devices import cores_each, default_renderers, local_device
from farm.errors import FarmError, FarmUnavailableError, error_of
from farm.run import JobProgress
from farm.settings import Settings

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 1024**2
"""Pictures never pass through Ray's object store; this holds calls alone."""
ANSWER_S = 10.0
CALL_TRIES = 3
CONTROL_STORE_EVERY_S = 2.0
CONTROL_STORE_REFUSALS = 3
CLOCK_S = 2.0
"""How far apart two readings of one process's start may lie: it is counted from the machine's own, which drifts."""


class Farm:
    """A handle on the live farm. Leaving the context stops the farm if this process started it."""

    def __init__(self, dispatcher: Any, *, note: Path | None, daemons: Daemons | None = None):
        self._dispatcher = dispatcher
        self._note = note
        self._daemons = daemons or Daemons()
        self._control_store = _ControlStore(ray.get_runtime_context().gcs_address)

    @property
    def started_here(self) -> bool:
        """Whether this process started the farm, so that the farm ends with it."""
        return self._note is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self.started_here:
                ray.get(self._dispatcher.stop.remote(), timeout=ANSWER_S)
        except RayError:
            log.info("the farm was gone before it was stopped")
        finally:
            ray.shutdown()
            if self._note is not None:
                self._note.unlink(missing_ok=True)

    def submit(self, job: str) -> None:
        """Tell the dispatcher to read a job from the store: after a plan, a pass or a control was written."""
        self._call("submit", job)

    def progress(self, job: str) -> JobProgress:
        """Snapshot of a job; submits it again to a dispatcher that restarted and forgot it.

        Raises what stalled it, under its own code, or FarmUnavailableError.
        """
        self._daemons.check()
        self._control_store.check()
        progress, trouble = self._call("progress", job)
        if progress is None:
            self.submit(job)
            progress, trouble = self._call("progress", job)
        if trouble is not None and trouble.startswith("renderers: "):
            raise FarmUnavailableError(f"no renderer can be started: {trouble.removeprefix('renderers: ')}")
        if progress is None:
            raise FarmUnavailableError(f"the farm does not know job {job}; run farm render again")
        if trouble is not None:
            raise error_of(trouble, progress.message or "the job stopped and said no more")
        snapshot: JobProgress = progress
        return snapshot

    def about(self) -> tuple[str, str]:
        """The store that the farm serves, and its version."""
        store, version = self._call("about")
        return store, version

    def others(self, job: str) -> tuple[str, ...]:
        """Other jobs that this farm is still working on."""
        return tuple(name for name in self._call("unfinished") if name != job)

    def _call(self, method: str, *arguments: object) -> Any:
        for _ in range(CALL_TRIES):
            try:
                return ray.get(getattr(self._dispatcher, method).remote(*arguments), timeout=ANSWER_S)
            except RayTaskError as exc:
                if isinstance(exc.cause, FarmError):
                    raise exc.cause from None
                raise FarmUnavailableError(
                    f"the dispatcher failed in {method}: {type(exc.cause).__name__}: {exc.cause}; its log has the traceback"
                ) from exc
            except RayError as exc:
                failure = exc
                for _ in range(CONTROL_STORE_REFUSALS):
                    self._daemons.check()
                    self._control_store.check(now=True)
                    time.sleep(0.5)
        raise FarmUnavailableError(
            f"the farm does not answer ({type(failure).__name__}); what was stored is safe: run the command again"
        ) from failure


class _ControlStore:
    """Ray's control store. Without it actors go on for a while, and after a minute Ray ends every process, this one too,
    with no more than a log line of its own: so we look ourselves, and say it in our words before that."""

    def __init__(self, address: str):
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._looked_at = 0.0
        self._refused = 0

    def check(self, *, now: bool = False) -> None:
        """Raise FarmUnavailableError once it has refused several looks in a row; looks now and then, or `now`."""
        if not now and time.monotonic() - self._looked_at < CONTROL_STORE_EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            socket.create_connection(self._address, timeout=CONTROL_STORE_EVERY_S).close()
            self._refused = 0
        except OSError as exc:
            self._refused += 1
            if self._refused >= CONTROL_STORE_REFUSALS:
                raise FarmUnavailableError(
                    "Ray's control store is gone, and the farm with it; what was stored is safe: run the command again"
                ) from exc


def open_farm(
    settings: Settings,
    *,
    renderers: int | None = None,
    start: bool = True,
    give_up: Callable[[FarmUnavailableError], object] | None = None,
) -> Farm:
    """Attach to the farm on this machine or at `settings.address` that serves the same store, or start one here.

    `give_up` is called in a thread where Ray dies while it starts and never comes back from that; it should end the process.
    Raises FarmUnavailableError when there is none and `start` is false, or when Ray does not start.
    """
    try:
        if settings.address:
            return _join(settings, renderers, start=start)
        note = _note(settings)
        with FileLock(note.with_suffix(".lock")):
            farm = _found(settings, note)
            if farm is not None:
                return farm
            if not start:
                raise FarmUnavailableError(f"no farm runs on this machine for {settings.store}; farm render starts one")
            return _started(settings, note, renderers, give_up)
    except FarmError:
        raise
    except Exception as exc:
        # Ray has no root of its errors here: a node that does not come up is a bare Exception.
        ray.shutdown()
        raise FarmUnavailableError(
            f"Ray does not start or answer: {' '.join(str(exc).split())}; run the command again, or farm doctor"
        ) from exc


def _found(settings: Settings, note: Path) -> Farm | None:
    """Attach to the farm that this machine's note names, if it lives."""
    address = _address(note)
    if address is None:
        return None
    try:
        _init(address=address)
        return _attach(ray.get_actor(DISPATCHER, NAMESPACE), settings)
    except (FarmUnavailableError, RayError, ConnectionError, RuntimeError, ValueError):
        ray.shutdown()
        if _address(note) is not None:
            raise
        return None


def _join(settings: Settings, renderers: int | None, *, start: bool) -> Farm:
    """Use a cluster that somebody else keeps up: attach to its farm, or bring one up on it."""
    _init(address=settings.address)
    try:
        return _attach(ray.get_actor(DISPATCHER, NAMESPACE), settings)
    except ValueError:
        if not start:
            raise FarmUnavailableError(f"no farm runs at {settings.address}; farm render starts one") from None
    gpus = int(ray.cluster_resources().get("GPU", 0))
    count = renderers or settings.renderers or gpus or 1
    return Farm(_dispatcher(settings, count, cores=1, gpu=gpus > 0, all_open=True, pid=0), note=None)


def _started(
    settings: Settings,
    note: Path,
    renderers: int | None,
    give_up: Callable[[FarmUnavailableError], object] | None,
) -> Farm:
    """Start Ray and a farm on this machine."""
    device = local_device()
    count = renderers or settings.renderers or default_renderers(device)
    _write_token()
    try:
        with Daemons(give_up) as daemons:
            _init(
                address="local",
                num_cpus=count + 1,
                num_gpus=len(device.gpus),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
            )
            cores, gpu = cores_each(device, count), bool(device.gpus)
            dispatcher = _dispatcher(settings, count, cores=cores, gpu=gpu, all_open=False, pid=os.getpid())
        _write_note(note)
    except BaseException:
        ray.shutdown()
        raise
    return Farm(dispatcher, note=note, daemons=daemons)


def _dispatcher(settings: Settings, renderers: int, *, cores: int, gpu: bool, all_open: bool, pid: int) -> Any:
    """The dispatcher of a new farm, which ends with the process `pid` where that is not 0."""
    return DispatcherActor.options(  # type: ignore[attr-defined]
        name=DISPATCHER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(
        settings.model_copy(update={"store": _absolute(settings.store)}),
        renderers,
        cores=cores,
        gpu=gpu,
        all_open=all_open,
        farm=secrets.token_hex(8),
        pid=pid,
    )


def _attach(dispatcher: Any, settings: Settings) -> Farm:
    farm = Farm(dispatcher, note=None)
    store, version = farm.about()
    if (store, version) != (_absolute(settings.store), __version__):
        ray.shutdown()
        raise FarmUnavailableError(
            f"the farm that runs serves {store} with version {version}, this command asks for {_absolute(settings.store)} "
            f"with version {__version__}; set FARM_STORE and install the same version, or stop that farm first"
        )
    return farm


def _init(**options: Any) -> None:
    ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **options)


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).resolve())


def _note(settings: Settings) -> Path:
    """Where a farm on this store leaves word of itself; makes the folder, which must be this user's own."""
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
    return folder / f"{hashlib.sha256(_absolute(settings.store).encode()).hexdigest()[:16]}.json"


def _write_note(note: Path) -> None:
    process = psutil.Process()
    address = ray.get_runtime_context().gcs_address
    record = json.dumps({"address": address, "pid": process.pid, "started": process.create_time()})
    try:
        note.write_text(record)
    except OSError as exc:
        raise FarmUnavailableError(f"{note}: {exc.strerror}; set FARM_RUNTIME_DIR to a folder of yours") from exc


def _address(note: Path) -> str | None:
    """The address in a note of ours whose writer still lives."""
    try:
        if note.stat().st_uid != os.getuid():
            return None
        record = json.loads(note.read_text())
        writer = psutil.Process(record["pid"])
        alive = writer.status() != psutil.STATUS_ZOMBIE and abs(writer.create_time() - record["started"]) < CLOCK_S
        return str(record["address"]) if alive else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _write_token() -> None:
    """Make Ray's authentication token, where there is none, readable by its owner alone; Ray itself would not."""
    token = Path.home() / ".ray" / "auth_token"
    try:
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        if token.stat().st_uid == os.getuid():
            token.chmod(0o600)
    except OSError as exc:
        raise FarmUnavailableError(
            f"{token}: {exc.strerror}; Ray keeps its token there: set HOME to a folder of yours"
        ) from exc
