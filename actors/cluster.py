"""Attach to a farm that runs, or start one on this machine for as long as it is needed.

A farm started here writes where it listens into the runtime folder, so that a second command on the same store attaches
to it. It ends with the process that started it, whatever ends that: Ray's own processes die with their parent.
"""

import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")

os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_enable_metrics_collection", "0")
os.environ.setdefault("AUTOSCALER_METRIC_PORT", "-1")
os.environ.setdefault("DASHBOARD_METRIC_PORT", "-1")

# Ray reads these once, at its import. No stack dump of its own when this process is asked to end; renderers at the priority
# of everything else, not below it; and none of Ray's own metrics, whose ports on all interfaces ask for no token.
import ray
from filelock import FileLock
from ray.exceptions import RayError, RayTaskError

from actors.daemons import CONTROL_STORE_EVERY_S, CONTROL_STORE_REFUSALS, ControlStore, Daemons
from actors.dispatcher import DispatcherActor
from actors.names import DISPATCHER, NAMESPACE, ON_HEAD
from farm import __version__
from farm.devices import cores_each, default_renderers, local_device
from farm.errors import FarmError, FarmUnavailableError, error_of
from farm.run import JobProgress
from farm.settings import Settings
from farm.whereabouts import (
    absolute,
    clear_away,
    living,
    note_file,
    own_whereabouts,
    read_note,
    refuse_second,
    write_note,
)

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 128 * 1024**2
"""The pictures of jobs never pass through Ray's object store; this holds calls, and the answers to urgent ones with their
pictures."""
LOOPBACK = {"_node_ip_address": "127.0.0.2"} if sys.platform == "linux" else {}
"""Where Ray's HTTP ports listen on a farm of one machine. For 127.0.0.1 Ray puts in the machine's address of its own accord."""
ANSWER_S = 10.0
CALL_TRIES = 3


class Farm:
    """A handle on the live farm. Leaving the context stops the farm if this process started it."""

    def __init__(self, dispatcher: Any, *, note: Path | None, daemons: Daemons | None = None, joined: bool = False):
        """`note`: where this process left word of the farm that it keeps. `joined`: on a Ray that outlives it."""
        self._dispatcher = dispatcher
        self._note = note
        self._joined = joined
        self._daemons = daemons or Daemons()
        self._control_store = ControlStore(ray.get_runtime_context().gcs_address)

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
                _end(self._dispatcher, kill=self._joined)
        except RayError:
            log.info("the farm was gone before it was stopped")
        finally:
            ray.shutdown()
            if self._note is not None:
                self._note.unlink(missing_ok=True)

    def announce(self, url: str) -> None:
        """Leave word of the endpoint, for commands on this machine."""
        if self._note is not None:
            address = ray.get_runtime_context().gcs_address
            found = read_note(self._note) or own_whereabouts("up")
            write_note(self._note, replace(found, address=address, url=url))

    def check(self) -> None:
        """Raise FarmUnavailableError once Ray has died below a farm that this process keeps."""
        self._daemons.check()
        self._control_store.check()

    @contextmanager
    def watched(self, give_up: Callable[[FarmUnavailableError], object]) -> Iterator[None]:
        """Call `give_up`, in a thread, once Ray has died while the block waits for it: such a wait may never end."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(CONTROL_STORE_EVERY_S):
                try:
                    self.check()
                except FarmUnavailableError as error:
                    if not over.wait(CONTROL_STORE_EVERY_S):
                        give_up(error)
                    return

        threading.Thread(target=watch, name="farm-watch", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def submit(self, job: str) -> None:
        """Tell the dispatcher to read a job from the store: after a plan, a pass or a control was written."""
        self._call("submit", job)

    def progress(self, job: str) -> JobProgress:
        """Snapshot of a job; submits it again to a dispatcher that restarted and forgot it.

        Raises what stalled it, under its own code, or FarmUnavailableError.
        """
        self.check()
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
    with _readable():
        if settings.address:
            return _join(settings, renderers, start=start)
        note = note_file(settings)
        with FileLock(note.with_suffix(".lock")):
            farm = _found(settings, note)
            if farm is not None:
                return farm
            if not start:
                raise FarmUnavailableError(f"no farm runs on this machine for {settings.store}; farm render starts one")
            return _started(settings, note, renderers, give_up)


def bring_up(
    settings: Settings,
    *,
    environment: Mapping[str, str],
    folder: Path,
    give_up: Callable[[FarmUnavailableError], object] | None = None,
) -> Farm:
    """Start the farm that an endpoint stands before, which takes up every unfinished job; on `settings.address` where given.

    `environment`: variables for Ray's processes there. `folder`: what the next start removes should this process be killed.
    Raises FarmUnavailableError, also where a farm on this store runs already.
    """
    note = note_file(settings)
    with _readable(), FileLock(note.with_suffix(".lock")):
        _make_way(note, settings)
        write_note(note, own_whereabouts("up", folder=str(folder)))
        try:
            if not settings.address:
                return _started(settings, note, None, give_up, folder=str(folder), all_open=True)
            _init(address=settings.address, runtime_env={"env_vars": dict(environment)})
            _refuse_adopting(settings)
            dispatcher = _dispatcher_there(settings, settings.renderers, get_if_exists=False)
            farm = _attach(dispatcher, settings, note=note)
            farm.announce("")
            return farm
        except BaseException:
            note.unlink(missing_ok=True)
            raise


def take_down(settings: Settings) -> bool:
    """End the farm on the Ray at `settings.address`, whoever started it; False where there is none. Ray itself stays up."""
    from ray import serve

    with _readable():
        _init(address=settings.address)
        try:
            serve.shutdown()
            _end(ray.get_actor(DISPATCHER, NAMESPACE), kill=True)
        except ValueError:
            return False
        finally:
            ray.shutdown()
    return True


@contextmanager
def _readable() -> Iterator[None]:
    """Turn what Ray raises while it starts into our own words."""
    try:
        yield
    except FarmError:
        raise
    except Exception as exc:
        # Ray has no root of its errors here: a node that does not come up is a bare Exception.
        ray.shutdown()
        raise FarmUnavailableError(
            f"Ray does not start or answer: {' '.join(str(exc).split())}; run the command again, or farm doctor"
        ) from exc


def _make_way(note: Path, settings: Settings) -> None:
    """Refuse to start beside a farm on the same store, and clear away what a killed one left."""
    refuse_second(settings)
    clear_away(note)


def _refuse_adopting(settings: Settings) -> None:
    """Refuse to start on a cluster where a farm runs: it would end with this process, which did not start it."""
    try:
        ray.get_actor(DISPATCHER, NAMESPACE)
    except ValueError:
        return
    ray.shutdown()
    raise FarmUnavailableError(f"a farm runs at {settings.address} already; farm down ends it")


def _found(settings: Settings, note: Path) -> Farm | None:
    """Attach to the farm that this machine's note names, if it lives."""
    found = living(note)
    if found is None or not found.address:
        return None
    try:
        _init(address=found.address)
        return _attach(ray.get_actor(DISPATCHER, NAMESPACE), settings)
    except (FarmUnavailableError, RayError, ConnectionError, RuntimeError, ValueError):
        ray.shutdown()
        if living(note) is not None:
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
    return Farm(_dispatcher_there(settings, renderers or settings.renderers), note=None)


def _started(
    settings: Settings,
    note: Path,
    renderers: int | None,
    give_up: Callable[[FarmUnavailableError], object] | None,
    *,
    folder: str = "",
    all_open: bool = False,
) -> Farm:
    """Start Ray and a farm on this machine."""
    device = local_device()
    count = renderers or settings.renderers or default_renderers(device, stays=all_open)
    _write_token()
    try:
        with Daemons(give_up) as daemons:
            _init(
                address="local",
                num_cpus=count + 1,
                num_gpus=len(device.gpus),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **LOOPBACK,
            )
            cores, gpu = cores_each(device, count), bool(device.gpus)
            dispatcher = _dispatcher(settings, count, cores=cores, gpu=gpu, all_open=all_open, pid=os.getpid())
        address = ray.get_runtime_context().gcs_address
        write_note(note, own_whereabouts("up" if all_open else "render", address=address, folder=folder))
    except BaseException:
        ray.shutdown()
        raise
    return Farm(dispatcher, note=note, daemons=daemons)


def _dispatcher_there(settings: Settings, renderers: int | None, *, get_if_exists: bool = True) -> Any:
    """The dispatcher on a cluster that somebody else keeps up; it outlives this process.

    Where the cluster offers neither GPUs nor CPUs yet, renderers wait for GPU nodes to come.
    """
    found = ray.cluster_resources()
    gpus = int(found.get("GPU", 0))
    on_gpus = gpus > 0 or not found.get("CPU")
    return _dispatcher(
        settings, renderers or gpus or 1, cores=1, gpu=on_gpus, all_open=True, pid=0, get_if_exists=get_if_exists
    )


def _dispatcher(
    settings: Settings,
    renderers: int,
    *,
    cores: int,
    gpu: bool,
    all_open: bool,
    pid: int,
    get_if_exists: bool = True,
) -> Any:
    """The dispatcher of a new farm, which ends with the process `pid` where that is not 0.

    Of two who start one at once, the second gets the first one's, or, without `get_if_exists`, a ValueError.
    """
    return DispatcherActor.options(  # type: ignore[attr-defined]
        name=DISPATCHER, namespace=NAMESPACE, lifetime="detached", get_if_exists=get_if_exists, resources=ON_HEAD
    ).remote(
        settings.model_copy(update={"store": absolute(settings.store)}),
        renderers,
        cores=cores,
        gpu=gpu,
        all_open=all_open,
        farm=secrets.token_hex(8),
        pid=pid,
    )


def _attach(dispatcher: Any, settings: Settings, *, note: Path | None = None) -> Farm:
    farm = Farm(dispatcher, note=note, joined=note is not None)
    store, version = farm.about()
    if (store, version) != (absolute(settings.store), __version__):
        ray.shutdown()
        raise FarmUnavailableError(
            f"the farm that runs serves {store} with version {version}, this command asks for {absolute(settings.store)} "
            f"with version {__version__}; set FARM_STORE and install the same version, or stop that farm first"
        )
    return farm


def _end(dispatcher: Any, *, kill: bool) -> None:
    """End the renderers, each within a denoising step, and where asked the dispatcher, which else comes back."""
    try:
        ray.get(dispatcher.stop.remote(), timeout=ANSWER_S)
    finally:
        if kill:
            ray.kill(dispatcher, no_restart=True)


def _init(**options: Any) -> None:
    ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False, **options)


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
