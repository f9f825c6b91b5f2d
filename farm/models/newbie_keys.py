"""Both published layouts of NewBie's denoiser, read into one: the authors' NextDiT checkpoint, and that of diffusers' Lumina2.

The authors' has query, key and value in one matrix, and may bear the prefix that ComfyUI puts before its names. The model's
shape follows from the tensors', so that a file without its config.json can be read too. The change to diffusers that adds the
pooled input is not merged, and its names may yet move: those five tensors are told by their shapes.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from farm.errors import ModelCardError

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
UNUSED = frozenset({"norm_final.weight"})
"""In the authors' checkpoint, and in no computation of theirs."""

RENAMED: tuple[tuple[str, str], ...] = (
    (r"^cap_embedder\.", "time_caption_embed.caption_embedder."),
    (r"^t_embedder\.mlp\.0\.", "time_caption_embed.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time_caption_embed.timestep_embedder.linear_2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear_1."),
    (r"^final_layer\.linear\.", "norm_out.linear_2."),
    (r"^(context_refiner\.\d+)\.attention_norm1\.", r"\1.norm1."),
    (r"\.attention_norm1\.", ".norm1.norm."),
    (r"\.attention_norm2\.", ".norm2."),
    (r"\.adaLN_modulation\.1\.", ".norm1.linear."),
    (r"\.attention\.out\.", ".attn.to_out.0."),
    (r"\.attention\.q_norm\.", ".attn.norm_q."),
    (r"\.attention\.k_norm\.", ".attn.norm_k."),
    (r"\.attention\.", ".attn."),
    (r"\.feed_forward\.w(\d)\.", r".feed_forward.linear_\1."),
)
POOLED = ("clip_text_pooled_proj.0", "clip_text_pooled_proj.1", "time_text_embed.1")
"""The pooled vector's norm, its projection, and that of time and pooled vector together."""
POOLED_TENSORS = {f"{POOLED[0]}.weight", *(f"{name}.{kind}" for name in POOLED[1:] for kind in ("weight", "bias"))}
STOCK = re.compile(
    r"^(x_embedder|norm_out|layers|noise_refiner|context_refiner|"
    r"time_caption_embed\.(caption_embedder|timestep_embedder))\."
)

Tensors = dict[str, torch.Tensor]


def converted(model: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the tensors under the names of our transformer. Raises ModelCardError for a file of another model."""
    known: Tensors = {}
    others: Tensors = {}
    for given, tensor in tensors.items():
        name = next((given.removeprefix(prefix) for prefix in PREFIXES if given.startswith(prefix)), given)
        if name in UNUSED:
            continue
        for pattern, plain in RENAMED:
            name = re.sub(pattern, plain, name)
        if not STOCK.match(name):
            others[name] = tensor
        elif name.endswith(".qkv.weight"):
            known |= _split(name, tensor)
        else:
            known[name] = tensor
    return known | _pooled(model, others)


def shape_of(model: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what NewBieTransformer is built with: sizes from `converted` tensors, what they do not show from config.json.

    Raises ModelCardError where a tensor that tells a size is not there.
    """
    try:
        hidden, patches = tensors["x_embedder.weight"].shape
        head = tensors["layers.0.attn.norm_q.weight"].shape[0]
        keys = tensors["layers.0.attn.to_k.weight"].shape[0]
        caption = tensors["time_caption_embed.caption_embedder.1.weight"].shape[1]
        pooled = tensors["clip_text_pooled_proj.1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as exc:
        raise ModelCardError(
            f"model {model}: its denoiser is not NewBie's: {exc} is not among its tensors; name another file, or mend the card"
        ) from exc
    patch = int(config.get("patch_size") or 2)
    axes = config.get("axes_dim_rope") or config.get("axes_dims") or (head // 3,) * 3
    return {
        "patch_size": patch,
        "in_channels": patches // patch**2,
        "hidden_size": hidden,
        "num_layers": _count(tensors, "layers"),
        "num_refiner_layers": _count(tensors, "noise_refiner"),
        "num_attention_heads": hidden // head,
        "num_kv_heads": keys // head,
        "multiple_of": int(config.get("multiple_of") or 256),
        "ffn_dim_multiplier": config.get("ffn_dim_multiplier"),
        "norm_eps": float(config.get("norm_eps") or 1e-5),
        "axes_dim_rope": tuple(axes),
        "cap_feat_dim": caption,
        "pooled_dim": pooled,
    }


def _count(tensors: Mapping[str, torch.Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(f"{blocks}.")})


def _split(name: str, fused: torch.Tensor) -> Tensors:
    """Queries have as many rows as the model has features; keys and values share the rest."""
    queries = fused.shape[1]
    others = (fused.shape[0] - queries) // 2
    parts = fused.split([queries, others, others])
    return {name.replace("qkv", f"to_{letter}"): part for letter, part in zip("qkv", parts, strict=True)}


def _pooled(model: str, others: Mapping[str, torch.Tensor]) -> Tensors:
    """Name the tensors of the pooled input: a norm of n, a matrix of n x n, and a wider one, the latter two with a bias."""
    owners: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in others.items():
        owner, _, kind = name.rpartition(".")
        owners.setdefault(owner, {})[kind] = tensor
    found: Tensors = {}
    for members in owners.values():
        shape = tuple(members["weight"].shape) if "weight" in members else ()
        if len(shape) not in (1, 2):
            continue
        place = 0 if len(shape) == 1 else 1 if len(set(shape)) == 1 else 2
        found |= {f"{POOLED[place]}.{kind}": tensor for kind, tensor in members.items()}
    if found.keys() != POOLED_TENSORS or len(others) != len(POOLED_TENSORS):
        names = ", ".join(sorted(others)[:6]) or "none"
        raise ModelCardError(
            f"model {model}: its denoiser is not NewBie's: beside Lumina2's tensors it has {len(others)} ({names}) in place of "
            f"the five of a pooled input; name another file, or mend the card"
        )
    return found
