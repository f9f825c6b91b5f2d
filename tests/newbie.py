"""A tiny NewBie with random weights, some 200 kB, in both of its published layouts."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from farm.modelcard import ModelCard
from tests.drawing import WORDS, card

HIDDEN, CAPTION, POOLED, LAYERS = 24, 16, 16, 2
RANK, ALPHA = 2, 4
JINA = {
    "vocab_size": 40,
    "hidden_size": POOLED,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def newbie_card(folder: Path, **changes: Any) -> ModelCard:
    """A card for the tiny model."""
    return card(folder, **{"name": "newbie", "family": "newbie"} | changes)


def write_tiny_newbie(
    folder: Path, layout: Literal["diffusers", "original"] = "diffusers", *, seed: int = 0, wide: bool = False
) -> Path:
    """Write the model; the same weights for either layout. `wide`: Gemma's layers are of whole blocks of 64."""
    ours = layout == "original"
    torch.manual_seed(seed)
    tensors = denoiser_tensors(64 if wide else CAPTION)
    config: dict[str, Any] = {"_class_name": "Lumina2Transformer2DModel", "axes_dim_rope": [4, 4, 4], "patch_size": 2}
    if ours:
        tensors = as_published(tensors)
        config = {"model_type": "nextdit_clip", "axes_dims": [4, 4, 4], "patch_size": 2, "dim": HIDDEN}
    write(folder / "transformer", "diffusion_pytorch_model.safetensors", tensors, config)
    _write_gemma(folder / "text_encoder", wide=wide)
    _write_words(folder / ("text_encoder" if ours else "tokenizer"), bos=True)
    jina = "clip_model" if ours else "text_encoder_2"
    write(folder / jina, "model.safetensors", jina_tensors(), jina_config())
    _write_words(folder / (jina if ours else "tokenizer_2"), bos=True)
    _write_vae(folder / "vae")
    return folder


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write a part: one file of weights and its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def denoiser_tensors(caption: int = CAPTION) -> dict[str, torch.Tensor]:
    """Random weights of the denoiser under diffusers' names. `caption`: features of a token's states."""
    from farm.models.newbie_transformer import NewBieTransformer

    model = NewBieTransformer(
        in_channels=4,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        axes_dim_rope=(4, 4, 4),
        cap_feat_dim=caption,
        pooled_dim=POOLED,
    )
    return {name: torch.randn_like(tensor) * 0.2 for name, tensor in model.state_dict().items()}


def as_published(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name and fuse a denoiser's tensors as its authors have them."""
    plain = dict(tensors)
    for name in [name for name in plain if name.endswith(".attn.to_q.weight")]:
        block = name.removesuffix(".attn.to_q.weight")
        parts = [plain.pop(f"{block}.attn.to_{letter}.weight") for letter in "qkv"]
        plain[f"{block}.attention.qkv.weight"] = torch.cat(parts)
    names = (
        ("time_caption_embed.caption_embedder", "cap_embedder"),
        ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.linear"),
        (".norm1.linear.", ".adaLN_modulation.1."),
        (".norm1.norm.", ".attention_norm1."),
        (".norm1.", ".attention_norm1."),
        (".norm2.", ".attention_norm2."),
        (".attn.to_out.0.", ".attention.out."),
        (".attn.norm_q.", ".attention.q_norm."),
        (".attn.norm_k.", ".attention.k_norm."),
        (".linear_", ".w"),
    )
    published = {"norm_final.weight": torch.ones(HIDDEN)}
    for name, tensor in plain.items():
        for given, theirs in names:
            name = name.replace(given, theirs)
        published[name] = tensor
    return published


def jina_config() -> dict[str, Any]:
    """The settings of a Jina CLIP v2."""
    sizes = JINA | {"lora_adaptations": ["retrieval.query"], "lora_rank": RANK, "lora_alpha": ALPHA}
    text = {"default_lora_task": "retrieval.query", "pooler_type": "mean_pooler", "hf_model_config_kwargs": sizes}
    code = {"AutoConfig": "jinaai/jina-clip-implementation--configuration_clip.JinaCLIPConfig"}
    return {"model_type": "jina_clip", "auto_map": code, "add_projections": False, "text_config": text}


def jina_tensors() -> dict[str, torch.Tensor]:
    """Random weights of a Jina CLIP v2, eyes and adapter with it, under the names of its checkpoint."""
    width, inner = POOLED, 24
    root = "text_model.transformer.roberta."
    tensors = {"logit_scale": torch.ones(()), "vision_model.head.weight": torch.randn(3, 3)}

    def adapted(name: str, rows: int, columns: int, *, embedding: bool = False) -> None:
        a, b = ((rows, RANK), (RANK, columns)) if embedding else ((RANK, columns), (rows, RANK))
        tensors[f"{root}{name}.parametrizations.weight.original"] = torch.randn(rows, columns) * 0.3
        tensors[f"{root}{name}.parametrizations.weight.0.lora_A"] = torch.randn(1, *a) * 0.3
        tensors[f"{root}{name}.parametrizations.weight.0.lora_B"] = torch.randn(1, *b) * 0.3
        if not embedding:
            tensors[f"{root}{name}.bias"] = torch.randn(rows) * 0.1

    def norm(name: str) -> None:
        tensors[f"{root}{name}.weight"] = 1 + torch.randn(width) * 0.1
        tensors[f"{root}{name}.bias"] = torch.randn(width) * 0.1

    adapted("embeddings.word_embeddings", 40, width, embedding=True)
    adapted("embeddings.token_type_embeddings", 1, width, embedding=True)
    norm("emb_ln")
    for layer in range(2):
        block = f"encoder.layers.{layer}"
        adapted(f"{block}.mixer.Wqkv", 3 * width, width)
        adapted(f"{block}.mixer.out_proj", width, width)
        norm(f"{block}.norm1")
        adapted(f"{block}.mlp.fc1", inner, width)
        adapted(f"{block}.mlp.fc2", width, inner)
        norm(f"{block}.norm2")
    return tensors


def _write_gemma(folder: Path, *, wide: bool) -> None:
    from transformers import Gemma3Config, Gemma3Model

    text = {
        "vocab_size": 40,
        "hidden_size": CAPTION,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
    }
    if wide:
        text |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "query_pre_attn_scalar": 32}
    eyes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    Gemma3Model(Gemma3Config(text_config=text, vision_config=eyes)).save_pretrained(folder)


def _write_words(folder: Path, *, bos: bool) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "<s>", "</s>", *WORDS, "<Prompt", "Start>"])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", model_max_length=512
    ).save_pretrained(folder)


def _write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).save_pretrained(folder)
