"""What tests of engine, output and shard share: cards, plans, a family without torch, a tiny Z-Image."""

import threading
from collections.abc import Callable, Hashable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from farm.cardparts import SizeLimits, Source
from farm.engine import Engine
from farm.ledger import Ledger
from farm.manifest import Manifest, Output
from farm.modelcard import ModelCard, ParamOverrides, RenderParams
from farm.models.family import Decoded, Embedding, StepCallback, Tokens, Within
from farm.plan import ImageSpec, Numerics, Plan, PromptTable, SeedRule
from farm.storage.local import LocalStore
from farm.sweep import Template
from farm.versions import PACKAGES

VERSIONS = {package: version(package) for package in PACKAGES}


def card(path: Path | str = "package:farm.sketch/weights", **changes: Any) -> ModelCard:
    """A card for 64x64 pictures on the CPU in fp32."""
    fields: dict[str, Any] = {
        "name": "sketch",
        "title": "Tiny",
        "family": "z-image",
        "source": Source(path=str(path)),
        "licence": "Apache-2.0",
        "dtypes": {"cpu": ("float32",)},
        "batch": {"cpu": 4},
        "defaults": RenderParams(width=64, height=64, num_inference_steps=3, guidance_scale=2.0),
        "limits": SizeLimits(min_px=32, max_px=256, max_pixels=65536),
        "max_sequence_length": 64,
    }
    return ModelCard(**fields | changes)


def numerics(**changes: Any) -> Numerics:
    """The numerics of a plan made on this machine."""
    fields: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch": 4, "threads": 1, "versions": VERSIONS}
    return Numerics(**fields | changes)


def spec(index: int, prompt: str = "a red circle", **changes: Any) -> ImageSpec:
    """One image at the card's defaults; `changes` are those of RenderParams, or seed and key."""
    seed, key = changes.pop("seed", 1000 + index), changes.pop("key", None)
    params = card().defaults.model_copy(update=changes)
    return ImageSpec(index=index, row=index, key=key, prompt=prompt, seed=seed, params=params, carry={})


def plan(prompts: Sequence[str], *, shard_images: int = 8, output: Output | None = None, **changes: Any) -> Plan:
    """A plan of one image a prompt. `changes` are those of the numerics."""
    output = output or Output()
    return Plan.build(
        run="0a1b2c3d",
        created_at="2026-01-01T00:00:00+00:00",
        manifest=Manifest(name="test", model="sketch", prompts=tuple(prompts), output=output),
        card=card(),
        prompts=PromptTable(
            rows=len(prompts),
            parts=0,
            keyed=False,
            digest="0" * 64,
            template=Template(text="{prompt}", vary={"prompt": tuple(prompts)}),
        ),
        seeds=SeedRule(rule="slot", count=1, root=7),
        sweep=(ParamOverrides(),),
        params=card().defaults,
        numerics=numerics(**changes),
        shard_images=shard_images,
    )


def ledger(folder: Path) -> Ledger:
    """A ledger over a folder."""
    return Ledger(LocalStore(folder))


class FakeFamily:
    """Draws noise without torch. `trouble` is called with each batch before it is denoised, and may raise.

    A prompt of "nan" comes out as no numbers, one of "black" as black.
    """

    encodes_ahead = False
    within: Within = "anything"

    def __init__(self, trouble: Callable[[Sequence[ImageSpec]], None] = lambda specs: None):
        self.trouble = trouble
        self.encoded: list[Tokens] = []
        self.denoised: list[tuple[int, ...]] = []
        self.recovered = 0
        self.loaded = False
        self.takes: dict[str, int] = {}
        self.working_bytes: dict[str, int] = {}

    def inside(self) -> "FakeFamily":
        return self

    def place(self) -> None:
        pass

    def load(self) -> None:
        self.loaded = True

    host_bytes = 1

    def park(self) -> bool:
        self.loaded = False
        return True

    def unload(self) -> None:
        self.loaded = False

    def tokenize(self, prompt: str) -> Tokens:
        return Tokens(tuple(prompt.encode("utf-8", "surrogatepass")))

    def guided(self, params: RenderParams) -> bool:
        return params.guidance_scale > 0

    def bucket(self, positive: Tokens, negative: Tokens | None) -> Hashable:
        return len(positive.ids) // 32

    def encode(self, tokens: Tokens) -> Embedding:
        self.encoded.append(tokens)
        return Embedding(tokens, 1000)

    def noise(self, specs: Sequence[ImageSpec]) -> Any:
        return None

    def denoise(
        self,
        specs: Sequence[ImageSpec],
        noise: Any,
        *,
        positive: Sequence[Embedding],
        negative: Sequence[Embedding],
        on_step: StepCallback,
    ) -> Any:
        self.denoised.append(tuple(image.index for image in specs))
        self.trouble(specs)
        steps = specs[0].params.num_inference_steps
        for step in range(steps):
            on_step(step + 1, steps)
        return list(specs)

    def decode(self, latents: Any, spec: ImageSpec) -> Decoded:
        pictures = []
        for image in latents:
            shape = (image.params.height, image.params.width, 3)
            drawn = np.random.default_rng(image.seed).integers(0, 256, shape, dtype=np.uint8)
            pictures.append(np.zeros(shape, np.uint8) if image.prompt == "black" else drawn)
        return Decoded(tuple(pictures), tuple(image.prompt != "nan" for image in latents))

    def watch_memory(self) -> None:
        self.working_bytes = dict(self.takes)

    def synchronize(self) -> None:
        pass

    def recover(self) -> None:
        self.recovered += 1


def engine(family: Any, **changes: Any) -> Engine:
    """An engine around a family of the test's own."""
    return Engine(card(), numerics(**changes), "cpu", 16.0, family=family)


def on_device() -> threading.Lock:
    """A device that nobody uses."""
    return threading.Lock()


WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "on", "white", "black", "background", "the", "and"]


def write_tiny_zimage(folder: Path, *, wide: bool = False) -> Path:
    """Write a Z-Image model with random weights, some 100 kB, in diffusers' folder layout. `wide`: 10 MB, its layers are of whole
    blocks of 64, but for the first of the denoiser."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    width = 64 if wide else 32
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", padding_side="right", model_max_length=512
    )
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} </s>{% endfor %}"
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.9,
            shift_factor=0.05,
        ),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(ids),
                hidden_size=width,
                intermediate_size=128 if wide else 48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=width // 2,
                max_position_embeddings=512,
                use_cache=False,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
            )
        ),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=192 if wide else 32,  # a block's inner width is 8/3 of it
            n_layers=2,
            n_refiner_layers=1,
            n_heads=12 if wide else 2,
            n_kv_heads=12 if wide else 2,
            cap_feat_dim=width,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        ),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
