"""What folding Qwen-Image's VAE for a single frame gains: the stock decoder beside `farm.models.qwen_vae`, at full size.

The stock decoder convolves over time too: of a single frame's past there are only zeros, and a kernel of three slices multiplies
two of them by nothing. A folded kernel has the last slice alone, so that up to two thirds of the multiplications go, and the
copies of features that the stock decoder keeps for a next frame. The floor is what a plain 2D decoder of these widths
takes, and a folded one is such a decoder. Weights are random, of the real sizes: neither time nor memory asks what they are.

Both decode the same latents in turns, in one run, on one thread; the first decode of each at a size warms up. Memory is the most
that the process held during a decode above what it held before, as Linux tells it (with glibc).

    python -m farm.bench.vae                               # the table and a JSON line
    python -m farm.bench.vae --page infra/bench/vae.md     # and into the page
"""

import argparse
import copy
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage

from farm.bench.environment import environment
from farm.bench.page import check_page, fill_page
from farm.models.qwen_vae import FrameDecoder

SIZES = (128, 192, 256)
ROUNDS = 5
MIB = 2**20
FIGURES = "<!-- figures: python -m farm.bench.vae --page infra/bench/vae.md -->"
PROCESS = Path("/proc/self")

Decode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one side in pixels came to: medians of seconds, the most bytes above those before, and of floats in -1..1 how
    far the two are apart at most and the stock ones' standard deviation (`spread`)."""

    side: int
    stock_s: float
    folded_s: float
    stock_bytes: int
    folded_bytes: int
    apart: float
    spread: float

    @property
    def gain(self) -> float:
        """How many times as long the stock decoder takes."""
        return self.stock_s / self.folded_s


@dataclass(frozen=True, slots=True)
class Once:
    """One decode."""

    image: torch.Tensor
    seconds: float
    peak_bytes: int


def decoders(vae: AutoencoderKLQwenImage) -> tuple[Decode, Decode]:
    """Return the stock decode of a VAE, as QwenImagePipeline calls it, and the folded one of a copy."""
    folded = FrameDecoder(copy.deepcopy(vae))
    sides = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(sides)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(sides)

    def stock(latents: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = vae.decode(latents.unsqueeze(2) / inverse_std + mean, return_dict=False)[0][:, :, 0]
        return image

    return stock, folded


def measure(vae: AutoencoderKLQwenImage, *, sizes: Sequence[int] = SIZES, rounds: int = ROUNDS) -> list[Decoded]:
    """Decode latents of each size both ways in turns, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measured(decoders(vae), vae, side, rounds) for side in sizes]
    finally:
        torch.set_num_threads(threads)


def _measured(pair: tuple[Decode, Decode], vae: AutoencoderKLQwenImage, side: int, rounds: int) -> Decoded:
    step = 2 ** len(vae.config.temperal_downsample)
    shape = (1, vae.config.z_dim, side // step, side // step)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(side))
    stock, folded = (once(decode, latents) for decode in pair)
    timed: tuple[list[Once], list[Once]] = ([], [])
    for _ in range(rounds):
        for decode, found in zip(pair, timed, strict=True):
            found.append(once(decode, latents))
    stock_s, folded_s = (statistics.median(one.seconds for one in found) for found in timed)
    print(f"  {side}: {stock_s:.2f} s and {folded_s:.2f} s", file=sys.stderr)
    return Decoded(
        side=side,
        stock_s=stock_s,
        folded_s=folded_s,
        stock_bytes=max(one.peak_bytes for one in (stock, *timed[0])),
        folded_bytes=max(one.peak_bytes for one in (folded, *timed[1])),
        apart=float((stock.image - folded.image).abs().max()),
        spread=float(stock.image.std()),
    )


def once(decode: Decode, latents: torch.Tensor) -> Once:
    """Decode, and tell seconds and memory."""
    ctypes.CDLL(None).malloc_trim(0)  # else what an earlier decode freed is taken up again unseen
    (PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _resident("VmRSS")
    start = time.perf_counter()
    with torch.no_grad():
        image = decode(latents)
    return Once(image, time.perf_counter() - start, max(0, _resident("VmHWM") - before))


def _resident(name: str) -> int:
    for line in (PROCESS / "status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{PROCESS / 'status'}: has no {name}; this benchmark needs Linux")


def table(rows: Sequence[Decoded]) -> str:
    """Markdown."""
    lines = [
        "| pixels | stock, s | folded, s | stock over folded | stock, MiB | folded, MiB | largest difference | floats' spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.side}×{row.side} | {row.stock_s:.2f} | {row.folded_s:.2f} | {row.gain:.2f}× | {row.stock_bytes / MIB:.0f} "
        f"| {row.folded_bytes / MIB:.0f} | {row.apart:.1e} | {row.spread:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def write_page(path: Path, rows: Sequence[Decoded], *, millions: float, rounds: int) -> None:
    """Put the table and what it was measured on below the page's mark."""
    about = environment()
    said = (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, Python {about['python']}, torch {about['torch']}, "
        f"diffusers {about['diffusers']}. {millions:.0f} million random weights, float32, one thread; medians of {rounds} rounds "
        "in turn."
    )
    fill_page(path, FIGURES, said, table(rows))


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m farm.bench.vae", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of square pictures in pixels")
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--page", type=Path, help="page to put the figures into")
    given = arguments.parse_args()
    if given.page:
        check_page(given.page, FIGURES)
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage().eval()
    rows = measure(vae, sizes=given.sizes, rounds=given.rounds)
    print(table(rows))
    if given.page:
        weights = sum(parameter.numel() for parameter in vae.parameters())
        write_page(given.page, rows, millions=weights / 1e6, rounds=given.rounds)
    print(json.dumps({"environment": environment(), "vae": [asdict(row) | {"gain": row.gain} for row in rows]}))


if __name__ == "__main__":
    main()
