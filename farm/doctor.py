"""Look at this machine and the store as a render would meet them: one check a line, each with what to do next.

No check changes anything but the store's `probe/` objects. A check that fails stops none of the others.
"""

import importlib.util
import logging
import os
import shutil
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from farm.devices import BFLOAT16_CAPABILITY, DeviceInfo, local_device, numerics_for
from farm.engine import Engine, Picture, RenderStep
from farm.errors import FarmError, FarmUnavailableError
from farm.exposure import check_certificate, endpoint_url, free_port, needs_no_key, refuse_exposure
from farm.fonts import installed
from farm.keys import list_keys
from farm.modelcard import ModelCard, find_card, look_through
from farm.output import flag_of
from farm.plan import ImageSpec
from farm.settings import Settings
from farm.storage.opening import open_store
from farm.weights import are_here, missing_folder, sources_of
from farm.whereabouts import living, note_file

log = logging.getLogger(__name__)

GIB = 2**30
MIN_PYTHON = (3, 11)
MIN_MEMORY_GIB = 4
MIN_FREE_GIB = 2
MIN_SHM_GIB = 0.25
RAY_TITLES = ("ray::", "raylet", "gcs_server", "/ray/dashboard/", "/ray/autoscaler/")
OPEN_RAY_PORTS = {
    8265: "the dashboard",
    10001: "the client server",
    44217: "the autoscaler's metrics",
    44227: "the dashboard's metrics",
    52365: "the agent",
}
"""Ray's ports that speak HTTP or take clients, by their usual numbers."""
PACKAGES = ("torch", "diffusers", "transformers", "ray", "pyarrow", "pillow", "boto3")
TEST_MODEL = "sketch"
TEST_PROMPT = "a red circle on a white background"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `next_step` is empty where nothing needs doing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    next_step: str = ""


def examine(settings: Settings, *, render: bool = True) -> Iterator[Check]:
    """Yield the checks as they are made; the last one, a test render, takes some seconds."""
    device: list[DeviceInfo] = []

    def devices() -> Iterator[Check]:
        device.append(local_device())
        yield from _devices(device[0])

    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("devices", devices),
        ("memory", _memory),
        ("store", lambda: _store(settings)),
        ("ray", _ray),
        ("ray ports", _ray_ports),
        ("endpoint", lambda: _endpoint(settings)),
        ("fonts", _fonts),
        ("models", lambda: _models(settings)),
    ]
    if render:
        looks.append(("test render", lambda: _test_render(settings, device[0])))
    for name, look in looks:
        try:
            yield from look()
        except FarmError as error:
            yield Check(name, "fail", error.message)
        except Exception as error:
            log.debug("check failed", exc_info=True)
            said = " ".join(str(error).split())
            yield Check(name, "fail", f"{type(error).__name__}: {said}", "run farm doctor -v for the traceback")


def weights_of(card: ModelCard, settings: Settings) -> Literal["here", "not here"]:
    """Say whether all of a model's weights are on this machine: as a folder, in the hub's cache or as a bucket's copy."""
    return "here" if are_here(card, settings=settings) else "not here"


def _python() -> Iterator[Check]:
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < MIN_PYTHON:
        yield Check("python", "fail", found, "install Python 3.11 or newer")
    else:
        yield Check("python", "ok", f"{found}, {sys.executable}")


def _packages() -> Iterator[Check]:
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Check("packages", "fail", f"{', '.join(missing)} not installed", "run make install")
    else:
        yield Check("packages", "ok", ", ".join(found))


def _devices(device: DeviceInfo) -> Iterator[Check]:
    if device.kind == "cpu":
        if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
            yield Check("devices", "warn", "an NVIDIA driver is there and answers nothing", "see what nvidia-smi says")
        yield Check(
            "devices", "ok", f"no GPU; {device.cores} CPU cores, float32: sketch is quick, large models are not"
        )
        return
    if "+cpu" in version("torch"):
        yield Check(
            "devices", "fail", f"a GPU, and torch {version('torch')} without CUDA", "install torch's CUDA build"
        )
    for number, gpu in enumerate(device.gpus):
        sound = gpu.capability >= BFLOAT16_CAPABILITY
        major, minor = gpu.capability
        said = f"GPU {number}: {gpu.name}, {gpu.memory_bytes / GIB:.1f} GiB, capability {major}.{minor}"
        if sound:
            yield Check("devices", "ok", f"{said}: bfloat16, float16, float32")
        else:
            yield Check("devices", "warn", f"{said}: no native bfloat16", "bfloat16 models are refused here")


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    said = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < MIN_MEMORY_GIB * GIB:
        yield Check("memory", "warn", said, f"a renderer wants {MIN_MEMORY_GIB} GiB; end other programs")
    else:
        yield Check("memory", "ok", said)
    shm = Path("/dev/shm")
    if shm.is_dir() and (free := shutil.disk_usage(shm).free) < MIN_SHM_GIB * GIB:
        yield Check("memory", "warn", f"/dev/shm has {free / GIB:.2f} GiB", "give the container --shm-size=1g for Ray")


def _store(settings: Settings) -> Iterator[Check]:
    report = open_store(settings.store, settings).probe()
    yield Check("store", "ok", f"{report.url}: reads, writes, lists and deletes")
    if report.conditional_create and report.conditional_replace:
        yield Check("store", "ok", "conditional puts: of racing writers one wins")
    else:
        yield Check("store", "warn", "no conditional puts", "give each job to one farm at a time")
    if report.free_bytes is not None:
        said = f"{report.free_bytes / GIB:.1f} GiB free"
        if report.free_bytes < MIN_FREE_GIB * GIB:
            yield Check("store", "warn", said, "free some space, or use another disk: FARM_STORE")
        else:
            yield Check("store", "ok", said)


def _ray() -> Iterator[Check]:
    if importlib.util.find_spec("ray") is None:
        yield Check("ray", "fail", "not importable", "run make install")
        return
    yield Check("ray", "ok", version("ray"))
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        mode = stat.S_IMODE(token.stat().st_mode)
        if mode & 0o077:
            yield Check("ray", "warn", f"{token} has mode {mode:04o}: others can read it", f"chmod 600 {token}")
        else:
            yield Check("ray", "ok", f"{token} is its owner's alone")

    mode_of_ray = os.environ.get("RAY_AUTH_MODE", "token")
    if mode_of_ray != "token":
        said = f"RAY_AUTH_MODE is {mode_of_ray!r}: whoever reaches Ray's ports commands it"
        yield Check("ray", "fail", said, "leave RAY_AUTH_MODE out, so that Ray asks for its token")


def _ray_ports() -> Iterator[Check]:
    """Ray's gRPC listens on all interfaces and asks for the token; what else does asks for nothing."""
    running, wide = 0, []
    for process in psutil.process_iter():
        try:
            title = " ".join(process.cmdline())
            if "/raylet " in title:
                running += 1
            if not any(word in title for word in RAY_TITLES):
                continue
            for found in process.net_connections("tcp"):
                if found.status == psutil.CONN_LISTEN and found.laddr.port in OPEN_RAY_PORTS:
                    address = ip_address(found.laddr.ip)
                    if not address.is_loopback:
                        wide.append(f"{OPEN_RAY_PORTS[found.laddr.port]} on {found.laddr.ip}:{found.laddr.port}")
        except psutil.Error:
            continue
    if wide:
        how = "start Ray with the variables and flags of infra/ports.md, and keep those ports from other machines"
        yield Check("ray ports", "warn", f"open to other machines: {', '.join(sorted(set(wide)))}", how)
    elif running:
        yield Check("ray ports", "ok", "beyond loopback Ray listens by gRPC alone, which asks for its token")
    else:
        yield Check("ray ports", "ok", "no Ray of this user runs here now")


def _endpoint(settings: Settings) -> Iterator[Check]:
    now = datetime.now(UTC)
    keys = Counter(key.state(now) for key in list_keys(open_store(settings.store, settings)))
    check_certificate(settings)
    refuse_exposure(settings, has_keys=bool(keys))
    url = endpoint_url(settings)
    counted = ", ".join(f"{keys[state]} {state}" for state in ("valid", "expired", "revoked") if keys[state])
    if needs_no_key(settings):
        said = f"{url} is for users of this machine alone, who need no key"
        yield Check("endpoint", "ok", f"{said}; keys: {counted}" if counted else said)
    elif keys["valid"]:
        tls = "TLS of its own" if settings.tls_cert else f"TLS by the proxy {settings.tls_proxy}"
        yield Check("endpoint", "ok", f"{url}: {tls}; keys: {counted}")
    else:
        yield Check("endpoint", "warn", f"{url}: no key is valid: {counted}", "make one: farm keys create")
    up = living(note_file(settings))
    if up is not None and up.url:
        yield Check("endpoint", "ok", f"the farm is up at {up.url}")
        return
    try:
        free_port(settings.http_host, settings.http_port)
    except FarmUnavailableError as error:
        said, _, advice = error.message.partition("; ")
        yield Check("endpoint", "warn", said, advice)


def _fonts() -> Iterator[Check]:
    font = installed().drawing("国")
    if font is not None and font.path is not None:
        yield Check("fonts", "ok", f"{font.path} draws Chinese on contact sheets")
    else:
        yield Check(
            "fonts",
            "warn",
            "no font here draws Chinese, Japanese or Korean; contact sheets show boxes for such prompts",
            "where that matters install one, such as fonts-noto-cjk",
        )


def _models(settings: Settings) -> Iterator[Check]:
    for name, card in look_through(settings).items():
        if isinstance(card, FarmError):
            yield Check("models", "fail", f"{name}: {card.message}", "mend the card")
            continue
        if weights_of(card, settings) == "here":
            yield Check("models", "ok", f"{card.name}: {card.title}")
            continue
        missing = missing_folder(card)
        if missing is not None:
            yield Check("models", "warn", f"{card.name}: {missing} is not there", "put the weights there")
        else:
            fetched = ", ".join(str(source.given) for source in sources_of(card).values() if source.path is None)
            yield Check("models", "ok", f"{card.name}: not here yet; the first render fetches {fetched}")


def _test_render(settings: Settings, device: DeviceInfo) -> Iterator[Check]:
    card = find_card(TEST_MODEL, settings)
    numerics = numerics_for(card, device=device, renderers=1)
    engine = Engine(card, numerics, "cuda:0" if device.kind == "cuda" else "cpu", settings.vram_gib)
    pictures: list[Picture] = []

    def ignore(step: RenderStep) -> None:
        pass

    spec = ImageSpec(index=0, row=0, key=None, prompt=TEST_PROMPT, seed=0, params=card.defaults, carry={})
    load_s = engine.load()
    loaded = time.perf_counter()
    engine.render([spec], on_picture=pictures.append, on_step=ignore, cancelled=lambda: False)
    done = time.perf_counter()
    engine.unload()
    flag = "nan" if pictures[0].nan else flag_of(np.asarray(pictures[0].pixels))
    said = f"{card.name} on {device.name}, {numerics.dtype}, {numerics.threads} torch threads: loaded in {load_s:.1f} s"
    if flag:
        yield Check("test render", "fail", f"{said}; the picture is {flag}", "see the driver and torch's build")
    else:
        yield Check("test render", "ok", f"{said}, one picture in {done - loaded:.1f} s")
