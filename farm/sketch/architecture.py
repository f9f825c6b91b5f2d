"""Build the parts of `sketch` other than the autoencoder, and put the trained parts into one folder.

Owns sizes and the tokenizer. Every part is the library's own class, so the folder loads as any Z-Image model does.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from farm.sketch.language import RULES, WORDS, words

PAD, UNKNOWN, START, END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
_SPECIAL = (PAD, UNKNOWN, START, END)
_IDS = {word: index for index, word in enumerate((*_SPECIAL, *WORDS))}
_WIDTH = 128
LONGEST_PROMPT = 64
# The start and the end of a message stand around every prompt, so that even an empty one has tokens.
_TEMPLATE = "{% for m in messages %}" + START + "{{ m['content'] }}" + END + "{% endfor %}"


def token_ids(prompt: str) -> list[int]:
    """The ids of a prompt as the pipeline would give them, the template included."""
    return [_IDS[START], *(_IDS.get(word, _IDS[UNKNOWN]) for word in words(prompt)), _IDS[END]][:LONGEST_PROMPT]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that reduces a prompt by the rules of `farm.sketch.language`."""
    tokenizer = Tokenizer(models.WordLevel(_IDS, unk_token=UNKNOWN))
    rules = [normalizers.Replace(Regex(pattern), replacement) for pattern, replacement in RULES]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *rules])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        padding_side="right",
        model_max_length=512,
    )
    wrapped.chat_template = _TEMPLATE
    return wrapped


def build_text_encoder() -> Qwen3Model:
    """An untrained text encoder of two layers, of which the pipeline reads the first one's output."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(_IDS),
            hidden_size=_WIDTH,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=_IDS[PAD],
            bos_token_id=_IDS[START],
            eos_token_id=_IDS[END],
        )
    )


def build_transformer(latent_channels: int) -> ZImageTransformer2DModel:
    """An untrained transformer over 8x8 patches of 2x2 latents."""
    return ZImageTransformer2DModel(
        in_channels=latent_channels,
        dim=_WIDTH,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler's schedule; a shift of 3 spends most steps where the layout and the shapes are decided."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def export(
    folder: Path, *, vae: AutoencoderKL, transformer: ZImageTransformer2DModel, text_encoder: Qwen3Model
) -> None:
    """Write a pipeline in diffusers' layout, in bfloat16."""
    pipeline = ZImagePipeline(
        scheduler=build_scheduler(),
        vae=vae.to(torch.bfloat16),
        text_encoder=text_encoder.to(torch.bfloat16),
        tokenizer=build_tokenizer(),
        transformer=transformer.to(torch.bfloat16),
    )
    pipeline.vae.register_to_config(_name_or_path="")  # else the folder that it was trained in is written down
    pipeline.save_pretrained(folder, safe_serialization=True)
    # The libraries write weights readable by their owner alone, which an installed package cannot use.
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
    # Transformers 5 names the tokenizer's class by a name that version 4 does not know.
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
