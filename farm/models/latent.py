"""Families that draw noise and decode latents in the farm's own way, whatever their denoiser.

Noise is drawn per image on the CPU in fp32, as the stock pipelines do, and decoding is cut by the picture's size alone. Knows
nothing of placement beyond the phase that it decodes in.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch

from farm.models.diffusion import DiffusionFamily
from farm.models.family import Decoded
from farm.needs import DECODE_PIXELS
from farm.plan import ImageSpec


class LatentFamily(DiffusionFamily):
    """A family that says its latents' shape and how they are decoded."""

    def noise(self, specs: Sequence[ImageSpec]) -> torch.Tensor:
        """Draw each image's noise on the CPU in fp32, as the stock pipelines do with one generator an image."""
        drawn = [
            torch.randn(
                (1, *self._latent_shape(spec.params.width, spec.params.height)),
                generator=torch.Generator("cpu").manual_seed(spec.seed),
                dtype=torch.float32,
            )
            for spec in specs
        ]
        return torch.cat(drawn)

    def decode(self, latents: torch.Tensor, spec: ImageSpec) -> Decoded:
        """Turn latents into pixels, on the device, in slices whose size follows from the picture's alone."""
        params = spec.params
        at_once = max(1, DECODE_PIXELS // (params.width * params.height))
        doing = f"decode {len(latents)} images of {params.width}x{params.height}"
        with self._phase("decode", doing):
            pixels: list[torch.Tensor] = []
            finite: list[torch.Tensor] = []
            for some in latents.split(at_once):
                images = self._decoded(some)
                sound = torch.isfinite(images).flatten(1).all(dim=1)
                images = torch.nan_to_num(images * 0.5 + 0.5).clamp_(0, 1).float().mul_(255).round_()
                pixels.append(self._device.to_host(images.to(torch.uint8).permute(0, 2, 3, 1).contiguous()))
                finite.append(self._device.to_host(sound))
            self._device.synchronize()
        return Decoded(
            tuple(picture for some in pixels for picture in some.numpy()),
            tuple(bool(one) for some in finite for one in some),
        )

    @abstractmethod
    def _latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of one image's noise."""

    @abstractmethod
    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode: images x 3 x height x width in -1..1, in the stock pipeline's order."""
