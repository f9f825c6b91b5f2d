"""Measure how often the model draws what prompts ask for, by steps and guidance.

Prompts describe scenes from a seed that training does not use, each picture has its own seed, and `farm.sketch.judge`
decides. Equal arguments give equal pictures on one machine.

    python -m farm.sketch.adherence --prompts 500 --steps 8 --guidance 2
    python -m farm.sketch.adherence --prompts 500 --steps 4 8 20 40 --guidance 0 1 2 3
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import ZImagePipeline
from PIL import Image

from farm.sketch import WEIGHTS
from farm.sketch.drawing import SIDE, sample
from farm.sketch.judge import Verdict, judge, shares, table
from farm.sketch.language import caption, read

_UNSEEN = 77_000_001
_BATCH = 20


def load(weights: Path = WEIGHTS) -> ZImagePipeline:
    """The pipeline in float32, on the GPU where there is one."""
    pipeline = ZImagePipeline.from_pretrained(weights, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def unseen_prompts(count: int) -> list[str]:
    """Captions of random scenes, with every colour named."""
    rng = np.random.default_rng(_UNSEEN)
    return [caption(sample(rng), rng) for _ in range(count)]


def render(
    pipeline: ZImagePipeline, prompts: list[str], *, num_inference_steps: int, guidance_scale: float
) -> list[Image.Image]:
    """Render each prompt once; the picture at index i has the seed i."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        seeds = range(start, start + len(batch))
        pictures += pipeline(
            # A copy, because the pipeline writes the chat template into the list it is given.
            prompt=list(batch),
            width=SIDE,
            height=SIDE,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=64,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
    return pictures


def verdicts(prompts: list[str], pictures: list[Image.Image]) -> list[Verdict]:
    """The judge's verdict on each picture."""
    return [judge(picture, read(prompt)) for prompt, picture in zip(prompts, pictures, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the model")
    parser.add_argument("--prompts", type=int, default=500, help="number of unseen prompts")
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="values of num_inference_steps")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="values of guidance_scale")
    parser.add_argument("--threads", type=int, help="CPU threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipeline = load(options.weights)
    prompts = unseen_prompts(options.prompts)
    rows: dict[str, dict[str, float]] = {}
    for steps in options.steps:
        for guidance in options.guidance:
            label = f"{steps} steps, guidance {guidance:g}"
            print(f"rendering {len(prompts)} prompts: {label}", file=sys.stderr)
            pictures = render(pipeline, prompts, num_inference_steps=steps, guidance_scale=guidance)
            rows[label] = shares(verdicts(prompts, pictures))
    print(table(rows), json.dumps({"prompts": len(prompts), "shares": rows}), sep="\n\n")


if __name__ == "__main__":
    main()
