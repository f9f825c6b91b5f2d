"""A family that only sleeps, to measure the farm and not a model.

One denoising step takes 10 ms an image, so `num_inference_steps: 5` is a picture every 50 ms; width and height are
those of the noise it returns. Each picture follows from its seed alone. Imports no torch: hundreds fit one machine.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from farm.modelcard import RenderParams
from farm.models.family import Decoded, Embedding, StepCallback, Tokens, Within
from farm.plan import ImageSpec

STEP_S = 0.010


class SleepFamily:
    """Renders by sleeping."""

    encodes_ahead = False
    within: Within = "anything"

    def __init__(self, sleep: Callable[[float], None] = time.sleep):
        self._sleep = sleep

    def inside(self) -> "SleepFamily":
        """Sleep keeps nothing between two calls."""
        return self

    def place(self) -> None:
        """Nothing to place."""

    def load(self) -> None:
        """Nothing to load."""

    host_bytes = 0

    def park(self) -> bool:
        """Nothing to keep."""
        return True

    def unload(self) -> None:
        """Nothing to let go of."""

    def tokenize(self, prompt: str) -> Tokens:
        """All prompts are alike."""
        return Tokens(())

    def guided(self, params: RenderParams) -> bool:
        """All prompts are alike."""
        return False

    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        """All prompts are alike."""
        return None

    def encode(self, tokens: Tokens) -> Embedding:
        """All prompts are alike."""
        return Embedding(None, 0)

    def noise(self, specs: Sequence[ImageSpec]) -> tuple[np.ndarray, ...]:
        """Return the finished pictures: noise is all that there is."""
        return tuple(
            np.random.default_rng(spec.seed).integers(
                0, 256, size=(spec.params.height, spec.params.width, 3), dtype=np.uint8
            )
            for spec in specs
        )

    def denoise(
        self,
        specs: Sequence[ImageSpec],
        noise: tuple[np.ndarray, ...],
        *,
        positive: Sequence[Embedding],
        negative: Sequence[Embedding],
        on_step: StepCallback,
    ) -> tuple[np.ndarray, ...]:
        """Sleep for each step and image."""
        steps = specs[0].params.num_inference_steps
        for step in range(steps):
            self._sleep(STEP_S * len(specs))
            on_step(step + 1, steps)
        return noise

    def decode(self, latents: tuple[np.ndarray, ...], spec: ImageSpec) -> Decoded:
        """Return the noise as it is."""
        return Decoded(latents, (True,) * len(latents))

    def watch_memory(self) -> None:
        """Nothing to measure."""

    working_bytes: Mapping[str, int] = MappingProxyType({})

    def synchronize(self) -> None:
        """Sleeping is done when it is done."""

    def recover(self) -> None:
        """Sleep leaves nothing behind."""
