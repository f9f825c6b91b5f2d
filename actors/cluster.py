"""Attach to a farm that runs, or start one on this machine for as long as it is needed.

A farm started here writes where it listens into the runtime folder, so that a second command on the same store attaches
to it. It ends with the process that started it, whatever ends that: Ray's own processes die with their parent.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "40")

# Ray reads these once, at its import. The last: how long a process of Ray's, this one too, outlives the control store before
# it ends itself with no more than a log line. Longer than `_call` takes to give up, so that people read our words instead.
import psutil
import ray
from ray.exceptions import RayError

from actors.dispatcher import DispatcherActor
from actors.names import DISPATCHER, NAMESPACE
from farm.devices import default_renderers, local_device
from farm.dispatch import JobProgress
from farm.errors import FarmError, FarmUnavailableError, error_of
from farm.settings import Settings

OBJECT_STORE_BYTES = 128 * 1024**2
"""Pictures never pass through Ray's object store; this holds calls alone."""
ANSWER_S = 10.0


class Farm:
    """A handle on the live farm. Leaving the context stops the farm if this process started it."""

    def __init__(self, dispatcher: Any, *, note: Path | None, renderers: int):
        self._dispatcher = dispatcher
        self._note = note
        self.renderers = renderers

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
            pass  # it is gone already, and so is what it would have stopped
        finally:
            ray.shutdown()
            if self._note is not None:
                self._note.unlink(missing_ok=True)

    def submit(self, job: str) -> None:
        """Tell the dispatcher to read a job from the store: after a plan, a pass or a control was written."""
        self._call("submit", job)

    def progress(self, job: str) -> JobProgress:
        """Snapshot of a job; submits it again to a dispatcher that restarted.

        Raises what stalled it, under its own code, or FarmUnavailableError.
        """
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

    def others(self, job: str) -> tuple[str, ...]:
        """Other jobs that this farm is still working on."""
        return tuple(name for name in self._call("unfinished") if name != job)

    def _call(self, method: str, *arguments: object) -> Any:
        for _ in range(3):
            try:
                return ray.get(getattr(self._dispatcher, method).remote(*arguments), timeout=ANSWER_S)
            except RayError as exc:
                cause = getattr(exc, "cause", None)
                if isinstance(cause, FarmError):
                    raise cause from None
                failure = exc
                time.sleep(1.0)
        raise FarmUnavailableError(
            f"the farm does not answer ({type(failure).__name__}); what was stored is safe: run the command again"
        ) from failure


def open_farm(settings: Settings, *, renderers: int | None = None, start: bool = True) -> Farm:
    """Attach to the farm on this machine or at `settings.address` that serves the same store, or start one here.

    Raises FarmUnavailableError when there is none and `start` is false, or when Ray does not start.
    """
    note = _note(settings)
    address = settings.address or _address(note)
    if address:
        _init(address=address)
        try:
            return Farm(ray.get_actor(DISPATCHER, NAMESPACE), note=None, renderers=0)
        except ValueError:
            if not settings.address:
                ray.shutdown()
    elif not start:
        raise FarmUnavailableError(f"no farm runs on this machine for {settings.store}; farm render starts one")
    device = local_device()
    count = renderers or settings.renderers or default_renderers(device)
    if not settings.address:
        _init(
            address="local",
            num_cpus=count + 1,
            num_gpus=len(device.gpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
        _tighten_token()
    gpu = "GPU" in ray.cluster_resources()
    dispatcher = DispatcherActor.options(  # type: ignore[attr-defined]
        name=DISPATCHER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote(
        settings.model_copy(update={"store": _absolute(settings.store)}),
        count,
        gpu=gpu,
        all_open=settings.address is not None,
    )
    if not settings.address:
        _write_note(note)
    return Farm(dispatcher, note=None if settings.address else note, renderers=count)


def _init(**options: Any) -> None:
    try:
        ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **options)
    except (RayError, ConnectionError, RuntimeError, OSError, ValueError) as exc:
        raise FarmUnavailableError(f"Ray does not start or answer: {exc}; farm doctor looks into it") from exc


def _absolute(store: str) -> str:
    return store if "://" in store else str(Path(store).resolve())


def _note(settings: Settings) -> Path:
    digest = hashlib.sha256(_absolute(settings.store).encode()).hexdigest()[:16]
    return settings.runtime_dir / f"{os.getuid()}-{digest}.json"


def _write_note(note: Path) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    address = ray.get_runtime_context().gcs_address
    note.write_text(json.dumps({"address": address, "pid": process.pid, "started": process.create_time()}))


def _address(note: Path) -> str | None:
    """The address in a note whose writer still lives."""
    try:
        record = json.loads(note.read_text())
        alive = psutil.Process(record["pid"]).create_time() == record["started"]
        return str(record["address"]) if alive else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def _tighten_token() -> None:
    """Ray writes its authentication token readable by everybody; only its owner should read it."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)
