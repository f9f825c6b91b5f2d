"""What leaving blocks out costs and gains, and what attention kernels change: the bundled model, judged, beside fewer steps.

A step whose other blocks are left out still costs its first one, what comes before all blocks and after, and a comparison: what
is gained is less than the share of passes through blocks that were left out, which is counted, and the less the fewer blocks
a model has. Fewer steps save time as well, and need no cache: one pays where, for the same time, its pictures are nearer to the
reference's, or right more often. Hence those are measured beside it.

The same prompts with the same seeds are drawn one at a time by the engine that renders jobs. The ways take turns of a few
pictures; a way's time is the median, over turns, of its seconds against the reference's. On a CPU those are the drawing
thread's own, so that other work on the machine has little part in them. Prompts are encoded before, once for all. A judge that
has no taste (`farm.sketch.judge`) says how many pictures show what their prompts ask for.

    python -m farm.bench.caches [--prompts N] [--page infra/bench/caches.md]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from farm.bench.environment import environment
from farm.bench.page import check_page, fill_page
from farm.bench.plots import LINES, figure
from farm.bench.precision import distance, with_stock_layers
from farm.bench.quality import drawn, judged, specs_of
from farm.cardparts import PLAIN, Acceleration, Attention
from farm.devices import local_device, numerics_for
from farm.engine import CACHE_BYTES, EmbeddingCache, Engine, Picture
from farm.errors import ModelCardError
from farm.modelcard import ModelCard, find_card
from farm.models.family import open_family
from farm.settings import Settings, load_settings
from farm.sketch.adherence import unseen_prompts

PROMPTS = 200
TURN = 5
STEPS = (8, 16, 32)
THRESHOLDS = (0.03, 0.06, 0.1, 0.2, 0.4)
FEWER = (0.875, 0.75, 0.5)
FIGURES = "<!-- figures: python -m farm.bench.caches --page infra/bench/caches.md -->"
PLOT = "caches.svg"
REFERENCE = "all blocks"


@dataclass(frozen=True, slots=True)
class Row:
    """What one way came to, beside the reference, which has `steps` and leaves nothing out.

    `threshold`: of its cache, None without one. `psnr_db`: of the median picture, None where equal. `left_out`: share of the
    reference's passes through blocks. `ratio`: its seconds against the reference's.
    """

    steps: int
    way: str
    threshold: float | None
    right: int
    of: int
    low: float
    high: float
    equal: int
    psnr_db: float | None
    left_out: float
    seconds_per_image: float
    ratio: float


class Subject:
    """The bundled model in one acceleration, one picture at a time; counts passes through the blocks that may be left out."""

    def __init__(self, card: ModelCard, how: Acceleration, settings: Settings, embeddings: EmbeddingCache):
        device = local_device()
        self.card = card.model_copy(update={"acceleration": {device.kind: how}, "batch": {device.kind: 1}})
        self.threshold = how.first_block_cache
        numerics = numerics_for(self.card, device=device, renderers=1)
        name = "cuda:0" if device.kind == "cuda" else "cpu"
        family: Any = open_family(self.card, numerics, device=name, vram_gib=settings.vram_gib)
        self.engine = Engine(self.card, numerics, name, settings.vram_gib, family=family, cache=embeddings)
        self.engine.load()
        self._clock = time.thread_time if device.kind == "cpu" else time.perf_counter
        self.passes = 0
        for block in family._modules.denoiser.layers:
            block.register_forward_pre_hook(self._count)

    def _count(self, block: Any, given: Any) -> None:
        self.passes += 1

    def draw(self, texts: Sequence[str], steps: int, turn: int) -> tuple[list[Picture], float]:
        """Draw the pictures of one turn; returns them and the seconds."""
        specs = specs_of(texts, self.card.defaults.model_copy(update={"num_inference_steps": steps}))
        began = self._clock()
        found = drawn(self.engine, specs[turn * TURN : (turn + 1) * TURN])
        return found, self._clock() - began


@dataclass(slots=True)
class Way:
    """A row while it is drawn: a subject at a number of steps."""

    name: str
    subject: Subject
    steps: int
    pictures: list[Picture] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    passes: int = 0

    def draw(self, texts: Sequence[str], turn: int) -> None:
        """Take a turn."""
        before = self.subject.passes
        found, seconds = self.subject.draw(texts, self.steps, turn)
        self.passes += self.subject.passes - before
        self.pictures += found
        self.turns.append(seconds)


def measure(
    *, prompts: int = PROMPTS, steps: Sequence[int] = STEPS, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[list[Row], list[Row]]:
    """Draw and judge the same prompts every way; returns rows of caches, by steps, and of attention kernels."""
    settings, embeddings, texts = load_settings(), EmbeddingCache(CACHE_BYTES), unseen_prompts(prompts)
    card = find_card("sketch", settings)
    plain = Subject(card, PLAIN, settings, embeddings)
    cached = [Subject(card, Acceleration(first_block_cache=each), settings, embeddings) for each in thresholds]
    caches: list[Row] = []
    for turn in range(-(-prompts // TURN)):
        plain.draw(texts, 1, turn)  # encodes its prompts
    for number in steps:
        ways = [Way(REFERENCE, plain, number)]
        ways += [Way(f"cache, {subject.threshold:g}", subject, number) for subject in cached]
        ways += [
            Way(f"{fewer} steps", plain, fewer) for fewer in dict.fromkeys(round(number * share) for share in FEWER)
        ]
        caches += taking_turns(ways, texts)
    kernels = [Way("native", Subject(with_stock_layers(card, settings), PLAIN, settings, embeddings), steps[0])]
    for name in get_args(Attention):
        if name != PLAIN.attention:
            try:
                kernels.append(Way(name, Subject(card, Acceleration(attention=name), settings, embeddings), steps[0]))
            except ModelCardError as exc:
                print(f"  {exc.message}", file=sys.stderr)
    return caches, taking_turns(kernels, texts)


def taking_turns(ways: Sequence[Way], texts: Sequence[str]) -> list[Row]:
    """Draw all ways in turn; the first is the reference."""
    for way in ways:
        way.subject.draw(texts, way.steps, 0)  # the first pictures are slow, and are none of the figures
    for turn in range(-(-len(texts) // TURN)):
        for way in ways if turn % 2 else reversed(ways):
            way.draw(texts, turn)
    rows = [_row(way, ways[0]) for way in ways]
    for row in rows:
        print(f"  {row.steps} steps, {row.way}: {row.right} of {row.of}, {row.ratio:.2f}", file=sys.stderr)
    return rows


def _row(way: Way, reference: Way) -> Row:
    far, verdict = distance(way.pictures, reference.pictures), judged(way.pictures)
    return Row(
        steps=reference.steps,
        way=way.name,
        threshold=way.subject.threshold,
        right=verdict.right,
        of=verdict.of,
        low=verdict.low,
        high=verdict.high,
        equal=far.equal,
        psnr_db=far.psnr_db,
        left_out=1 - way.passes / reference.passes,
        seconds_per_image=sum(way.turns) / len(way.pictures),
        ratio=statistics.median(mine / its for mine, its in zip(way.turns, reference.turns, strict=True)),
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| steps | way | right, % | 95 % interval | pictures equal | PSNR, dB | passes left out, % | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = "—" if row.psnr_db is None else f"{row.psnr_db:.1f}"
        lines.append(
            f"| {row.steps} | {row.way} | {100 * row.right / row.of:.1f} | {100 * row.low:.0f}–{100 * row.high:.0f} | "
            f"{row.equal} of {row.of} | {psnr} | {100 * row.left_out:.0f} | {row.ratio:.2f}× |"
        )
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw how near to the reference's pictures each way comes, by passes through blocks and by time, a colour for its steps."""
    with figure(path, columns=2, size=(9.2, 3.8)) as (by_passes, by_time):
        for colour, steps in zip(LINES, dict.fromkeys(row.steps for row in rows), strict=False):
            for kind, line, cached in (("cache", "-", True), ("fewer steps", "--", False)):
                mine = [row for row in rows if row.steps == steps and (row.threshold is not None) is cached]
                mine = sorted((row for row in mine if row.psnr_db is not None), key=lambda row: row.left_out)
                near = [row.psnr_db for row in mine]
                style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4, "linewidth": 1.2}
                label = f"{steps} steps, {kind}"
                by_passes.plot([100 * (1 - row.left_out) for row in mine], near, label=label, **style)
                by_time.plot([100 * row.ratio for row in mine], near, label=label, **style)
        by_passes.set(xlabel="passes through blocks, % of the reference's", title="By passes", ylabel="PSNR, dB")
        by_time.set(xlabel="time, % of the reference's", title="By time")
        for axes in (by_passes, by_time):
            axes.set(xlim=(0, 105))
            axes.grid(visible=True, alpha=0.25)
        by_time.legend(frameon=False, loc="upper left", fontsize=7)


def write_page(path: Path, rows: Sequence[Row], kernels: Sequence[Row]) -> None:
    """Put the tables and what they were measured on below the page's mark, and the plot beside the page."""
    about = environment()
    whole = [row for row in rows if row.way == REFERENCE]
    taken = ", ".join(f"{row.steps} steps {1000 * row.seconds_per_image:.0f} ms" for row in whole)
    said = (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, Python {about['python']}, torch {about['torch']}, "
        f"diffusers {about['diffusers']}. {rows[0].of} prompts, encoded before, seeds from 0, one picture at a time, one thread, "
        f"whose own seconds these are, 64×64, guidance 2. All blocks, an image: {taken}."
    )
    image = f"![PSNR by passes through blocks and by time]({PLOT})"
    beside = f"Attention kernels, over the layers of diffusers at {kernels[0].steps} steps:"
    fill_page(path, FIGURES, said, table(rows), image, beside, table(kernels))
    plot(path.with_name(PLOT), rows)


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m farm.bench.caches", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--prompts", type=int, default=PROMPTS, help="pictures of each way")
    arguments.add_argument("--page", type=Path, help="page to put the figures into, and the plot beside it")
    given = arguments.parse_args()
    if given.prompts < 1:
        arguments.error(f"--prompts must be 1 or more, got {given.prompts}")
    if given.page:
        check_page(given.page, FIGURES)
    rows, kernels = measure(prompts=given.prompts)
    print(table(rows), table(kernels), sep="\n\n")
    if given.page:
        write_page(given.page, rows, kernels)
    found = {"caches": [asdict(row) for row in rows], "kernels": [asdict(row) for row in kernels]}
    print(json.dumps({"environment": environment(), **found}))


if __name__ == "__main__":
    main()
