"""Two models that no family of the farm knows, with random weights: one with a UNet, one with a transformer."""

from pathlib import Path
from typing import Any

from tests.drawing import WORDS


def write_tiny_stable_diffusion(folder: Path) -> Path:
    """Write a Stable Diffusion in diffusers' folder layout; its scheduler knows no flow matching."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer=_tokenizer(16),
        unet=UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=2,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def write_tiny_lumina(folder: Path) -> Path:
    """Write a Lumina Image 2 in diffusers' folder layout."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(0)
    pipeline = Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            cap_feat_dim=16,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 64, 64),
        ),
        vae=_vae(),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer=_tokenizer(256),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        shift_factor=0.1,
    )


def _tokenizer(length: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="</s>",
        padding_side="right",
        model_max_length=length,
    )
