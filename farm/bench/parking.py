"""A dispatcher with a thousand questions for work parked at it: how fast is it for everyone else?

A call of a Ray actor is a round trip through two processes and their event loops; `about`, which touches nothing, shows
that floor. On top come a hop to the loop that owns all state and what the call itself does. A parked question costs memory
and no time: nothing runs for it until there is work. So whatever is slower with parked questions than without is the
dispatcher's fault. The two are measured in turn, several rounds in one run, on Ray without room for a renderer: the callers
are coroutines of this process, which shares the machine's cores with the dispatcher and is in every figure.

    python -m farm.bench.parking
"""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from actors.cluster import OBJECT_STORE_BYTES
from actors.dispatcher import DispatcherActor
from actors.names import DISPATCHER, NAMESPACE
from farm.bench.environment import environment
from farm.devices import local_device
from farm.lease import POLL_S, Ask, Beat, Hello, Reply
from farm.ledger import Ledger
from farm.manifest import load_manifest
from farm.request import prepare
from farm.settings import Settings
from farm.storage.local import LocalStore
from farm.submission import submit

JOB = "parked"
MANIFEST = "name: {job}\nmodel: sleep\nprompts: [a]\n"
CARD = """\
name: sleep
title: Sleeps, to measure the farm
family: sleep
source: {path: .}
licence: none
dtypes: {cpu: [float32]}
batch: {cpu: 1}
defaults: {width: 64, height: 64, num_inference_steps: 1, guidance_scale: 0}
"""
BUSY = "caller-busy"
NOW = "2026-01-01T00:00:00+00:00"
WAKES = 10
"""New jobs a round, each with one shard."""
ARRIVE_S = 1.0
"""How long questions have to arrive before it is measured who is woken."""


class Measured(TypedDict):
    """Milliseconds of one kind of call, with so many questions parked."""

    call: str
    parked: int
    p50_ms: float
    p95_ms: float
    calls: int


def measure(*, parked: int = 1000, calls: int = 200, rounds: int = 3) -> list[Measured]:
    """Make `calls` calls of each kind a round, without and with `parked` questions in turn."""
    with tempfile.TemporaryDirectory(prefix="farm-bench-") as name, _dispatcher(Path(name)) as (dispatcher, ledger):
        took = asyncio.run(_Bench(dispatcher, ledger, parked).rounds(calls, rounds))
    return [
        Measured(
            call=call,
            parked=count,
            p50_ms=round(statistics.median(seconds) * 1000, 2),
            p95_ms=round(sorted(seconds)[int(len(seconds) * 0.95)] * 1000, 2),
            calls=len(seconds),
        )
        for (call, count), seconds in sorted(took.items())
    ]


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = ["| call | parked | p50 ms | p95 ms | calls |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['call']} | {row['parked']:,} | {row['p50_ms']:.2f} | {row['p95_ms']:.2f} | {row['calls']} |"
        for row in rows
    ]
    return "\n".join(lines)


class _Bench:
    def __init__(self, dispatcher: Any, ledger: Ledger, parked: int):
        self._dispatcher = dispatcher
        self._ledger = ledger
        self._names = [f"caller-{number}" for number in range(parked)]
        self._epoch = ""
        self._sequence = 0
        self._took: dict[tuple[str, int], list[float]] = {}

    async def rounds(self, calls: int, rounds: int) -> dict[tuple[str, int], list[float]]:
        """Seconds of each call, by its kind and how many were parked."""
        met: Reply = await self._dispatcher.ask.remote(Ask(BUSY, "i", "", 0, None))
        self._epoch = met.epoch
        for name in (BUSY, *self._names):
            await self._dispatcher.meet.remote(Hello(name, "i", "a CPU"))
        for _ in range(rounds):
            await self._round(calls, parked=0)
            for _ in range(WAKES):
                await self._wake(0)
            await self._round(calls, parked=len(self._names))
            await self._wake(len(self._names))
        return self._took

    async def _round(self, calls: int, *, parked: int) -> None:
        until = 0.0
        waiting: list[asyncio.Future[Reply]] = []
        kinds: dict[str, Callable[[], Awaitable[Any]]] = {
            "about (the floor)": self._dispatcher.about.remote,
            "progress": lambda: self._dispatcher.progress.remote(JOB),
            "renew": lambda: self._dispatcher.renew.remote(Beat(BUSY, "i", self._epoch, ())),
            "submit (a cancel's way)": lambda: self._dispatcher.submit.remote(JOB),
        }
        for _ in range(calls):
            if parked and time.monotonic() > until:
                await asyncio.gather(*waiting)
                waiting = self._park()
                await self._dispatcher.progress.remote(JOB)
                until = time.monotonic() + POLL_S - 2
            for kind, call in kinds.items():
                started = time.perf_counter()
                await call()
                self._took.setdefault((kind, parked), []).append(time.perf_counter() - started)
        await asyncio.gather(*waiting)

    def _park(self) -> list[asyncio.Future[Reply]]:
        self._sequence += 1
        return [asyncio.ensure_future(self._ask(name)) for name in self._names]

    async def _ask(self, name: str) -> Reply:
        reply: Reply = await self._dispatcher.ask.remote(Ask(name, "i", self._epoch, self._sequence, None))
        return reply

    async def _wake(self, parked: int) -> None:
        """From the submission of a job with one shard to the caller that got it, of all or of one that waits."""
        waiting = set(self._park()) if parked else set[asyncio.Future[Reply]]()
        if not parked:
            self._sequence += 1
            waiting.add(asyncio.ensure_future(self._ask(self._names[0])))
        await asyncio.sleep(ARRIVE_S)
        for number in range(WAKES if parked else 1):
            job = f"wake-{self._sequence}-{number}"
            _plan(self._ledger, job)
            started = time.perf_counter()
            submitted = asyncio.ensure_future(_answered(self._dispatcher.submit.remote(job)))
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            self._took.setdefault(("a new shard to its renderer", parked), []).append(time.perf_counter() - started)
            leased = sum(future.result().lease is not None for future in done)
            if leased != 1:
                raise SystemExit(f"one shard was leased {leased} times")
            await submitted
            self._ledger.append_control(job, "cancel", at=NOW, by="bench")
            await self._dispatcher.submit.remote(job)
        await asyncio.gather(*waiting)


async def _answered(reference: Any) -> None:
    await reference


def _plan(ledger: Ledger, job: str) -> None:
    """Submit a job of one shard."""
    with tempfile.TemporaryDirectory(prefix="farm-bench-") as name:
        folder = Path(name)
        (folder / "sleep.yaml").write_text(CARD)
        (folder / "job.yaml").write_text(MANIFEST.format(job=job))
        settings = Settings(store=ledger.store.url, models=folder)
        request = prepare(load_manifest(folder / "job.yaml"), settings, device=local_device(), renderers=1)
        submit(request, ledger, now=NOW)


@contextmanager
def _dispatcher(folder: Path) -> Iterator[tuple[Any, Ledger]]:
    import ray  # not before actors.cluster, which sets what Ray reads at its import

    ledger = Ledger(LocalStore(folder))
    ray.init(
        address="local",
        num_cpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        namespace=NAMESPACE,
    )
    try:
        _plan(ledger, JOB)
        ledger.append_control(JOB, "cancel", at=NOW, by="bench")
        actor = DispatcherActor.options(  # type: ignore[attr-defined]
            name=DISPATCHER, namespace=NAMESPACE, lifetime="detached"
        ).remote(Settings(store=str(folder)), 1, cores=1, gpu=False, all_open=False, farm="bench", pid=0)
        ray.get(actor.submit.remote(JOB))
        yield actor, ledger
    finally:
        ray.shutdown()


if __name__ == "__main__":
    rows = measure()
    print(table(rows))
    print(json.dumps({"environment": environment(), "parking": rows}))
