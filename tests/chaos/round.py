"""One round's farm: what is done to it, by whom it is used, and how it is looked at in the end."""

import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import psutil

from farm.lease import LEASE_S
from tests.chaos.audit import collect, compare, stored, verify
from tests.chaos.bench import Bench, Size
from tests.chaos.cluster import environment
from tests.chaos.command import FARM_AWAY, STORE_AWAY, Command
from tests.chaos.events import Action, Event, Later, carry_out, draw, seconds_of
from tests.chaos.gateway import Gateway
from tests.chaos.processes import ChaosError, await_end, below, end, go_on, stop, title
from tests.chaos.proxy import FaultProxy

LEFTOVERS_S = 60.0
"""Ray's agents look for their raylet every now and then, and end when it is gone."""
OUTAGE_S = (0.5, 6.0)
AWAY = frozenset({FARM_AWAY})
STORE_OR_FARM_AWAY = frozenset({STORE_AWAY, FARM_AWAY})
NAMES = {
    "renderer": "ray::Renderer",
    "dispatcher": "ray::Dispatcher",
    "raylet": "raylet",
    "gcs": "gcs_server",
}


class Round:
    """One round's farm: a prefix of the bucket behind a proxy, people's commands, and things to be undone."""

    def __init__(self, name: str, bench: Bench, size: Size, seed: int, *, host: str = "127.0.0.1", rate: float = 0.0):
        self.name = name
        self.size = size
        self.seed = seed
        self.rng = random.Random(f"{name} {seed}")
        self.bench = bench
        self.later = Later()
        self.commands: list[Command] = []
        self.folder = bench.folder / f"r{sum(one.name.startswith('r') for one in bench.folder.iterdir())}"
        self.folder.mkdir()
        self.manifest, self._calm = bench.job(size)
        self.proxy = FaultProxy(
            bench.gateway.endpoint, seed=seed, rate=rate, late=0.1 if size.longest_s > LEASE_S else 0.0, host=host
        )
        self.store = f"s3://farm/chaos-{uuid.uuid4().hex[:12]}"
        self.env = (
            environment(self.folder)
            | bench.gateway.env
            | {
                "FARM_STORE": self.store,
                "FARM_S3_ENDPOINT": self.proxy.endpoint,
                "FARM_RUNTIME_DIR": str(self.folder / "runtime"),
            }
        )
        self._stopped: set[int] = set()
        self._gateway_away = False

    def command(self, name: str, allowed: frozenset[int], *, prefix: Sequence[str] = (), **env: str) -> Command:
        command = Command(
            name,
            self.manifest,
            self.env | env,
            renderers=self.size.renderers,
            folder=self.folder,
            allowed=allowed,
            prefix=prefix,
        )
        self.commands.append(command)
        return command

    def go(
        self,
        choices: Sequence[tuple[Action, str]],
        perform: Callable[[Event], bool],
        *,
        every_look: Callable[[], object] = lambda: None,
    ) -> list[str]:
        """Draw events and carry them out; the store sets the job's pace, so that however fast the machine all fall into it."""
        events = draw(self.rng, choices, self.size.events, lengths=self.size.lengths)
        self.proxy.picture_every_s = seconds_of(events) / self.size.images

        def hurry() -> None:
            self.proxy.picture_every_s = 0.0

        return carry_out(events, self.commands, perform, later=self.later, every_look=every_look, after_last=hurry)

    # What can be done to it

    def kill(self, process: psutil.Process) -> bool:
        self._stopped.discard(process.pid)
        end(process.pid)
        return True

    def pause(self, processes: Sequence[psutil.Process], seconds: float) -> bool:
        """Stop processes, and let them go on later; False where one of them is stopped already, or there is none."""
        pids = [process.pid for process in processes]
        if not pids or self._stopped & set(pids):
            return False
        for pid in pids:
            stop(pid)
        self._stopped.update(pids)

        def wake() -> None:
            for process in processes:
                self._stopped.discard(process.pid)
                if process.is_running():
                    go_on(process.pid)

        self.later.after(seconds, wake)
        return True

    def kill_gateway(self) -> bool:
        if self._gateway_away:
            return False
        self._gateway_away = True
        self.bench.gateway.kill()

        def back() -> None:
            self.bench.gateway.start()
            self._gateway_away = False

        self.later.after(self.rng.uniform(*OUTAGE_S), back)
        return True

    def pause_gateway(self, seconds: float) -> bool:
        if self._gateway_away:
            return False
        self._gateway_away = True
        self.bench.gateway.pause()

        def back() -> None:
            self.bench.gateway.go_on()
            self._gateway_away = False

        self.later.after(seconds, back)
        return True

    def outage(self, seconds: float) -> bool:
        """Let every request fail for a while."""
        rate = self.proxy.rate
        if rate == 1.0:
            return False
        self.proxy.rate = 1.0
        self.later.after(seconds, lambda: setattr(self.proxy, "rate", rate))
        return True

    # Its end

    def finish(self, happened: list[str], started: float, **more: object) -> dict[str, object]:
        """Undo what is still done, look at everything, and return what happened. Raises ChaosError."""
        seconds = time.monotonic() - started
        self.later.run(everything=True)
        self.proxy.rate = 0.0
        self.proxy.wait_until_idle()
        compare(stored(str(self._calm), {}), stored(self.store, self.env))
        orphans = verify(self.env)
        collected = collect(self.env)
        if collected:
            verify(self.env)
            compare(stored(str(self._calm), {}), stored(self.store, self.env))
        faults = sum(exchange.fault is not None for exchange in self.proxy.journal)
        return {
            "round": self.name,
            "seed": self.seed,
            "happened": happened,
            "exits": {command.name: command.exits for command in self.commands},
            "seconds": round(seconds, 1),
            "requests": len(self.proxy.journal),
            "faults": faults,
            "orphans": orphans,
            "collected": collected,
            **more,
        }

    def close(self) -> None:
        """Leave nothing behind, whatever happened before."""
        self.later.run(everything=True)
        for command in self.commands:
            if command.process.is_running() and not command.done:
                command.kill()
        self.proxy.close()


def _check_ended(before: set[psutil.Process], gateway: Gateway) -> None:
    """Raise ChaosError where something outlives the farm; what is left then is ended."""
    ours = [process for process in below() if process not in before and not gateway.owns(process)]
    left = await_end(ours, seconds=LEFTOVERS_S)
    names = [f"{title(process)} ({process.pid})" for process in left]
    for process in left:
        end(process.pid)
    if left:
        raise ChaosError(f"processes outlived the farm: {', '.join(names)}")


@contextmanager
def opened(
    name: str, bench: Bench, size: Size, seed: int, *, host: str = "127.0.0.1", rate: float = 0.0
) -> Iterator[Round]:
    """A round for the length of a `with` block. Raises ChaosError where something of it is left running."""
    given = " ".join(f"--{part.replace('_', '-')} {value}" for part, value in asdict(size).items())
    print(f"chaos: round {name}; replay: python -m tests.chaos --round {name} --seed {seed} {given}", flush=True)
    before = set(below())
    this = Round(name, bench, size, seed, host=host, rate=rate)
    try:
        yield this
    except BaseException:
        bench.keep = True
        this.close()
        left = [process for process in below() if process not in before and not bench.gateway.owns(process)]
        for process in left:
            end(process.pid)
        raise
    this.close()
    _check_ended(before, bench.gateway)
