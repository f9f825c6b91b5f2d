"""NewBie's two readers of a prompt: Gemma 3, whose states the denoiser attends to, and Jina CLIP v2's text tower, pooled.

Gemma reads the prompt behind a system prompt, Jina the prompt alone. Transformers has no class of Jina CLIP; its text tower is
that of Jina Embeddings v3 with one adapter, which the published model applies to every prompt: here it is merged into the
weights as they load. Code that comes with the weights is never run.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, Gemma3TextModel, JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from farm.errors import ModelCardError
from farm.tensorfiles import USUAL_NAMES, without_copies

SYSTEM_PROMPT = (
    "You are an assistant designed to generate high-quality anime images with the highest degree of image-text alignment "
    "based on xml format textual prompts."
)
PROMPT_START = " <Prompt Start> "
POOLED_TOKENS = 2048
"""Prompt tokens that Jina reads, as in the authors' training and demonstration; its model takes 8,192."""

GEMMA_PREFIX = {r"^(model\.)?language_model\.(model\.)?": ""}
"""Before the language model's names where Gemma 3 was saved with its eyes, in any of the ways it was."""
JINA_PREFIX = re.compile(r"^(text_model\.)?(transformer\.)?(roberta\.|model\.)?")
NO_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "pooler.", "lm_head.")
ORIGINAL = ".parametrizations.weight.original"
ADAPTER = ".parametrizations.weight.0.lora_"
ROTARY_BASE = 20000.0


@dataclass(frozen=True, slots=True)
class Adapter:
    """Which of the tower's adapters every prompt is read with, and by how much it counts: alpha over its rank."""

    place: int
    alpha: float


class Gemma(Gemma3TextModel):  # type: ignore[misc]
    """Gemma 3's language model; what else its files hold is left there."""

    _keys_to_ignore_on_load_unexpected = (
        r"^(model\.)?vision_tower\.",
        r"^(model\.)?multi_modal_projector\.",
        r"lm_head\.",
        r"^spiece_model$",
    )

    @classmethod
    def from_pretrained(cls, folder: Path, **options: Any) -> Any:
        """Load it from a folder of all of Gemma 3. `options` are transformers'."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        language = getattr(config, "text_config", config)
        files = safetensors_in(folder)
        if len(files) == 1 and files[0].name not in USUAL_NAMES:
            language.transformers_weights = files[0].name  # as its authors named it, for another program
        return super().from_pretrained(folder, config=language, key_mapping=GEMMA_PREFIX, **options)


def for_gemma(prompt: str, system_prompt: str) -> str:
    """Put the system prompt before a prompt. An empty one stands by itself, as negative ones do in the published code."""
    return f"{system_prompt}{PROMPT_START}{prompt}" if prompt and system_prompt else prompt


def load_jina(model: str, folder: Path, *, dtype: torch.dtype) -> JinaEmbeddingsV3Model:
    """Load Jina CLIP v2's text tower from a folder, its adapter merged. Raises ModelCardError where it is another model."""
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = given.get("text_config", given)
    pooling = (config.get("pooler_type") or "mean_pooler", config.get("proj_type"), bool(given.get("add_projections")))
    if pooling != ("mean_pooler", None, False):
        raise ModelCardError(
            f"model {model}: {folder / 'config.json'} is not Jina CLIP v2's: pooler_type, proj_type and add_projections are "
            f"{pooling}, not a mean without projections; name another folder"
        )
    sizes = config.get("hf_model_config_kwargs") or {}
    adapters = sizes.get("lora_adaptations") or []
    task = config.get("default_lora_task")
    adapter = Adapter(adapters.index(task), float(sizes.get("lora_alpha", 1))) if task in adapters else None
    known = {name: value for name, value in sizes.items() if name in JinaEmbeddingsV3Config.__annotations__}
    rope = {"rope_type": "default", "rope_theta": float(sizes.get("rotary_emb_base", ROTARY_BASE))}
    tower, told = JinaEmbeddingsV3Model.from_pretrained(
        None,
        config=JinaEmbeddingsV3Config(**known | {"rope_parameters": rope}),
        state_dict=merged(dict(_text_tensors(folder)), adapter, dtype=dtype),
        add_pooling_layer=False,
        dtype=dtype,
        output_loading_info=True,
    )
    _refuse_missing(model, folder, told)
    return tower.eval()


def merged(
    tensors: Mapping[str, torch.Tensor], adapter: Adapter | None, *, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return a tower's tensors under plain names, with one of its adapters added to the weights; summed in float32."""
    plain = {}
    for name, tensor in tensors.items():
        if ADAPTER in name:
            continue
        owner = name.removesuffix(ORIGINAL)
        if owner != name:
            name = f"{owner}.weight"
            if adapter is not None:
                down, up = (tensors[f"{owner}{ADAPTER}{letter}"][adapter.place].float() for letter in "AB")
                # An embedding is looked up, not multiplied: its two factors stand the other way round.
                first, second = (down, up) if "embeddings" in owner else (up, down)
                tensor = tensor.float().add(first @ second, alpha=adapter.alpha / len(second))
        plain[name] = tensor.to(dtype)
    return plain


def pooled_of(tower: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean of a prompt's states: `ids` batch x tokens, none of them padding."""
    states = tower(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    pooled: torch.Tensor = states.mean(dim=1)
    return pooled


def safetensors_in(folder: Path) -> list[Path]:
    """Return a folder's weights, of which those that an index names where there is one."""
    for index in folder.glob("*.safetensors.index.json"):
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weights.values()))]
    return without_copies(sorted(folder.glob("*.safetensors")))


def _text_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in safetensors_in(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if not name.startswith(NO_TEXT):
                    yield JINA_PREFIX.sub("", name), file.get_tensor(name)


def _refuse_missing(model: str, folder: Path, told: Mapping[str, Any]) -> None:
    missing = sorted(told["missing_keys"])
    if missing:
        raise ModelCardError(
            f"model {model}: {folder} lacks {len(missing)} of the tensors of its model, {missing[0]} among them; fetch the "
            f"weights again, or mend the card"
        )
