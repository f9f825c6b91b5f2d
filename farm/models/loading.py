"""From files to loaded parts: safetensors, GGUF or quantised as they load, into torch modules in host memory.

Runs no code that comes with weights (classes of it come as they are, from `farm.models.remotecode`), never reads pickles, and
never asks the network. What is missing, broken or does not fit is a ModelCardError that names the file.
"""

import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import dynamic_module_utils
from transformers.utils import logging as transformers_logging

from farm.cardparts import Adapter
from farm.errors import ModelCardError
from farm.modelcard import ModelCard
from farm.models.device import Part
from farm.models.quantising import keep_layout, settings, without_gpu

T = TypeVar("T")


dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
"""Or transformers asks whoever has the terminal, in the midst of a load, whether to run code that comes with weights."""
NOT_RUN = "code that comes with weights is not run unless the card pins it (`code`) and this machine allows it (FARM_REMOTE_CODE)"
ATTENTION = ("eager", "sdpa")
"""Which attention a part's own settings may name: for any other transformers looks for a package, or fetches one to be run."""
_UNREADABLE = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError),
    SafetensorError,
    SingleFileComponentError,
    StrictDataclassError,
)


def load_part(card: ModelCard, folder: Path, part: str, load: Callable[[], T]) -> T:
    """Call `load` and turn what it raises about files and shapes into a ModelCardError that names the part."""
    try:
        return load()
    except _UNREADABLE as exc:
        if isinstance(exc, (torch.OutOfMemoryError, torch.AcceleratorError)):
            raise
        line = " ".join(str(exc).split())[:300]
        if "trust_remote_code" in str(exc):
            raise ModelCardError(
                f"model {card.name}: {folder / part} needs classes that are neither diffusers' nor transformers': {NOT_RUN}; "
                "choose another model"
            ) from exc
        said = "install what it needs" if isinstance(exc, ImportError) else "fetch the weights again"
        raise ModelCardError(
            f"model {card.name}: {folder / part} cannot be loaded: {type(exc).__name__}: {line}; {said}, or mend the card"
        ) from exc


def refuse_kernels(card: ModelCard, folder: Path) -> None:
    """Raise ModelCardError where the settings of a model's part name an attention kernel, which would be fetched and run."""
    for file in sorted(folder.glob("*/config*.json")):
        settings = load_part(card, file.parent, file.name, partial(_json, file))
        for kernel in _kernels(settings):
            raise ModelCardError(
                f"model {card.name}: {file} names the attention kernel {kernel!r}, and only {' and '.join(ATTENTION)} are used; "
                "take it out there"
            )


def _json(file: Path) -> Any:
    return json.loads(file.read_bytes())


def _kernels(settings: Any, *, named: bool = False) -> Iterator[str]:
    """Names of attention kernels anywhere in a part's settings. `named`: these are such names, by part of the part."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _kernels(value, named=named or name.endswith("attn_implementation"))
    elif isinstance(settings, list):
        for value in settings:
            yield from _kernels(value, named=named)
    elif named and isinstance(settings, str) and settings not in ATTENTION:
        yield settings


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads the parts of one model, each in eval() and in host memory.

    `files`: as `files_of` found them. `device`: where quantising happens. `quantise`: which parts are quantised, and how.
    """

    card: ModelCard
    folder: Path
    files: Mapping[str, Path]
    dtype: torch.dtype
    device: torch.device
    quantise: Mapping[Any, str]

    def small(self, part: str, kind: Any, **options: Any) -> Any:
        """Load what has no weights: a tokenizer, a scheduler."""
        return load_part(
            self.card,
            self.folder,
            part,
            lambda: kind.from_pretrained(self.folder / part, local_files_only=True, **options),
        )

    def encoder(self, part: str, kind: Any) -> Any:
        """Load a text encoder of transformers, quantised where the card says so."""
        from transformers import BitsAndBytesConfig

        return self._module(self.folder, part, kind, **self._quantising("encoder", part, kind, BitsAndBytesConfig))

    def denoiser(self, part: str, kind: Any) -> Any:
        """Load the denoiser: from the model's folder, quantised where the card says so, or from the card's own file."""
        from diffusers import BitsAndBytesConfig

        if self.card.denoiser is not None:
            return self._single_file(part, kind)
        options = self._quantising("denoiser", part, kind, BitsAndBytesConfig)
        with without_gpu() if options and self.device.type == "cpu" else nullcontext():
            return self._module(self.folder, part, kind, **options)

    def decoder(self, part: str, kind: Any) -> Any:
        """Load the VAE: from the model's folder, or from the card's own."""
        own = self.files.get("decoder")
        return self._module(own, "", kind) if own is not None else self._module(self.folder, part, kind)

    def _module(self, folder: Path, part: str, kind: Any, **options: Any) -> Any:
        transformers_logging.disable_progress_bar()
        module, told = load_part(
            self.card,
            folder,
            part,
            lambda: kind.from_pretrained(
                folder / part,
                dtype=self.dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            ),
        )
        self._refuse_missing(folder / part, told["missing_keys"])
        return self._settled(module)

    def _settled(self, module: Any) -> Any:
        """Quantising happens on the GPU; from here on it is for the placement to say what lies there."""
        keep_layout(module)
        Part(module).move(torch.device("cpu"))
        return module.eval()

    def _single_file(self, part: str, kind: Any) -> Any:
        """Load the card's own file into the shape that the model's folder describes."""
        from diffusers import GGUFQuantizationConfig

        assert self.card.denoiser is not None
        file, packed = self.files["denoiser"], self.card.denoiser.format == "gguf"
        options = {}
        if packed:
            self._need("gguf", f"{file.name} as its denoiser")
            options = {"quantization_config": GGUFQuantizationConfig(compute_dtype=self.dtype)}

        def load() -> nn.Module:
            try:
                module: nn.Module = kind.from_single_file(
                    str(file),
                    config=str(self.folder),
                    subfolder=part,
                    dtype=self.dtype,
                    local_files_only=True,
                    **options,
                )
            except NotImplementedError as exc:  # torch, of tensors that were given no values
                raise ValueError(f"it lacks tensors that {self.folder / part} describes") from exc
            empty = [name for name, tensor in module.named_parameters() if tensor.is_meta]
            if empty:
                raise ValueError(f"it lacks {len(empty)} tensors, {empty[0]} among them")
            if packed and (odd := next(_packed_elsewhere(module), None)):
                raise ValueError(f"its tensor {odd} is quantised, and only linear layers can compute with such")
            return module

        return self._settled(load_part(self.card, file.parent, file.name, load))

    def _quantising(self, role: str, part: str, kind: Any, config: Any) -> dict[str, Any]:
        """`role`: encoder or denoiser; `part`: its folder."""
        how = self.quantise.get(role)
        if how is None:
            return {}
        self._need("bitsandbytes", f"its {role} as {how}")
        where = self.folder / part
        given = load_part(self.card, self.folder, part, lambda: settings(how, kind, where, dtype=self.dtype))
        return {"quantization_config": config(**given), "device_map": {"": self.device}}

    def adapt(self, denoiser: Any, pipeline: Any) -> None:
        """Load the card's adapters and have them all active; they are never merged into the weights.

        `pipeline`: the class of diffusers, or a pipeline, that reads adapters for this denoiser.
        """
        card = self.card
        if not card.adapters:
            return
        self._need("peft", f"adapter {card.adapters[0].name}")
        if not hasattr(pipeline, "lora_state_dict"):
            raise ModelCardError(f"model {card.name}: its pipeline takes no adapters; take them out of the card")
        for adapter in card.adapters:
            self._adapt_with(denoiser, pipeline, adapter)
        denoiser.set_adapters([adapter.name for adapter in card.adapters], [one.weight for one in card.adapters])

    def _adapt_with(self, denoiser: Any, pipeline: Any, adapter: Adapter) -> None:
        file = self.files[f"adapter:{adapter.name}"]
        given = {"adapter_name": adapter.name}

        def load() -> int:
            state, metadata = pipeline.lora_state_dict(
                file.parent, weight_name=file.name, local_files_only=True, return_lora_metadata=True
            )
            layers = len({name.split(".lora_")[0] for name in state if ".lora_" in name})
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # a second adapter
                if hasattr(pipeline, "load_lora_into_transformer"):
                    pipeline.load_lora_into_transformer(state, transformer=denoiser, metadata=metadata, **given)
                else:
                    pipeline.load_lora_into_unet(state, network_alphas=None, unet=denoiser, metadata=metadata, **given)
            return layers

        layers = load_part(self.card, file.parent, file.name, load)
        fitting = sum(adapter.name in getattr(module, "lora_A", ()) for module in denoiser.modules())
        if not layers or fitting < layers:
            raise ModelCardError(
                f"model {self.card.name}: {file} fits {fitting} layers of the denoiser and has {layers}; it was made for "
                f"another model, or is no LoRA adapter; mend the card"
            )

    def _need(self, package: str, what: str) -> None:
        if importlib.util.find_spec(package) is None:
            raise ModelCardError(
                f"model {self.card.name}: loading {what} needs the package {package}, which is not installed; pip install "
                f"'diffusion-farm[quantised]', or choose a card without it"
            )

    def _refuse_missing(self, where: Path, names: Iterable[str]) -> None:
        missing = sorted(names)
        if missing:
            raise ModelCardError(
                f"model {self.card.name}: {where} lacks {len(missing)} of its tensors, {missing[0]} among them; fetch the "
                f"weights again, or mend the card"
            )


def _packed_elsewhere(module: nn.Module) -> Iterator[str]:
    """Names of quantised tensors of a GGUF file that are no linear layer's weight."""
    from diffusers.quantizers.gguf.utils import UNQUANTIZED_TYPES, GGUFLinear, GGUFParameter

    for owner, part in module.named_modules():
        for name, tensor in part.named_parameters(recurse=False):
            quantised = isinstance(tensor, GGUFParameter) and tensor.quant_type not in UNQUANTIZED_TYPES
            if quantised and not (isinstance(part, GGUFLinear) and name == "weight"):
                yield f"{owner}.{name}" if owner else name
