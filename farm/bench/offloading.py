"""The peers on a GPU: what a user has without the farm, a loop over a pipeline with `enable_model_cpu_offload()`.

Same files, dtype and quantisation, under the same limit of memory, one picture after another. For NewBie, of which diffusers has
no pipeline, it is the farm's own family with its modules moved whole, there and back, as that call does. Qwen's text encoder goes
without its eyes here too, or it would fit no card of 16 GB in bfloat16. On a CPU nothing is moved.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch

from farm.modelcard import ModelCard
from farm.models.diffusion import CPU
from farm.models.newbie import NewBieFamily
from farm.needs import files_of
from farm.plan import ImageSpec, Numerics
from farm.weights import locate


class Peer(Protocol):
    """Something that draws one picture at a time."""

    def draw(self, spec: ImageSpec) -> None:
        """Draw a picture to the last pixel, and drop it."""


def open_peer(card: ModelCard, numerics: Numerics, *, device: str, vram_gib: float) -> Peer:
    """Load a card's peer. The caller has set the limit of memory. Raises what diffusers raises."""
    if card.family == "newbie":
        return WholeModules(card, numerics, device=device, vram_gib=vram_gib)
    return Offloaded(card, numerics, device)


class Offloaded:
    """The stock pipeline of Z-Image or Qwen-Image."""

    def __init__(self, card: ModelCard, numerics: Numerics, device: str):
        self._card = card
        dtype: torch.dtype = getattr(torch, numerics.dtype)
        on_gpu = device != "cpu"
        self._pipeline = (_zimage if card.family == "z-image" else _qwen)(card, dtype, on_gpu)
        self._pipeline.set_progress_bar_config(disable=True)
        if on_gpu:
            self._pipeline.enable_model_cpu_offload(device=torch.device(device))

    def draw(self, spec: ImageSpec) -> None:
        """The documented call."""
        params = spec.params
        given: dict[str, Any] = {"guidance_scale": params.guidance_scale}
        if self._card.family == "qwen-image":
            given = {"true_cfg_scale": params.guidance_scale}
        self._pipeline(
            prompt=spec.prompt,
            negative_prompt=params.negative_prompt,
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            max_sequence_length=self._card.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(spec.seed),
            **given,
        )


def _zimage(card: ModelCard, dtype: torch.dtype, on_gpu: bool) -> Any:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen3Model

    folder = locate(card)
    local: dict[str, Any] = {"local_files_only": True}
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **local),
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, **local),
        text_encoder=Qwen3Model.from_pretrained(
            folder / "text_encoder", dtype=dtype, **local, **_quantised(card, dtype, on_gpu)
        ).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False, **local),
        transformer=ZImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype, **local),
    )


def _qwen(card: ModelCard, dtype: torch.dtype, on_gpu: bool) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        GGUFQuantizationConfig,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = locate(card)
    local: dict[str, Any] = {"local_files_only": True}
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=dtype, **local, **_quantised(card, dtype, on_gpu)
    ).eval()
    encoder.model.visual = None
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", **local),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=dtype, **local),
        text_encoder=encoder,
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False, **local),
        transformer=QwenImageTransformer2DModel.from_single_file(
            str(files_of(card)["denoiser"]),
            config=str(folder),
            subfolder="transformer",
            torch_dtype=dtype,
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            **local,
        ),
    )


def _quantised(card: ModelCard, dtype: torch.dtype, on_gpu: bool) -> dict[str, Any]:
    """The card's own quantisation of the encoder, as the farm's loader sets it."""
    from transformers import BitsAndBytesConfig

    how = card.quantise.get("encoder")
    if how is None or not on_gpu:
        return {}
    if how == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": nf4}


class WholeModules(NewBieFamily):
    """NewBie in a plain loop: one module at a time on the device, copied there and back for each picture."""

    def __init__(self, card: ModelCard, numerics: Numerics, *, device: str, vram_gib: float):
        super().__init__(card, numerics, device=device, vram_gib=vram_gib)
        self.load()
        self._parts = {}
        for module in self._modules_by_phase().values():
            module.to(CPU)
        gc.collect()
        self._device.empty_cache()

    def draw(self, spec: ImageSpec) -> None:
        """Encode, denoise and decode a picture by itself."""
        params = spec.params
        positive = [self.encode(self.tokenize(spec.prompt))]
        negative = [self.encode(self.tokenize(params.negative_prompt))] if self.guided(params) else []
        latents = self.denoise(
            [spec], self.noise([spec]), positive=positive, negative=negative, on_step=lambda step, steps: None
        )
        self.decode(latents, spec)

    @contextmanager
    def _phase(self, phase: Literal["encode", "denoise", "decode"], doing: str) -> Iterator[None]:
        self._set_threads()
        with self._device.errors(doing):
            for name, module in self._modules_by_phase().items():
                if name != phase:
                    module.to(CPU)
            self._modules_by_phase()[phase].to(self._device.torch)
            with torch.inference_mode():
                yield

    def _modules_by_phase(self) -> dict[str, torch.nn.Module]:
        modules = self._modules
        return {"encode": modules.encoder, "denoise": modules.denoiser, "decode": modules.decoder}
