"""Steps and guidance against how often the bundled model draws what was asked: where more steps stop paying.

A judge that knows shapes, colours, counts and places (`farm.sketch.judge`) decides for each picture whether it shows what its
prompt asks for; nobody's taste has a part in it. Prompts are of a seed that training does not use, each has its own seed, and all
settings draw the same prompts with the same seeds. The ceiling is the judge's own: how often it is right about drawings
of the very same scenes, which are right by construction. Time is linear in steps, and doubles with guidance, since each step then
passes the denoiser twice; quality is not.

    python -m farm.bench.quality                                   # the table and a JSON line
    python -m farm.bench.quality --page infra/bench/quality.md     # and into the page, the plot beside it
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image

from farm.bench.environment import environment
from farm.bench.figures import wilson
from farm.bench.page import check_page, fill_page
from farm.bench.plots import LINES, figure
from farm.devices import DeviceInfo, local_device, numerics_for
from farm.engine import Engine, Picture
from farm.modelcard import ModelCard, RenderParams, find_card
from farm.plan import ImageSpec
from farm.settings import load_settings
from farm.sketch.adherence import unseen_prompts
from farm.sketch.judge import Verdict, judge, judge_drawings, shares
from farm.sketch.language import read

STEPS = (2, 4, 8, 16, 32)
GUIDANCE = (0.0, 1.0, 2.0, 4.0)
PROMPTS = 150
BATCH = 25
JUDGED_DRAWINGS = 2000
RESPECTS = tuple(field.name for field in fields(Verdict))
FIGURES = "<!-- figures: python -m farm.bench.quality --page infra/bench/quality.md -->"
PLOT = "quality.svg"
TICKS_MS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class Setting:
    """What one number of steps and one guidance came to. `low` and `high`: the 95 % interval of `right` of `of`."""

    num_inference_steps: int
    guidance_scale: float
    right: int
    of: int
    low: float
    high: float
    seconds_per_image: float
    shares: dict[str, float]

    @property
    def share(self) -> float:
        """Right pictures of all."""
        return self.right / self.of


def measure(
    *, prompts: int = PROMPTS, steps: Sequence[int] = STEPS, guidance: Sequence[float] = GUIDANCE
) -> list[Setting]:
    """Draw and judge the same prompts at every setting, by guidance, then steps."""
    settings = load_settings()
    card, device = find_card("sketch", settings), local_device()
    engine = open_engine(card, device, vram_gib=settings.vram_gib)
    engine.load()
    texts = unseen_prompts(prompts)
    found = []
    try:
        drawn(engine, specs_of(texts[:BATCH], card.defaults))  # the first batch is slow, and is none of the figures
        for guidance_scale in guidance:
            for number in steps:
                params = card.defaults.model_copy(
                    update={"num_inference_steps": number, "guidance_scale": guidance_scale}
                )
                found.append(judged(drawn(engine, specs_of(texts, params))))
                said = f"{number} steps, guidance {guidance_scale:g}: {found[-1].right} of {found[-1].of}"
                print(f"  {said}", file=sys.stderr)
    finally:
        engine.unload()
    return found


def open_engine(card: ModelCard, device: DeviceInfo, *, vram_gib: float) -> Engine:
    """Return an engine of larger batches than a job's, in the card's own threads."""
    numerics = numerics_for(card, device=device, renderers=1).model_copy(update={"batch": BATCH})
    return Engine(card, numerics, "cuda:0" if device.kind == "cuda" else "cpu", vram_gib)


def specs_of(texts: Sequence[str], params: RenderParams) -> list[ImageSpec]:
    """A picture for each prompt, its seed the prompt's place."""
    return [
        ImageSpec(index=i, row=i, key=None, prompt=text, seed=i, params=params, carry={})
        for i, text in enumerate(texts)
    ]


def drawn(engine: Engine, specs: Sequence[ImageSpec]) -> list[Picture]:
    """Draw pictures, and return them in the order of their indexes."""
    pictures: list[Picture] = []
    engine.render(specs, on_picture=pictures.append)
    return sorted(pictures, key=lambda picture: picture.spec.index)


def judged(pictures: Sequence[Picture]) -> Setting:
    """Judge pictures of one setting."""
    verdicts = [judge(Image.fromarray(one.pixels), read(one.spec.prompt)) for one in pictures]
    right = sum(verdict.everything for verdict in verdicts)
    low, high = wilson(right, len(verdicts))
    params = pictures[0].spec.params
    return Setting(
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        right=right,
        of=len(verdicts),
        low=low,
        high=high,
        seconds_per_image=statistics.median(one.seconds for one in pictures),
        shares=shares(verdicts),
    )


def table(rows: Sequence[Setting]) -> str:
    """Markdown."""
    lines = [
        f"| guidance | steps | right, % | 95 % interval | {', % | '.join(RESPECTS)}, % | ms an image |",
        f"|---|---|---|---|{'---|' * len(RESPECTS)}---|",
    ]
    lines += [
        f"| {row.guidance_scale:g} | {row.num_inference_steps} | {100 * row.share:.0f} "
        f"| {100 * row.low:.0f}–{100 * row.high:.0f} | "
        f"{' | '.join(f'{100 * row.shares[name]:.0f}' for name in RESPECTS)} | {1000 * row.seconds_per_image:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[Setting], *, ceiling: float) -> None:
    """Draw the share of right pictures over steps and over seconds, a line for each guidance."""
    with figure(path, columns=2, size=(9.2, 3.8)) as (by_steps, by_seconds):
        guided = sorted({row.guidance_scale for row in rows})
        for place, (colour, guidance) in enumerate(zip(LINES, guided, strict=False)):
            mine = sorted(
                (row for row in rows if row.guidance_scale == guidance), key=lambda row: row.num_inference_steps
            )
            share = [100 * row.share for row in mine]
            reach = [[100 * (row.share - row.low) for row in mine], [100 * (row.high - row.share) for row in mine]]
            named = {
                "color": colour,
                "label": f"guidance {guidance:g}",
                "marker": "o",
                "markersize": 4,
                "linewidth": 1.2,
            }
            aside = 1 + 0.03 * (place - (len(guided) - 1) / 2)  # so that intervals do not hide one another
            steps = [row.num_inference_steps * aside for row in mine]
            by_steps.errorbar(steps, share, yerr=reach, capsize=2, elinewidth=0.8, **named)
            by_seconds.plot([1000 * row.seconds_per_image for row in mine], share, **named)
        by_steps.set(xlabel="steps", title="By steps, with 95 % intervals", ylabel="right in every respect, %")
        every = sorted({row.num_inference_steps for row in rows})
        by_seconds.set(xlabel="ms an image", title="By time")
        for axes in (by_steps, by_seconds):
            axes.set(xscale="log", ylim=(0, 103))
            axes.axhline(100 * ceiling, color="grey", linestyle="--", linewidth=1, label="the judge, of drawings")
            axes.grid(visible=True, alpha=0.25)
        by_steps.set_xticks(every, [str(steps) for steps in every], minor=False)
        by_steps.minorticks_off()
        least, most = (pick(1000 * row.seconds_per_image for row in rows) for pick in (min, max))
        ticks = [tick for tick in TICKS_MS if 0.7 * least <= tick <= 1.5 * most]
        by_seconds.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
        by_seconds.minorticks_off()
        by_seconds.legend(frameon=False, loc="lower right")


def write_page(path: Path, rows: Sequence[Setting], *, ceiling: float) -> None:
    """Put the table and what it was measured on below the page's mark, and the plot beside the page."""
    about = environment()
    said = (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, Python {about['python']}, torch {about['torch']}, "
        f"diffusers {about['diffusers']}. {rows[0].of} prompts a setting, seeds from 0, batches of {BATCH}, one thread, 64×64. "
        f"The judge finds {100 * ceiling:.1f} % of {JUDGED_DRAWINGS:,} drawings right."
    )
    image = f"![Share of right pictures by steps and by time]({PLOT})"
    fill_page(path, FIGURES, said, table(rows), image)
    plot(path.with_name(PLOT), rows, ceiling=ceiling)


def main() -> None:
    arguments = argparse.ArgumentParser(
        prog="python -m farm.bench.quality", description=(__doc__ or "").splitlines()[0]
    )
    arguments.add_argument("--prompts", type=int, default=PROMPTS, help="pictures of each setting")
    arguments.add_argument("--steps", type=int, nargs="+", default=STEPS)
    arguments.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)
    arguments.add_argument("--page", type=Path, help="page to put the figures into, and the plot beside it")
    given = arguments.parse_args()
    if given.page:
        check_page(given.page, FIGURES)
    rows = measure(prompts=given.prompts, steps=given.steps, guidance=given.guidance)
    ceiling = judge_drawings(JUDGED_DRAWINGS)["everything"]
    print(table(rows))
    if given.page:
        write_page(given.page, rows, ceiling=ceiling)
    found = {"judge": ceiling, "quality": [asdict(row) for row in rows]}
    print(json.dumps({"environment": environment(), **found}))


if __name__ == "__main__":
    main()
