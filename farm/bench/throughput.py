"""One renderer beside a plain diffusers loop and Ray Data, on the bundled model, in turn, in one run.

All three write one PNG per image into a folder on the same disk: same prompts, steps, guidance and batch. The floor is
the denoiser: what a contender adds to it (encoding the same negative prompt again, PNG on the render thread, waiting
between batches) is what is compared. Torch uses every core in the plain loop; Ray gives an actor of one CPU one thread,
so Ray Data runs with two as well. The farm's one renderer uses all cores for whole batches side by side. The farm also
hashes every picture, writes provenance into it and keeps receipts.

Images per second are counted from the files' own times, after the first batch, so that starting up is not in them; the
whole command's seconds stand beside. Medians over the rounds; ratios are to the loop of the same round, since the machine
may be busy.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

from farm.modelcard import find_card
from farm.settings import load_settings

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white", "black", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
CONTENDERS = ("loop", "loop, 1 thread", "ray-data", "ray-data, 2 threads", "farm")


class Measured(TypedDict):
    """Medians of one contender. `ratio`: images per second over those of the plain loop."""

    contender: str
    images_per_s: float
    ratio: float
    command_s: float


def measure(*, images: int, rounds: int) -> list[Measured]:
    """Run every contender once a round."""
    rng = random.Random(1)
    prompts = [
        f"a {rng.choice(COLORS)} {rng.choice(SHAPES)} on a {rng.choice(COLORS)} background" for _ in range(images)
    ]
    batch = find_card("sketch", load_settings()).batch["cpu"]
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory(prefix="farm-bench-") as folder:
                started = time.monotonic()
                pictures = _run(name, prompts, Path(folder), batch)
                seconds[name].append(time.monotonic() - started)
                rates[name].append(_rate(pictures, images, batch))
            print(f"  round {number + 1}: {name}: {rates[name][-1]:.2f} images/s", file=sys.stderr)
    return [
        Measured(
            contender=name,
            images_per_s=round(statistics.median(rates[name]), 2),
            ratio=round(statistics.median(a / b for a, b in zip(rates[name], rates["loop"], strict=True)), 3),
            command_s=round(statistics.median(seconds[name]), 1),
        )
        for name in CONTENDERS
    ]


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = ["| | images/s | against the loop | whole command, s |", "|---|---|---|---|"]
    lines += [
        f"| {row['contender']} | {row['images_per_s']:.2f} | {row['ratio']:.2f}× | {row['command_s']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _run(name: str, prompts: list[str], folder: Path, batch: int) -> list[Path]:
    """Run one contender; returns the pictures that it wrote."""
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    out = folder / "out"
    out.mkdir()
    env = dict(os.environ)
    if name == "farm":
        manifest = folder / "bench.yaml"
        manifest.write_text(
            "name: bench\nmodel: sketch\nprompts: {file: prompts.txt}\nseeds: {count: 1, from: slot}\n"
            "output: {thumbnails: false}\n"
        )
        command = [str(Path(sys.executable).parent / "farm"), "render", str(manifest), "--renderers", "1"]
        env |= {"FARM_STORE": str(out), "FARM_RUNTIME_DIR": str(folder / "runtime")}
    else:
        peer, _, threads = name.partition(", ")
        command = [sys.executable, "-m", "farm.bench.peers", peer, str(folder / "prompts.txt"), str(out)]
        command += ["--batch", str(batch)]
        command += ["--threads", threads.split()[0]] if threads else []
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [path for path in out.rglob("*.png") if path.name != "sheet.png"]


def _rate(pictures: list[Path], images: int, batch: int) -> float:
    if len(pictures) != images:
        raise SystemExit(f"{images} pictures were asked for and {len(pictures)} were written")
    times = sorted(path.stat().st_mtime for path in pictures)
    return (images - batch) / (times[-1] - times[batch - 1])


if __name__ == "__main__":
    print(table(measure(images=256, rounds=3)))
