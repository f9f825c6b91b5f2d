"""Plots of what benchmarks measured, as SVG. Needs matplotlib, and imports it as the first plot is drawn."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farm.bench.figures import GIB, PHASES, Drawn, Measured, Point, Sample, Span, thinned

COLOURS = {"load": "#8a8a86", "encode": "#d79b2b", "denoise": "#3b6fb6", "decode": "#4f9d69"}
INK = "#1d1d1b"
LINES = ("#3b6fb6", "#b5493a", "#4f9d69", "#d79b2b", "#7b5ea7", "#5b5b58")
MOST_SAMPLES = 2000
LEAST_NAMED = 0.07
"""A stretch shorter than this share of the whole has no room for its name."""


@contextmanager
def figure(path: Path, *, columns: int = 1, rows: int = 1, size: tuple[float, float] = (7.0, 3.6)) -> Iterator[Any]:
    """Give matplotlib's axes, in a list of rows x columns, and write the plot: the same figures give the same file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style: Any = {"svg.hashsalt": "farm", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with matplotlib.rc_context(style):
        drawing, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        yield [one for row in axes for one in row]
        drawing.savefig(path, metadata={"Date": None})
        pyplot.close(drawing)


def plot_memory(path: Path, measured: Measured, *, held: str) -> None:
    """Draw the memory over time: above the cold start with its phases, below all of the benchmark with its parts."""
    samples = thinned(measured.samples, MOST_SAMPLES)
    first = next((one for one in measured.drawn if one.part == "cold"), None)
    until = first.began_s + first.seconds if first else samples[-1].at_s
    with figure(path, rows=2, size=(8.0, 5.6)) as (start, whole):
        _line(start, [sample for sample in measured.samples if sample.at_s <= until * 1.05])
        _shade(start, [span for span in measured.spans if span.began_s <= until])
        start.set(title=f"Cold start: {held}", xlim=(0, max(until, 0.001)))
        start.legend(loc="lower right", frameon=False, ncols=len(PHASES))
        _line(whole, samples)
        top = max(sample.held_bytes for sample in samples) / GIB
        for number, (name, began_s, ended_s) in enumerate(parts(measured)):
            whole.axvspan(began_s, ended_s, color=INK, alpha=0.04 + 0.06 * (number % 2), linewidth=0)
            if ended_s - began_s > LEAST_NAMED * samples[-1].at_s:
                whole.text((began_s + ended_s) / 2, top * 1.04, name, ha="center", va="bottom", fontsize=7)
        whole.set(title="All of it", xlim=(0, max(samples[-1].at_s, 0.001)))
        for axes in (start, whole):
            axes.set(xlabel="seconds", ylabel="GiB", ylim=(0, top * 1.18 or 1))
            axes.grid(visible=True, alpha=0.25)


def plot_seconds(path: Path, measured: Measured) -> None:
    """Draw the seconds: of each picture of the rounds by stage, and of what was swept."""
    panels = 1 + bool(measured.by_steps()) + len({point.part for point in measured.points})
    with figure(path, columns=panels, size=(3.4 * panels + 0.8, 3.4)) as axes:
        waiting = iter(axes)
        _rounds(next(waiting), measured.of("round"))
        if by_steps := measured.by_steps():
            _steps(next(waiting), by_steps)
        sizes = [point for point in measured.points if point.part == "size"]
        if sizes:
            _points(next(waiting), sizes, [point.width * point.height / 2**20 for point in sizes], "megapixels")
        batches = [point for point in measured.points if point.part == "batch"]
        if batches:
            _points(next(waiting), batches, [float(point.batch) for point in batches], "images a batch")


def parts(measured: Measured) -> list[tuple[str, float, float]]:
    """Return name, begin and end of each stretch of the benchmark, in order."""
    names = {
        "cold": "first",
        "round": "rounds",
        "job": "as a job",
        "steps": "steps",
        "size": "sizes",
        "batch": "batches",
    }
    found = [("load", span.began_s, span.ended_s) for span in measured.spans if span.phase == "load"]
    for one in measured.drawn:
        name, ended_s = names[one.part], one.began_s + one.seconds
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], ended_s)
        else:
            found.append((name, one.began_s, ended_s))
    return found


def _line(axes: Any, samples: Sequence[Sample]) -> None:
    axes.plot(
        [sample.at_s for sample in samples],
        [sample.held_bytes / GIB for sample in samples],
        color=INK,
        linewidth=1.2,
    )


def _shade(axes: Any, spans: Sequence[Span]) -> None:
    named: set[str] = set()
    for span in spans:
        label = None if span.phase in named else span.phase
        named.add(span.phase)
        axes.axvspan(span.began_s, span.ended_s, color=COLOURS[span.phase], alpha=0.35, linewidth=0, label=label)


def _rounds(axes: Any, drawn: Sequence[Drawn]) -> None:
    places = range(1, len(drawn) + 1)
    below = [0.0] * len(drawn)
    for stage in ("encode", "denoise", "decode"):
        took = [getattr(one, f"{stage}_s") for one in drawn]
        axes.bar(places, took, bottom=below, color=COLOURS[stage], label=stage, width=0.8)
        below = [low + more for low, more in zip(below, took, strict=True)]
    for place, (one, after) in enumerate(itertools.pairwise(drawn), start=1):
        if one.number != after.number:
            axes.axvline(place + 0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set(
        title="Pictures one after another, by round", xlabel="picture", ylabel="seconds", ylim=(0, max(below) * 1.25)
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, ncols=3, loc="upper right", fontsize=7)


def _steps(axes: Any, by_steps: Mapping[int, Sequence[Drawn]]) -> None:
    for steps, drawn in by_steps.items():
        axes.plot([steps] * len(drawn), [one.seconds for one in drawn], "o", color=LINES[0], markersize=4, alpha=0.7)
    ordered = sorted(by_steps)
    means = [sum(one.seconds for one in by_steps[steps]) / len(by_steps[steps]) for steps in ordered]
    axes.plot(ordered, means, color=LINES[0], linewidth=1)
    axes.set(title="Steps", xlabel="steps", ylabel="seconds a picture", ylim=(0, None), xlim=(0, None))
    axes.grid(visible=True, alpha=0.25)


def _points(axes: Any, points: Sequence[Point], at: Sequence[float], unit: str) -> None:
    there = sorted((x, point.seconds_per_image) for x, point in zip(at, points, strict=True) if point.failed is None)
    axes.plot([x for x, _ in there], [seconds for _, seconds in there], "o-", color=LINES[0], markersize=4, linewidth=1)
    for x, point in zip(at, points, strict=True):
        if point.failed is not None:
            axes.axvline(x, color=LINES[1], linestyle=":", label="no memory left")
    title = "Sizes" if points[0].part == "size" else "Batches"
    axes.set(title=title, xlabel=unit, ylabel="seconds an image", ylim=(0, None), xlim=(0, None))
    axes.grid(visible=True, alpha=0.25)
    if any(point.failed for point in points):
        axes.legend(frameon=False)
