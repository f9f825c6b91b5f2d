"""A Qwen-Image model with random weights, small enough to write in a test."""

from pathlib import Path
from typing import Any

WORDS = """
system Describe the image by detailing color shape size texture quantity text spatial relationships of objects and background
user assistant a red blue green circle square star on white black
"""
TEMPLATE_TOKENS = ["\n", ",", ":"]


def write_tiny_qwen(folder: Path, *, wide: bool = False) -> Path:
    """Write a Qwen-Image model, some 1 MB, in diffusers' folder layout.

    As the real one's, its template has 34 tokens before a prompt, and its noise levels shift with the picture's size. `wide`: its
    layers are of whole blocks of 64, but for the first of the denoiser.
    """
    import torch
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    width, sections = (64, [4, 6, 6]) if wide else (32, [2, 3, 3])
    special = ["<|endoftext|>", "[UNK]", "<|im_start|>", "<|im_end|>"]
    ids = {word: i for i, word in enumerate([*special, *TEMPLATE_TOKENS, *WORDS.split()])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    words.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=special[0], unk_token="[UNK]", padding_side="right", model_max_length=2048
    )
    reader = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(ids),
                "hidden_size": width,
                "intermediate_size": 128 if wide else 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
                "bos_token_id": 0,
                "eos_token_id": 0,
                "pad_token_id": 0,
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": width,
                "fullatt_block_indexes": [0],
            },
        )
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=tiny_vae(),
        text_encoder=reader,
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=width // 2,
            num_attention_heads=2,
            joint_attention_dim=width,
            axes_dims_rope=(8, 12, 12) if wide else (4, 6, 6),
        ),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_vae() -> Any:
    """Qwen-Image's VAE with four latent channels and no weight that is one or zero by design."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 2.0, 0.7, 1.1],
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "gamma" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return vae.eval()
