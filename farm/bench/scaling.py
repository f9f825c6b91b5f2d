"""From one renderer to many, with a pipeline that only sleeps: what the farm itself costs.

Every image sleeps for a fixed time, so the ideal of N renderers is N images in that time, and anything missing is the
farm's: asking for leases, starting shards, writing pictures and receipts. Each renderer's rate is taken from the times at
which its own pictures were stored, first batch left out, so that starting 32 processes on a small machine is not in it.
"""

import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

from farm.ledger import Ledger
from farm.models.sleep import STEP_S
from farm.settings import load_settings
from farm.storage.opening import open_store

STEPS = 100
BATCH = 4

CARD = f"""\
name: sleep
title: Sleeps, to measure the farm
family: sleep
source: {{path: .}}
licence: none
dtypes: {{cpu: [float32]}}
batch: {{cpu: {BATCH}}}
defaults: {{width: 64, height: 64, num_inference_steps: {STEPS}, guidance_scale: 0}}
"""


class Measured(TypedDict):
    """Images per second of all renderers together, and their share of the ideal."""

    renderers: int
    images_per_s: float
    ideal_images_per_s: float
    share: float
    shards: int


def measure(*, counts: tuple[int, ...], images_each: int) -> list[Measured]:
    """Render `images_each` images a renderer for each count of renderers."""
    return [_measure(count, images_each) for count in counts]


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = ["| renderers | images/s | ideal | share | shards |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['renderers']} | {row['images_per_s']:.2f} | {row['ideal_images_per_s']:.2f} | {row['share']:.1%} "
        f"| {row['shards']} |"
        for row in rows
    ]
    return "\n".join(lines)


def _measure(count: int, images_each: int) -> Measured:
    with tempfile.TemporaryDirectory(prefix="farm-bench-") as name:
        folder = Path(name)
        (folder / "sleep.yaml").write_text(CARD)
        manifest = folder / "job.yaml"
        manifest.write_text(
            f"name: job\nmodel: sleep\nprompts: [sleep]\nseeds: {{count: {count * images_each}, from: slot}}\n"
        )
        env = os.environ | {
            "FARM_STORE": str(folder / "store"),
            "FARM_MODELS": str(folder),
            "FARM_RUNTIME_DIR": str(folder / "runtime"),
        }
        command = [str(Path(sys.executable).parent / "farm"), "render", str(manifest), "--renderers", str(count)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"farm render ended with {done.returncode}:\n{done.stderr[-2000:]}")
        rates, shards = _rates(folder / "store")
    ideal = count / (STEPS * STEP_S)
    total = sum(rates)
    print(f"  {count} renderers: {total:.2f} of {ideal:.2f} images/s", file=sys.stderr)
    return Measured(
        renderers=count,
        images_per_s=round(total, 2),
        ideal_images_per_s=ideal,
        share=round(total / ideal, 4),
        shards=shards,
    )


def _rates(store: Path) -> tuple[list[float], int]:
    """Images per second of each renderer, and how many shards there were."""
    ledger = Ledger(open_store(str(store), load_settings()))
    plan = ledger.plan("job")
    times: dict[str, list[float]] = {}
    for row in ledger.rows(plan):
        if row.object is None:
            raise SystemExit(f"image {row.index} failed: {row.error_message}")
        times.setdefault(row.renderer, []).append((store / row.object).stat().st_mtime)
    rates = []
    for stored in times.values():
        stored.sort()
        if len(stored) > 2 * BATCH:
            rates.append((len(stored) - BATCH) / (stored[-1] - stored[BATCH - 1]))
    return rates, plan.shards


if __name__ == "__main__":
    print(datetime.datetime.now(datetime.UTC).date().isoformat())
    print(table(measure(counts=(1, 2, 4, 8, 16, 32), images_each=40)))
