"""The family `diffusers`: any other text-to-image pipeline of diffusers, called as a whole.

The farm knows nothing of such a model: its pipeline encodes, denoises and decodes in one call, with a generator for each image,
so that a picture follows from its seed. All of it stays on the device; nothing is drawn within its steps. Only classes that
come with diffusers and transformers are run, and of code that comes with weights what the card pins and this machine allows
(`farm.models.remotecode`); only safetensors are read.
"""

import inspect
import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from farm.errors import ModelCardError, PlacementError, RenderError
from farm.modelcard import ModelCard, RenderParams
from farm.models.diffusion import DiffusionFamily, Modules, sound
from farm.models.family import Decoded, Embedding, StepCallback, Tokens, Within
from farm.models.loading import NOT_RUN, load_part
from farm.models.remotecode import RemoteCode
from farm.models.schedulers import load_scheduler
from farm.pinnedcode import refuse_unallowed
from farm.plan import ImageSpec

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
MODELS = (diffusers.ModelMixin, transformers.PreTrainedModel)
"""What a part of a card's code is one of, unless it is a scheduler: its weights are then read as any other's."""
DENOISERS = ("transformer", "unet")
TRUE_CFG = "true_cfg_scale"
NEEDED = ("prompt", "width", "height", "num_inference_steps", "generator", "output_type")
"""Arguments that a pipeline must take."""
OURS = (*NEEDED, "negative_prompt", "guidance_scale", "num_images_per_prompt", "return_dict")
"""Arguments that a card cannot give as options."""


@dataclass(frozen=True, slots=True)
class Index:
    """What a model_index.json says. `kind`: the pipeline's class; `parts`: the classes of its parts that have weights or are the
    card's code, of which `coded` says the latter's names; `said`: all of it, with names of diffusers' and transformers' own
    classes in place of the card's code."""

    kind: Any
    parts: dict[str, Any]
    coded: frozenset[str]
    said: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Words(Tokens):
    """A prompt as it is, and how long each of the pipeline's tokenizers finds it."""

    text: str
    lengths: tuple[int, ...]


class PipelineFamily(DiffusionFamily):
    """A pipeline of diffusers on one device."""

    def place(self) -> None:
        """As any other family's, and it fits whole or not at all. Raises ModelCardError for code that is not allowed here."""
        refuse_unallowed(self._card)
        super().place()
        if self.placement is not None and (layout := self.placement.layout) != "resident":
            self.placement = None
            raise PlacementError(
                f"model {self._card.name}: family {self._card.family} keeps a whole model on the device, and here it would be "
                f"{layout}; choose a quantised card, smaller sizes, or a larger GPU"
            )

    def _load_modules(self, folder: Path) -> Modules:
        code = RemoteCode(self._card, folder)
        index = _index(self._card, folder, code)
        with code.blamed():
            return self._assembled(folder, index)

    def _assembled(self, folder: Path, index: Index) -> Modules:
        card, loader, kind, parts = self._card, self._loader, index.kind, index.parts
        denoiser = next((name for name in DENOISERS if name in parts), None)
        if denoiser is None or "vae" not in parts:
            raise ModelCardError(
                f"model {card.name}: {kind.__name__} has no transformer or unet with a vae; choose another model"
            )
        own = {denoiser: loader.denoiser(denoiser, parts[denoiser]), "vae": loader.decoder("vae", parts["vae"])}
        for name, part in parts.items():
            if name.startswith("text_encoder"):
                own[name] = loader.encoder(name, part)
            elif name in index.coded - own.keys():
                weights = {"dtype": self._dtype, "use_safetensors": True} if issubclass(part, nn.Module) else {}
                own[name] = loader.small(name, part, **weights)
        reads = _reading(index) if card.code else kind
        pipeline: Any = load_part(
            card,
            folder,
            "model_index.json",
            lambda: reads.from_pretrained(
                folder,
                dtype=self._dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **own,
            ),
        )
        loader.adapt(own[denoiser], kind)
        if card.scheduler is not None:
            pipeline.scheduler = load_scheduler(card, folder)()
        if hasattr(own["vae"], "enable_slicing"):
            own["vae"].enable_slicing()  # pictures are decoded one by one
        pipeline.set_progress_bar_config(disable=True)
        self._takes = _arguments(card, pipeline)
        self._guidance = _guidance(self._takes - card.options.keys(), own[denoiser])
        if self._guidance is None and card.defaults.guidance_scale > 0:
            raise ModelCardError(
                f"model {card.name}: {kind.__name__} takes no guidance, and the card's defaults have some; give them a "
                "guidance_scale of 0, and what else it takes as options"
            )
        self._pipeline = pipeline
        self._tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
        rest = [part for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
        rest = [part for part in rest if part not in (own[denoiser], own["vae"])]
        return Modules(nn.ModuleList(rest).eval(), own[denoiser], own["vae"])

    def _open(self) -> None:
        """A pipeline is opened once: nothing is drawn within its steps."""

    def _forget(self) -> None:
        """A pipeline starts each call anew."""

    @property
    def within(self) -> Within:
        """Nothing: what a pipeline keeps between its steps is its own."""
        return "nothing"

    def guided(self, params: RenderParams) -> bool:
        """Where the pipeline takes a negative prompt. A true CFG is one above 1; above what others use it is their own."""
        above = 1.0 if self._guidance == TRUE_CFG else 0.0
        return "negative_prompt" in self._takes and params.guidance_scale > above

    def tokenize(self, prompt: str) -> Words:
        """Measure a prompt; the pipeline cuts it itself."""
        text, most = sound(prompt), self._card.max_sequence_length
        lengths = tuple(
            len(cut(text, truncation=True, max_length=min(most, cut.model_max_length))["input_ids"])
            for cut in self._tokenizers
        )
        return Words((), text, lengths)

    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        """Prompts of one length share a batch: what padding does to a picture is the pipeline's own."""
        assert isinstance(positive, Words)
        return positive.lengths, negative.lengths if isinstance(negative, Words) else ()

    def encode(self, tokens: Tokens) -> Embedding:
        """Keep the words: the pipeline encodes them itself."""
        assert isinstance(tokens, Words)
        return Embedding(tokens.text, len(tokens.text))

    def noise(self, specs: Sequence[ImageSpec]) -> Any:
        """Return a generator for each image, in host memory, from which the pipeline draws."""
        return [torch.Generator("cpu").manual_seed(spec.seed) for spec in specs]

    def denoise(
        self,
        specs: Sequence[ImageSpec],
        noise: Any,
        *,
        positive: Sequence[Embedding],
        negative: Sequence[Embedding],
        on_step: StepCallback,
    ) -> torch.Tensor:
        """Call the pipeline: images x 3 x height x width, floats in 0..1, decoded already."""
        params, pipeline = specs[0].params, self._pipeline

        def done(step: int) -> None:
            steps = getattr(pipeline, "num_timesteps", params.num_inference_steps)
            on_step(step + 1, max(steps, step + 1))

        def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done(step)
            return tensors

        given: dict[str, Any] = {
            "prompt": [embedding.states for embedding in positive],
            "width": params.width,
            "height": params.height,
            "num_inference_steps": params.num_inference_steps,
            "generator": noise,
            "output_type": "pt",
            "return_dict": False,
        }
        if negative:
            given["negative_prompt"] = [embedding.states for embedding in negative]
        if self._guidance is not None:
            given[self._guidance] = params.guidance_scale
        elif params.guidance_scale > 0:
            raise RenderError(
                f"{type(pipeline).__name__} takes no guidance, got guidance_scale {params.guidance_scale:g}; give 0"
            )
        if "max_sequence_length" in self._takes:
            given["max_sequence_length"] = self._card.max_sequence_length
        if "callback_on_step_end" in self._takes:
            given["callback_on_step_end"] = after_step
        else:
            given |= {"callback": lambda step, time, latents: done(step), "callback_steps": 1}
        with self._phase("denoise", f"draw {len(specs)} images of {params.width}x{params.height}"):
            images: torch.Tensor = pipeline(**given | self._card.options)[0]
        return images

    def decode(self, latents: torch.Tensor, spec: ImageSpec) -> Decoded:
        """Turn floats into pixels."""
        with self._phase("decode", f"make {len(latents)} pictures of {spec.params.width}x{spec.params.height}"):
            sound_ones = torch.isfinite(latents).flatten(1).all(dim=1)
            levels = torch.nan_to_num(latents).clamp(0, 1).float().mul(255).round().to(torch.uint8)
            pixels = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return Decoded(tuple(pixels), tuple(sound_ones.tolist()))


def _index(card: ModelCard, folder: Path, code: RemoteCode) -> Index:
    """Read a model's index, once. Raises ModelCardError for code that the card does not pin."""
    where = folder / "model_index.json"
    index: dict[str, Any] = load_part(
        card, folder, where.name, lambda: dict(json.loads(where.read_text(encoding="utf-8")))
    )
    name: Any = index.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if file := _pinned_file(card, name):
        kind = code.find(file, name[1], (diffusers.DiffusionPipeline,))
        index["_class_name"] = kind.__name__
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ModelCardError(
            f"model {card.name}: {where} names the pipeline {name}, which diffusers {diffusers.__version__} has not; {NOT_RUN}: "
            "pin it, choose another model, or a newer diffusers"
        )
    parts: dict[str, Any] = {}
    coded: set[str] = set()
    for part, entry in list(index.items()):
        match entry:
            case [str(package), str(class_name)] if not part.startswith("_"):
                file = _pinned_file(card, entry, part)
            case _:
                continue
        if file is not None:
            kinds = (diffusers.SchedulerMixin,) if part.endswith("scheduler") else MODELS
            parts[part] = code.find(file, class_name, kinds)
            stock = next(one for one in kinds if issubclass(parts[part], one))
            index[part] = [stock.__module__.partition(".")[0], stock.__name__]
            coded.add(part)
            continue
        if package not in LIBRARIES and not hasattr(diffusers.pipelines, package):
            raise ModelCardError(
                f"model {card.name}: {where} names {class_name} of {package} as its {part}; {NOT_RUN}: pin it, or choose "
                "another model"
            )
        found = getattr(LIBRARIES.get(package), class_name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            parts[part] = found
    return Index(kind, parts, frozenset(coded), index)


def _pinned_file(card: ModelCard, entry: object, part: str = "") -> str | None:
    """The file of a card's code that [module, class] names: in the part's folder, else beside model_index.json."""
    match entry:
        case [str(module), str()] if module not in LIBRARIES:
            return next((file for file in (f"{part}/{module}.py", f"{module}.py") if file in card.code), None)
    return None


def _reading(index: Index) -> Any:
    """The pipeline's class, which reads `index` and not the file: diffusers would look for code that is named there itself."""

    def load_config(cls: Any, *args: Any, **options: Any) -> dict[str, Any]:
        return dict(index.said)

    return type(
        index.kind.__name__,
        (index.kind,),
        {"load_config": classmethod(load_config), "__module__": index.kind.__module__},
    )


def _guidance(takes: frozenset[str], denoiser: Any) -> str | None:
    """Return which of a pipeline's arguments is the guidance, None where none is.

    Of a model that was distilled to be told its guidance (`guidance_embeds`) `guidance_scale` is that, and a true CFG costs
    another pass; of others that have a true CFG it is the only one, and `guidance_scale` is passed over.
    """
    told = bool(getattr(denoiser.config, "guidance_embeds", False))
    names = ("guidance_scale", "distilled_guidance_scale", TRUE_CFG) if told else (TRUE_CFG, "guidance_scale")
    return next((name for name in names if name in takes), None)


def _arguments(card: ModelCard, pipeline: Any) -> frozenset[str]:
    """Return what the pipeline's call takes. Raises ModelCardError where the farm cannot use it, or an option is not of it."""
    takes = frozenset(inspect.signature(pipeline.__call__).parameters)
    missing = [name for name in NEEDED if name not in takes]
    if not missing and not takes & {"callback_on_step_end", "callback"}:
        missing = ["callback_on_step_end"]
    if missing:
        raise ModelCardError(
            f"model {card.name}: {type(pipeline).__name__} takes no {missing[0]}, so it cannot be rendered with; choose "
            f"another model"
        )
    unknown = sorted(set(card.options) - (takes - set(OURS)))
    if unknown:
        raise ModelCardError(
            f"model {card.name}: {type(pipeline).__name__} has no option {unknown[0]}; it has "
            f"{', '.join(sorted(takes - set(OURS)))}"
        )
    return takes
