"""Kill every kind of process of a rendering farm at random moments, then look whether anything was lost.

One job is rendered undisturbed into a folder. The same manifest is rendered into an S3 bucket (Ceph's gateway on loopback)
while renderers, the dispatcher, Ray, the command line and the S3 server are ended with SIGKILL, in an order and at moments
drawn from a seed. Whenever the command ends, it is typed again. In the end the bucket must hold each image exactly once,
`farm verify` must find every object as its receipt says, and every picture must equal the undisturbed one byte for byte.

    python -m tests.chaos [--seed N] [--kills N] [--images N] [--renderers N]
"""

import argparse
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil

from farm.ledger import Ledger
from farm.plan import Plan
from farm.receipt import ImageRow
from farm.settings import load_settings
from farm.storage.opening import open_store

CEPH = Path(__file__).parent.parent / "infra" / "s3" / "ceph.sh"
FARM = Path(sys.executable).parent / "farm"
KINDS = ("renderer", "dispatcher", "ray", "cli", "s3")
JOB = "chaos"
SOON_EXIT_CODES = {2, 4, 5}
"""A command that ends with one of these has met what no kill explains."""
PATIENCE_S = 900.0
LEFTOVERS_S = 60.0
"""Ray's agents look for their raylet every now and then, and end when it is gone."""

MANIFEST = """\
name: chaos
model: sketch
prompts:
  template: a {{color}} {{shape}} on a {{back}} background
  vary:
    color: [red, green, yellow, pink]
    shape: [circle, square, star, heart]
    back: [white, blue, black]
seeds: {{count: {seeds}, from: slot}}
params: {{num_inference_steps: {steps}}}
"""
PROMPTS = 48


@dataclasses.dataclass(frozen=True)
class Kill:
    """One process to end: which kind, how long after the last event."""

    kind: str
    wait_s: float


def draw_kills(seed: int, count: int) -> list[Kill]:
    """Each kind in turn, every round in a new order."""
    rng = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += rng.sample(KINDS, len(KINDS))
    return [Kill(kind, rng.uniform(0.5, 8.0)) for kind in kinds[:count]]


class Server:
    """The S3 server: started, killed and started again on the same data."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.env: dict[str, str] = {}

    def start(self) -> None:
        done = subprocess.run([CEPH, "start", self._folder], check=True, capture_output=True, text=True)
        pairs = (line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        self.env = {name: value.strip("'\"") for name, value in pairs}

    def kill(self) -> None:
        end(int((self._folder / "rgw.pid").read_text()))

    def stop(self) -> None:
        subprocess.run([CEPH, "stop", self._folder], check=True, capture_output=True)


class Command:
    """`farm render`, typed again whenever it ended."""

    def __init__(self, manifest: Path, env: dict[str, str], renderers: int, log: Path):
        self._arguments = [FARM, "render", manifest, "--renderers", str(renderers)]
        self._env = env
        self._log = log
        self._seen: set[psutil.Process] = set()
        self.exits: list[int] = []
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = psutil.Popen(
                self._arguments, env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def step(self) -> bool:
        """Type it again if it ended; True when it ended well."""
        self.children()
        code = self._process.poll()
        if code is None:
            return False
        self.exits.append(code)
        if code == 0:
            return True
        if code in SOON_EXIT_CODES:
            raise SystemExit(f"farm render ended with {code}:\n{self._log.read_text()[-3000:]}")
        self.start()
        return False

    @property
    def seen(self) -> list[psutil.Process]:
        """Every process that ran below any of the commands."""
        return list(self._seen)

    def children(self) -> list[psutil.Process]:
        try:
            children = self._process.children(recursive=True)
        except psutil.Error:
            children = []
        self._seen.update(children)
        return children

    def kill(self, kind: str, rng: random.Random) -> bool:
        """End one process of a kind; False when there is none at this moment."""
        if kind == "cli":
            self.children()
            end(self._process.pid)
            self._process.wait()
            return True
        names = {"renderer": ("ray::Renderer",), "dispatcher": ("ray::Dispatcher",), "ray": ("raylet", "gcs_server")}
        found = [child for child in self.children() if title(child).startswith(names[kind])]
        if found:
            end(rng.choice(found).pid)
        return bool(found)


def title(process: psutil.Process) -> str:
    """What a process calls itself: Ray's workers name their actor, its daemons their program."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    return Path(words[0]).name if words and "/" in words[0] else " ".join(words)


def end(pid: int) -> None:
    """SIGKILL; a process that is gone already is fine."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def disturb(command: Command, server: Server, kills: list[Kill], rng: random.Random) -> list[str]:
    """Carry out the kills while the command runs, then wait for it to end well. Returns what was ended, in order."""
    ended: list[str] = []
    server_back_at: float | None = None
    next_at = time.monotonic() + 6.0
    waiting = list(kills)
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if command.step():
            if server_back_at is not None:
                server.start()
            return ended
        now = time.monotonic()
        if server_back_at is not None and now >= server_back_at:
            server.start()
            server_back_at = None
        if waiting and now >= next_at:
            kind = waiting[0].kind
            if kind == "s3":
                if server_back_at is not None:
                    continue
                server.kill()
                server_back_at = now + rng.uniform(0.5, 6.0)
            elif not command.kill(kind, rng):
                time.sleep(0.05)
                continue
            print(f"  {time.strftime('%X')} killed {kind}", flush=True)
            ended.append(kind)
            next_at = now + waiting.pop(0).wait_s
        time.sleep(0.05)
    raise SystemExit(f"not done after {PATIENCE_S:.0f} s; exits so far {command.exits}")


def stored(store_url: str, env: dict[str, str]) -> tuple[Plan, list[ImageRow]]:
    """The job's plan and its dataset's rows."""
    with mock.patch.dict(os.environ, env):
        ledger = Ledger(open_store(store_url, load_settings(store=store_url)))
        plan = ledger.plan(JOB)
        return plan, list(ledger.rows(plan))


def audit(quiet: tuple[Plan, list[ImageRow]], disturbed: tuple[Plan, list[ImageRow]]) -> None:
    """Raise SystemExit with what differs between an undisturbed job and one that was not left alone."""
    (quiet_plan, calm), (plan, wild) = quiet, disturbed
    if quiet_plan.digest != plan.digest:
        before, after = quiet_plan.model_dump(), plan.model_dump()
        changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
        raise SystemExit(f"the two jobs were planned differently: {changed}")
    if [row.index for row in wild] != list(range(plan.images)):
        raise SystemExit(f"{plan.images} images were planned; the dataset has {[row.index for row in wild]}")
    failed = [(row.index, row.error_code) for row in wild if row.status != "ok"]
    if failed:
        raise SystemExit(f"images failed: {failed}")
    different = [a.index for a, b in zip(calm, wild, strict=True) if a.sha256 != b.sha256 and not b.alone]
    if different:
        raise SystemExit(f"pictures differ from the undisturbed run: {different}")


def run(*, seed: int, kills: int, images: int, renderers: int, steps: int, folder: Path) -> dict[str, object]:
    """One whole round. Returns what happened."""
    print(f"chaos: seed {seed}, {kills} kills, {images} images, {renderers} renderers", flush=True)
    manifest = folder / "chaos.yaml"
    manifest.write_text(MANIFEST.format(seeds=max(1, images // PROMPTS), steps=steps))
    base = os.environ | {"FARM_RUNTIME_DIR": str(folder / "runtime")}
    calm_store = str(folder / "calm")
    calm = subprocess.run(
        [FARM, "render", manifest, "--renderers", str(renderers)],
        env=base | {"FARM_STORE": calm_store},
        capture_output=True,
        text=True,
        check=False,
    )
    if calm.returncode:
        raise SystemExit(f"the undisturbed run ended with {calm.returncode}:\n{calm.stderr}")
    server = Server(folder / "s3")
    server.start()
    try:
        wild_store = f"s3://farm/chaos-{seed}"
        env = base | server.env | {"FARM_STORE": wild_store}
        started = time.monotonic()
        command = Command(manifest, env, renderers, folder / "render.log")
        ended = disturb(command, server, draw_kills(seed, kills), random.Random(seed))
        seconds = time.monotonic() - started
        audit(stored(calm_store, {}), stored(wild_store, server.env))
        subprocess.run([FARM, "verify", JOB], check=True, env=env, stdout=subprocess.DEVNULL)
        _, leftovers = psutil.wait_procs(command.seen, timeout=LEFTOVERS_S)
        if leftovers:
            raise SystemExit(f"processes outlived the farm: {[title(process).strip() for process in leftovers]}")
    finally:
        server.stop()
    return {
        "seed": seed,
        "killed": ended,
        "exits": command.exits,
        "seconds": round(seconds, 1),
        "identical": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill everything at random and audit what was stored.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--renderers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="farm-chaos-") as folder:
        print(
            run(
                seed=given.seed,
                kills=given.kills,
                images=given.images,
                renderers=given.renderers,
                steps=given.steps,
                folder=Path(folder),
            )
        )


if __name__ == "__main__":
    main()
