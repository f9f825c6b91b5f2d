"""The dispatcher's rules alone, with up to 10,000 renderers and 100 million images: where their limits are.

One process, one core, no Ray, no store, no faults: a clock jumps from one call to the next, as in `farm.simulation`, and
only the time inside `Dispatch` is counted. Shards take two to five minutes, renderers beat as often as they are told.
A decision is one lease granted, with the question that it answers. What is measured is CPU time of the rules; what a farm
can do besides is bounded by the calls that one Ray actor takes in a second, which is far less (see `infra/bench/dispatch.md`).
"""

import argparse
import heapq
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from farm.bench.environment import environment
from farm.bench.page import fill_page
from farm.bitmap import Bitmap
from farm.dispatch import Dispatch
from farm.lease import Ask, Beat, Completion, Drop, Hello, Lease, Report
from farm.run import JobView, RunEntry

IMAGES = 100_000_000
SHARD_IMAGES = 640
SHARD_S = (120.0, 300.0)
OWNERS = 10
MODELS = 5
LOAD_S = 8.0
TICK_S = 1.0
CALLS = 300_000
"""Calls of renderers that are measured for each size of farm."""
DECISIONS = 30_000
"""Leases that are granted one upon the other."""
RENDERERS = (10, 100, 1_000, 10_000)
JOBS = (1, 100, 1_000)
MIB = 2**20


class Method(TypedDict):
    """Calls of one method: how many, and microseconds of one."""

    calls: int
    mean_us: float
    p50_us: float
    p99_us: float
    max_us: float


class Measured(TypedDict):
    """One size of farm. `load`: share of one core that the rules need to keep so many renderers busy."""

    renderers: int
    jobs: int
    decisions: int
    decisions_per_s: float
    calls_per_s: float
    load: float
    rebuild_s: float
    meet_s: float
    rss_mib: float
    grown_mib: float
    ending_tick_ms: float
    methods: dict[str, Method]


@dataclass(slots=True)
class _Stopwatch:
    """Nanoseconds inside each method, call by call. By the wall clock, which costs least: measure on a quiet machine."""

    spent: dict[str, list[int]] = field(default_factory=dict)

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter_ns()
        answer = call()
        took = time.perf_counter_ns() - started
        self.spent.setdefault(name, []).append(took)
        return answer

    def seconds(self, *names: str) -> float:
        return sum(sum(self.spent.get(name, ())) for name in names) / 1e9

    def methods(self) -> dict[str, Method]:
        return {name: _method(took) for name, took in sorted(self.spent.items())}


@dataclass(slots=True)
class _Renderer:
    name: str
    sequence: int = 0
    lease: Lease | None = None
    began: float = 0.0
    ends: float = 0.0
    model: str | None = None


class Farm:
    """Renderers that ask, beat and complete, on a heap of their next calls."""

    def __init__(self, renderers: int, jobs: int, *, images: int = IMAGES, seed: int = 1):
        self.rng = random.Random(seed)
        self.watch = _Stopwatch()
        self.now = 0.0
        self.calls = 0
        self.decisions = 0
        self.idle: list[_Renderer] = []
        self.renderers = {name: _Renderer(name) for name in (f"renderer-{n:05d}" for n in range(renderers))}
        self.views = [view(number, images // jobs) for number in range(jobs)]
        self.dispatch = Dispatch(epoch="e1", shares={f"owner{n}": 1.0 + n % 3 for n in range(OWNERS)})
        self._heap: list[tuple[float, int, _Renderer | None]] = []
        self._order = 0

    def start(self) -> None:
        """Take up every job, then let every renderer say hello and ask."""
        for one in self.views:
            self.watch.time("take_up", partial(self.dispatch.take_up, one, now=self.now))
        for renderer in self.renderers.values():
            hello = Hello(renderer.name, "i", "gpu")
            self.watch.time("meet", partial(self.dispatch.meet, hello, now=self.now))
            self._at(self.rng.random(), renderer)
        self._at(TICK_S, None)

    def run(self, calls: int) -> None:
        """Let so many calls happen, or all that there are."""
        until = self.calls + calls
        while self._heap and self.calls < until:
            self.now, _, renderer = heapq.heappop(self._heap)
            if renderer is None:
                self.watch.time("tick", lambda: self.dispatch.tick(now=self.now, wall=self.now))
                self._heed()
                self._at(TICK_S, None)
                idle, self.idle = self.idle, []
                for one in idle:
                    self.ask(one)
            elif renderer.lease is None:
                self.ask(renderer)
            elif self.now >= renderer.ends:
                self.complete(renderer)
                self.ask(renderer)
            else:
                self.beat(renderer)

    def ask(self, renderer: _Renderer) -> None:
        """Ask for work, and begin it or fall idle until the next tick."""
        self.calls += 1
        renderer.sequence += 1
        ask = Ask(renderer.name, "i", "e1", renderer.sequence, renderer.model)
        started = time.perf_counter_ns()
        reply = self.dispatch.ask(ask, now=self.now)
        took = time.perf_counter_ns() - started
        lease = reply.lease
        self.watch.spent.setdefault("ask" if lease else "ask in vain", []).append(took)
        self._heed()
        if lease is None:
            self.idle.append(renderer)
            return
        self.decisions += 1
        model = lease.run.rpartition("-")[2]
        renderer.lease, renderer.began = lease, self.now
        load_s = LOAD_S if model != renderer.model else 0.0
        renderer.ends = self.now + load_s + (self.rng.uniform(*SHARD_S) if lease.task == "render" else 5.0)
        renderer.model = model
        self._at(self.rng.random(), renderer)

    def beat(self, renderer: _Renderer) -> None:
        """Report."""
        self.calls += 1
        assert renderer.lease is not None
        share = (self.now - renderer.began) / (renderer.ends - renderer.began)
        report = Report(renderer.lease.token, "denoise", int(1000 * share), share, (int(100 * share), 1, 2, 3))
        beat = Beat(renderer.name, "i", "e1", (report,))
        renewal = self.watch.time("renew", lambda: self.dispatch.renew(beat, now=self.now))
        self._heed()
        self._at(min(renewal.every_s, max(renderer.ends - self.now, 0.0)), renderer)

    def complete(self, renderer: _Renderer) -> None:
        """Tell of a receipt."""
        self.calls += 1
        lease, took = renderer.lease, renderer.ends - renderer.began
        assert lease is not None
        renderer.lease = None
        done = Completion(lease, renderer.name, lease.images, 0, {"load": 0.0, "denoise": took, "total": took})
        self.watch.time("complete", lambda: self.dispatch.complete(done, now=self.now))
        self._heed()

    def _heed(self) -> None:
        for effect in self.watch.time("effects", self.dispatch.effects):
            if isinstance(effect, Drop):
                self.renderers[effect.renderer].lease = None

    def _at(self, delay: float, renderer: _Renderer | None) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + delay, self._order, renderer))


def view(number: int, images: int, *, done: float = 0.0) -> JobView:
    """A job of so many images, of which the first part is `done`."""
    shards = -(-images // SHARD_IMAGES)
    flags = np.zeros(shards, dtype=np.bool_)
    flags[: int(done * shards)] = True
    entry = RunEntry(
        job=f"job{number}",
        run=f"run{number}-model{number % MODELS}",
        model=f"model{number % MODELS}",
        pass_number=1,
        images=images,
        shard_images=SHARD_IMAGES,
        created_at=f"2026-01-01T00:{number:06d}",
        done=Bitmap.of(flags),
        seconds_per_image=sum(SHARD_S) / 2 / SHARD_IMAGES,
    )
    return JobView(job=entry.job, owner=f"owner{number % OWNERS}", runs=(entry,))


def measure_one(renderers: int, jobs: int) -> Measured:
    """One size of farm, in this process."""
    before = _rss_mib()
    farm = Farm(renderers, jobs)
    farm.start()
    farm.run(max(CALLS, 12 * renderers))
    rss = _rss_mib()
    spent = farm.watch.seconds("ask", "renew", "complete", "effects", "tick")
    methods = farm.watch.methods()
    decisions_per_s, calls_per_s = _saturated(farm)
    rebuild_s, meet_s = _rebuilt(farm, jobs)
    return Measured(
        renderers=renderers,
        jobs=jobs,
        decisions=farm.decisions,
        decisions_per_s=round(decisions_per_s),
        calls_per_s=round(calls_per_s),
        load=round(spent / farm.now, 5),
        rebuild_s=round(rebuild_s, 4),
        meet_s=round(meet_s, 4),
        rss_mib=round(rss, 1),
        grown_mib=round(rss - before, 1),
        ending_tick_ms=round(_ending(renderers, jobs), 2),
        methods=methods,
    )


def _saturated(farm: Farm) -> tuple[float, float]:
    """Leases granted per second inside `ask`, and calls per second; renderers do nothing but ask, beat once and complete."""
    farm.watch = _Stopwatch()
    names = list(farm.renderers.values())
    for number in range(DECISIONS):
        renderer = names[number % len(names)]
        if renderer.lease is not None:
            farm.beat(renderer)
            farm.complete(renderer)
        farm.ask(renderer)
    methods = farm.watch.spent
    calls = sum(len(methods[name]) for name in ("ask", "renew", "complete"))
    return len(methods["ask"]) / farm.watch.seconds("ask"), calls / farm.watch.seconds(*methods)


def _rebuilt(farm: Farm, jobs: int) -> tuple[float, float]:
    """Seconds that a new dispatcher needs to take up half-done jobs, and to meet renderers with a lease each."""
    views = [view(number, IMAGES // jobs, done=0.5) for number in range(jobs)]
    started = time.perf_counter()
    dispatch = Dispatch(epoch="e2")
    for one in views:
        dispatch.take_up(one, now=0.0)
    taken = time.perf_counter()
    for renderer in farm.renderers.values():
        held = (renderer.lease,) if renderer.lease else ()
        dispatch.meet(Hello(renderer.name, "i", "gpu", held), now=0.0)
    return taken - started, time.perf_counter() - taken


def _ending(renderers: int, jobs: int) -> float:
    """Milliseconds of the slowest tick while all jobs end and renderers fall idle."""
    shards = max(jobs, 2 * renderers)
    farm = Farm(renderers, jobs, images=shards * SHARD_IMAGES, seed=2)
    farm.start()
    while farm.now < 2 * SHARD_S[1] + 120.0 and farm.calls < 4 * CALLS:
        farm.run(1000)
    return max(farm.watch.spent["tick"]) / 1e6


def measure(*, renderers: tuple[int, ...] = RENDERERS, jobs: tuple[int, ...] = JOBS) -> list[Measured]:
    """Every size, each in a process of its own."""
    found = []
    for count in renderers:
        for number in jobs:
            command = [sys.executable, "-m", "farm.bench.dispatching", "--one", str(count), str(number)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {count} renderers, {number} jobs: {found[-1]['decisions_per_s']:,} decisions/s", file=sys.stderr)
    return found


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = [
        "| renderers | jobs | decisions/s | calls/s | one core, busy | ask p50, p99 µs | renew p50, p99 µs "
        "| complete p50, p99 µs | tick p50, max ms | tick as jobs end, max ms | rebuild s | RSS MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ask, renew, complete, tick = (row["methods"][name] for name in ("ask", "renew", "complete", "tick"))
        lines.append(
            f"| {row['renderers']:,} | {row['jobs']:,} | {row['decisions_per_s']:,} | {row['calls_per_s']:,} "
            f"| {row['load']:.2%} | {ask['p50_us']:.1f}, {ask['p99_us']:.1f} | {renew['p50_us']:.1f}, "
            f"{renew['p99_us']:.1f} | {complete['p50_us']:.1f}, {complete['p99_us']:.1f} "
            f"| {tick['p50_us'] / 1e3:.2f}, {tick['max_us'] / 1e3:.2f} | {row['ending_tick_ms']:.1f} "
            f"| {row['rebuild_s'] + row['meet_s']:.3f} | {row['rss_mib']:.0f} |"
        )
    return "\n".join(lines)


FIGURES = "<!-- figures: python -m farm.bench.dispatching --page infra/bench/dispatch.md -->"


def write_page(path: Path, rows: list[Measured]) -> None:
    """Put the table and what it was measured on below the page's mark, and the plots beside the page."""
    about = environment()
    on = f"{about['date']}, {about['processor']}, one of {about['cores']} cores, Python {about['python']}."
    plots = "\n".join(f"![{title}](dispatch-{name}.svg)" for name, title in PLOTS.items())
    fill_page(path, FIGURES, on, table(rows), plots)
    plot(rows, path.parent)


PLOTS = {
    "decisions": "Leases granted per second",
    "load": "Share of one core that keeps all renderers busy",
    "tick": "A tick",
    "memory": "Memory of the process",
}


def plot(rows: list[Measured], folder: Path) -> None:
    """Draw `dispatch-*.svg` into a folder. Needs matplotlib, of the dev extra."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "farm"

    def figure(name: str, unit: str, value: Callable[[Measured], float], line: float | None) -> None:
        drawing, axes = pyplot.subplots(figsize=(6, 3.6))
        for jobs in sorted({row["jobs"] for row in rows}):
            mine = [row for row in rows if row["jobs"] == jobs]
            axes.plot(
                [row["renderers"] for row in mine], [value(row) for row in mine], marker="o", label=f"{jobs:,} jobs"
            )
        if line is not None:
            axes.axhline(line, color="grey", linestyle="--", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="renderers", ylabel=unit, title=PLOTS[name])
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
        drawing.tight_layout()
        drawing.savefig(folder / f"dispatch-{name}.svg", metadata={"Date": None})
        pyplot.close(drawing)

    figure("decisions", "per second of CPU", lambda row: row["decisions_per_s"], 20_000)
    figure("load", "share", lambda row: row["load"], 1.0)
    figure("tick", "median, ms", lambda row: row["methods"]["tick"]["p50_us"] / 1e3, None)
    figure("memory", "MiB", lambda row: row["rss_mib"], None)


def _method(took: list[int]) -> Method:
    took = sorted(took)
    return Method(
        calls=len(took),
        mean_us=round(statistics.fmean(took) / 1e3, 2),
        p50_us=round(took[len(took) // 2] / 1e3, 2),
        p99_us=round(took[len(took) * 99 // 100] / 1e3, 2),
        max_us=round(took[-1] / 1e3, 2),
    )


def _rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m farm.bench.dispatching", description=__doc__)
    arguments.add_argument("--one", type=int, nargs=2, metavar=("RENDERERS", "JOBS"), help="one size, as a JSON line")
    arguments.add_argument("--page", type=Path, help="page to put the figures into, and the plots beside it")
    given = arguments.parse_args()
    if given.one:
        print(json.dumps(measure_one(*given.one)))
        return
    rows = measure()
    print(table(rows))
    if given.page:
        write_page(given.page, rows)
    print(json.dumps({"environment": environment(), "dispatching": rows}))


if __name__ == "__main__":
    main()
