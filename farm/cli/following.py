"""Follow a job of a live farm with a progress line: a bar on a terminal, a plain line now and then elsewhere.

Knows nothing of Ray or the store: it asks for snapshots until the job is in no running state.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from farm.cli.exits import Exit
from farm.cli.guard import leave
from farm.cli.terminal import note
from farm.cli.wording import duration, rate

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from farm.run import JobProgress

RUNNING = frozenset({"waiting", "running", "finalising", "elsewhere"})
LOOK_EVERY_S = 0.25
PLAIN_EVERY_S = 5.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Ask = Callable[[], "JobProgress"]


class Snapshot(Protocol):
    """What a line shows of a job: JobProgress has it, and so has what an endpoint tells."""

    @property
    def job(self) -> str: ...
    @property
    def pass_number(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def images(self) -> int: ...
    @property
    def done(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def fraction(self) -> float: ...
    @property
    def images_per_s(self) -> float | None: ...
    @property
    def eta_s(self) -> float | None: ...
    @property
    def renderers(self) -> int: ...
    @property
    def renderers_busy(self) -> int: ...
    @property
    def message(self) -> str | None: ...


class Line(Protocol):
    """Where progress is shown."""

    def show(self, progress: Snapshot) -> None:
        """Show a snapshot."""


class PlainLine:
    """A line on stderr when the state changes, and every few seconds: for logs and pipes."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._state = ""
        self._shown_at = 0.0

    def show(self, progress: Snapshot) -> None:
        """Print the snapshot if one is due."""
        now = self._clock()
        if progress.state == self._state and now - self._shown_at < PLAIN_EVERY_S:
            return
        self._state, self._shown_at = progress.state, now
        if progress.state in RUNNING:
            note(sentence(progress))


class BarLine:
    """One live line at the foot of a terminal."""

    def __init__(self, bars: "Progress", job: str):
        self._bars = bars
        self._task: TaskID = bars.add_task(job, total=1.0, said="")

    def show(self, progress: Snapshot) -> None:
        """Move the bar."""
        self._bars.update(self._task, completed=progress.fraction, said=measures(progress))


def follow(
    ask: Ask, *, line: Line, sleep: Callable[[float], None] = time.sleep, every_s: float = LOOK_EVERY_S
) -> "JobProgress":
    """Show snapshots until the job runs no more; returns the last.

    A new message (store away, another farm renders it, ...) gets a line.
    """
    said: str | None = None
    while True:
        progress = ask()
        message = news(progress)
        if message and message != said:
            note(f"note: {message}")
        said = message
        line.show(progress)
        if progress.state not in RUNNING:
            return progress
        sleep(every_s)


@contextmanager
def progress_line(job: str, *, quiet: bool = False) -> Iterator[Line]:
    """Give the line that suits stderr: a live bar on a terminal, plain lines elsewhere or where `quiet` is set."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield PlainLine()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        TextColumn("{task.fields[said]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=8,
    )
    with bars:
        yield BarLine(bars, job)


def news(progress: Snapshot) -> str | None:
    """What people should hear about a job that goes on; None where it is nothing but work."""
    if progress.state not in RUNNING:
        return None
    if progress.state == "elsewhere":
        who = progress.message or f"another farm renders {progress.job}"
        return f"{who}; this one follows it, and takes over if that one ends"
    return progress.message


def measures(progress: Snapshot) -> str:
    """Images done, speed, time left, renderers busy: `12/43 images · 2.1 images/s · 15 s left · 1/1 renderers busy`.

    Of shards in hand as many images count as their steps make up, so that the line moves before the first receipt.
    """
    rendered = max(progress.done, int(progress.fraction * progress.images))
    said = [f"{rendered:,}/{progress.images:,} images"]
    if progress.failed:
        said.append(f"{progress.failed:,} failed")
    if progress.state == "finalising":
        return " · ".join([*said, "writing the dataset"])
    if progress.state == "elsewhere":
        return " · ".join([*said, "rendered by another farm"])
    said.append(rate(progress.images_per_s))
    said.append(f"{duration(progress.eta_s)} left" if progress.eta_s is not None else "time left unknown")
    said.append(f"{progress.renderers_busy}/{progress.renderers} renderers busy")
    return " · ".join(said)


def sentence(progress: Snapshot) -> str:
    """A whole line for a log."""
    retried = f" (pass {progress.pass_number})" if progress.pass_number > 1 else ""
    return f"{progress.job}{retried}: {progress.state}, {measures(progress)}"


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP end the block in good order, and the second end the process at once.

    Gives a function that takes the signals back from a library that took them meanwhile, as Ray does. What was ignored
    before, as SIGHUP is under nohup, stays ignored.
    """

    def second(_signal: int, _frame: FrameType | None) -> None:
        leave(Exit.INTERRUPTED)

    handler: Callable[[int, FrameType | None], None] = second

    def first(_signal: int, _frame: FrameType | None) -> None:
        nonlocal handler
        handler = second
        take()
        with suppress(OSError):  # after SIGHUP the terminal is gone
            note("\nleaving; Ctrl-C again to leave at once")
        raise KeyboardInterrupt

    def take() -> None:
        for number in before:
            signal.signal(number, handler)

    handler = first
    found = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: known for number, known in found.items() if known is not signal.SIG_IGN}
    take()
    try:
        yield take
    finally:
        for number, known in before.items():
            signal.signal(number, known)


def spinner(text: str) -> AbstractContextManager[object]:
    """Say that something takes seconds: a spinner on a terminal, one line elsewhere."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        note(text)
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


@contextmanager
def counting(verb: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Give a function that shows how many of `total` are done: a bar on a terminal, elsewhere nothing."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(verb, total=total)
        yield lambda done: bars.update(task, completed=done)
