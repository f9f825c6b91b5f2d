"""One shard drawn by the engine as the farm draws it, and where its time goes: steps, all else, and between batches."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from farm.bench.gpufidelity import ignore, never, refuse_nan
from farm.bench.model import joined
from farm.engine import Engine, Picture, RenderStep
from farm.plan import ImageSpec


class Marks:
    """Where a shard's batches and steps begin and end: CUDA events, which cost nothing to record, or the clock on a CPU."""

    def __init__(self, on_gpu: bool):
        self._on_gpu = on_gpu
        self._begun: list[Any] = []
        self._steps: list[list[Any]] = []
        self._ended: list[Any] = []

    def on_step(self, step: RenderStep) -> None:
        """A batch begins by saying that it encodes; nothing of it is queued then."""
        if step.stage == "encode":
            self._begun.append(self._now())
            self._steps.append([])
        elif step.stage == "denoise":
            self._steps[-1].append(self._now())

    def end(self) -> None:
        """A batch is done."""
        self._ended.append(self._now())

    def idle_s(self) -> float | None:
        """Seconds that the GPU waits between one batch's end and the next one's beginning; None without a GPU."""
        if not self._on_gpu:
            return None
        return sum(self._between(*pair) for pair in zip(self._ended, self._begun[1:], strict=False))

    def denoise_s(self) -> float:
        """Seconds of steps, from a batch's first to its last, and as much again for the first: before it come moves."""
        return sum(
            self._between(steps[0], steps[-1]) * len(steps) / (len(steps) - 1)
            for steps in self._steps
            if len(steps) > 1
        )

    def _now(self) -> Any:
        return _event() if self._on_gpu else time.perf_counter()

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000 if self._on_gpu else float(end - start)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def draw_shard(
    engine: Engine, specs: Sequence[ImageSpec], batch: int, on_gpu: bool
) -> tuple[float, float, float | None]:
    """Draw a shard as the farm does; returns its seconds, those of steps, and those between batches."""
    marks, pictures = Marks(on_gpu), list[Picture]()
    singles = engine.batches(specs, most=1)
    began = time.perf_counter()
    batches = [joined(singles[start : start + batch]) for start in range(0, len(singles), batch)]
    ahead, _ = engine.encode_ahead(batches, on_step=ignore, cancelled=never)
    for some in batches:
        engine.render_batch(some, on_picture=pictures.append, on_step=marks.on_step, cancelled=never, ahead=ahead)
        marks.end()
    engine.synchronize()
    seconds = time.perf_counter() - began
    refuse_nan(pictures)
    return seconds, marks.denoise_s(), marks.idle_s()
