"""Rounds of farms that a command starts on this machine, and all rounds by name."""

import time
from collections.abc import Callable, Sequence

import psutil

from tests.chaos.bench import Bench, Size
from tests.chaos.events import Action, Event
from tests.chaos.namespaces import own_processes
from tests.chaos.nodes import cluster, cut
from tests.chaos.processes import title
from tests.chaos.round import AWAY, NAMES, STORE_OR_FARM_AWAY, opened


def kills(bench: Bench, size: Size, seed: int) -> dict[str, object]:
    """SIGKILL to every kind of process, while the store now and then fails a request."""
    choices: list[tuple[Action, str]] = [("kill", kind) for kind in (*NAMES, "cli", "s3")]
    return _local("kills", bench, size, seed, choices, rate=0.02)


def stops(bench: Bench, size: Size, seed: int) -> dict[str, object]:
    """SIGSTOP, and SIGCONT up to 45 s later, to every kind of process: about half of them outlast a lease."""
    choices: list[tuple[Action, str]] = [("stop", kind) for kind in (*NAMES, "cli", "s3")]
    return _local("stop", bench, size, seed, choices)


def store(bench: Bench, size: Size, seed: int) -> dict[str, object]:
    """A store that fails one request of eight, and all of them for a while; its server killed and stopped."""
    choices: list[tuple[Action, str]] = [("outage", "s3"), ("kill", "s3"), ("stop", "s3")]
    return _local("store", bench, size, seed, choices, rate=0.12)


def _local(
    name: str, bench: Bench, size: Size, seed: int, choices: Sequence[tuple[Action, str]], *, rate: float = 0.0
) -> dict[str, object]:
    with opened(name, bench, size, seed, rate=rate) as this:
        command = this.command("farm render", STORE_OR_FARM_AWAY)

        def perform(event: Event) -> bool:
            match event.action, event.kind:
                case "kill", "s3":
                    return this.kill_gateway()
                case "stop", "s3":
                    return this.pause_gateway(event.length_s)
                case "outage", _:
                    return this.outage(min(event.length_s, 15.0))
                case "kill", "cli":
                    command.kill()
                    return True
                case "stop", "cli":
                    return this.pause([command.process], event.length_s)
                case action, kind:
                    found = [one for one in command.family() if title(one).startswith(NAMES[kind])]
                    if not found:
                        return False
                    chosen = this.rng.choice(found)
                    return this.kill(chosen) if action == "kill" else this.pause([chosen], event.length_s)

        started = time.monotonic()
        return this.finish(this.go(choices, perform), started)


def two_farms(bench: Bench, size: Size, seed: int) -> dict[str, object]:
    """Two people render one manifest, each with a farm of its own; now one is killed or frozen, now the other.

    The second farm has its own table of processes where root allows, so that to each the other is on another machine.
    """
    choices: list[tuple[Action, str]] = [("kill", "cli"), ("stop", "cli")]
    with opened("two-farms", bench, size, seed) as this:
        for name, prefix in {"one": (), "two": own_processes()}.items():
            folder = this.folder / name
            folder.mkdir()
            this.command(name, AWAY, prefix=prefix, FARM_RUNTIME_DIR=str(folder / "runtime"), RAY_TMPDIR=str(folder))

        def perform(event: Event) -> bool:
            busy = [one for one in this.commands if not one.done and _busy(one.family())]
            if not busy:
                return False
            command = this.rng.choice(busy)
            if event.action == "stop":
                return this.pause([command.process, *command.family()], event.length_s)
            command.kill()
            return True

        started = time.monotonic()
        return this.finish(this.go(choices, perform), started)


def _busy(processes: Sequence[psutil.Process]) -> bool:
    """Whether a renderer is among them."""
    return any(title(process).startswith(NAMES["renderer"]) for process in processes)


ROUNDS: dict[str, Callable[[Bench, Size, int], dict[str, object]]] = {
    "kills": kills,
    "stop": stops,
    "store": store,
    "cluster": cluster,
    "cut": cut,
    "two-farms": two_farms,
}
