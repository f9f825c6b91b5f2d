"""The two peers of `farm.bench.throughput`, written as their own documentation would have a user write them.

    python -m farm.bench.peers {loop|ray-data} PROMPTS_FILE OUTPUT_FOLDER --batch N [--threads N]

`loop`: a plain diffusers loop that saves each picture as a PNG. `ray-data`: `map_batches` with one actor that does the
same. Both take the stock pipeline with the card's steps and guidance, and a seed for each image.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from farm.modelcard import find_card
from farm.settings import load_settings
from farm.weights import source_folder


class Stock:
    """The stock pipeline, loaded once, with the card's steps and guidance."""

    def __init__(self, threads: int | None):
        import torch
        from diffusers import ZImagePipeline

        if threads:
            torch.set_num_threads(threads)
        self._card = find_card("sketch", load_settings())
        self._pipeline = ZImagePipeline.from_pretrained(source_folder(self._card.source), torch_dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """One batch."""
        import torch

        card = self._card.defaults
        images: list[Image] = self._pipeline(
            prompt=list(prompts),
            negative_prompt=[""] * len(prompts),
            width=card.width,
            height=card.height,
            num_inference_steps=card.num_inference_steps,
            guidance_scale=card.guidance_scale,
            max_sequence_length=self._card.max_sequence_length,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        ).images
        return images


class Loop:
    """Called with a batch of prompts, saves pictures named by their index."""

    def __init__(self, folder: str, threads: int | None):
        self._stock = Stock(threads)
        self._folder = Path(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts, indexes = [str(prompt) for prompt in batch["prompt"]], [int(index) for index in batch["index"]]
        for index, image in zip(indexes, self._stock.draw(prompts, indexes), strict=True):
            image.save(self._folder / f"{index:06d}.png")
        return {"index": batch["index"]}


def run_loop(rows: list[dict[str, Any]], folder: str, batch: int, threads: int | None) -> None:
    render = Loop(folder, threads)
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        render({name: [row[name] for row in some] for name in ("index", "prompt")})


def run_ray_data(rows: list[dict[str, Any]], folder: str, batch: int, threads: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=128 * 1024**2)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.from_items(rows).map_batches(
        Loop, fn_constructor_args=(folder, threads), batch_size=batch, concurrency=1
    )
    for _ in dataset.iter_batches(batch_size=batch):
        pass
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=("loop", "ray-data"))
    parser.add_argument("prompts", type=Path)
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    rows = [{"index": i, "prompt": line} for i, line in enumerate(given.prompts.read_text().splitlines())]
    run = run_loop if given.peer == "loop" else run_ray_data
    run(rows, given.folder, given.batch, given.threads)


if __name__ == "__main__":
    main()
