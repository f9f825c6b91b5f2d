"""Models at full size with random weights, for memory and speed where nothing can be downloaded.

The real classes with the published settings, in the folders that a download has, written shard by shard so that a few GiB of
host memory do. Weights are noise of one over the root of a layer's inputs, so that what goes through stays finite; a picture
of it means nothing. A GGUF denoiser is made of random blocks, Q4_K and so many Q6_K that it is as large as a Q4_K_M, and is
dequantised by the same operations; nothing is quantised for it. Tokenizers know the words of `prompts` and no others. A part
that was written is kept. `tiny`: the same in a second, for a machine without a GPU.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from farm.cardparts import Denoiser, SizeLimits, Source
from farm.errors import FarmError
from farm.modelcard import ModelCard
from farm.models.newbie_transformer import NewBieTransformer
from farm.needs import Q4_BITS

SHARD_BYTES = 2 * 2**30
GGUF_FILE = "denoiser.gguf"
Q4_K, Q6_K = (256, 144), (256, 210)
"""Weights and bytes of a block."""
WRITTEN = "written.json"
"""Beside a part's weights once all of it is there."""

WORDS = (
    "red blue green white black golden silver small large old quiet bright circle square star tree river tower lantern garden",
    "bridge cat owl fox painter sailor window market winter morning harbour forest mountain paper glass",
)
SUBJECTS = [word for line in WORDS for word in line.split()]
OTHERS = (
    "a the of on in and beside under with , . picture showing scene number",
    "system user assistant Describe image by detailing color shape size texture quantity text spatial relationships objects",
    "background",
)
"""What prompts are joined with, and what stands in Qwen's template."""
NUMBERS = [str(number) for number in range(256)]
SPECIAL = ["<|endoftext|>", "[UNK]", "<|im_start|>", "<|im_end|>"]
PROMPT_WORDS = 48

Shapes = Mapping[str, tuple[int, ...]]
Block = tuple[int, int]
Size = Literal["full", "tiny"]


@dataclass(frozen=True, slots=True)
class Giant:
    """A model that was written: the card that renders it, and what its denoiser is."""

    card: ModelCard
    denoiser: str


def prompts(count: int, *, first: int = 0) -> list[str]:
    """Return prompts of one length, each another; `first` starts them elsewhere, so that none was encoded before."""
    made = []
    for number in range(first, first + count):
        words = [SUBJECTS[(number * 7 + place * (3 + number % 5)) % len(SUBJECTS)] for place in range(PROMPT_WORDS - 6)]
        made.append(
            " ".join(["picture", "number", NUMBERS[number % 256], NUMBERS[number // 256], "showing", "a", *words])
        )
    return made


def write_giant(card: ModelCard, folder: Path, *, tiny: bool, device: str, say: Callable[[str], None]) -> Giant:
    """Write what is not there yet of a card's model below `folder`. `device`: where noise is drawn, a GPU is quicker.

    Raises FarmError for a family that has no giant.
    """
    size: Size = "tiny" if tiny else "full"
    parts: dict[str, Callable[[_Writer], None]] = {}
    if card.family == "z-image":
        parts = _zimage(size)
    elif card.family == "qwen-image":
        parts = _qwen(size)
    elif card.family == "newbie":
        parts = _newbie(size)
    else:
        raise FarmError(f"model {card.name} is of the family {card.family}, which has no random weights at full size")
    where = folder / f"{card.name}-{size}"
    for part, write in parts.items():
        target, made_as = where / part, {"size": size}
        if (target / WRITTEN).is_file() and json.loads((target / WRITTEN).read_text()) == made_as:
            continue
        say(f"writing {target}")
        target.mkdir(parents=True, exist_ok=True)
        write(_Writer(target, torch.float32 if tiny else torch.bfloat16, torch.device(device)))
        (target / WRITTEN).write_text(json.dumps(made_as))
    gguf = card.family == "qwen-image"
    changes: dict[str, Any] = {
        "source": Source(path=str(where)),
        "denoiser": Denoiser(path=str(where / "transformer"), file=GGUF_FILE, format="gguf") if gguf else None,
    }
    if tiny:
        changes |= {
            "limits": SizeLimits(min_px=32, max_px=256, max_pixels=65536),
            "dtypes": {"cpu": ("float32",), "cuda": ("float32",)},
            "quantise": {},
        }
    return Giant(card.model_copy(update=changes), "GGUF of Q4_K and Q6_K" if gguf else "as written")


def unquantised(giant: Giant, *, say: Callable[[str], None]) -> ModelCard:
    """Write the denoiser of a giant that has a GGUF file in bfloat16 too, and return a card of it; the other parts are the same
    files. Its GGUF file goes, since both seldom fit one disk."""
    where = Path(str(giant.card.source.path)).resolve()
    whole = whole_folder(where)
    whole.mkdir(exist_ok=True)
    for part in where.iterdir():
        if part.name != "transformer" and not (whole / part.name).exists():
            (whole / part.name).symlink_to(part)
    target = whole / "transformer"
    if not (target / WRITTEN).is_file():
        shutil.rmtree(where / "transformer")
        say(f"writing {target}")
        target.mkdir(exist_ok=True)
        size: Size = "tiny" if where.name.endswith("-tiny") else "full"
        writer = _Writer(target, torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        writer.module(_qwen_denoiser(size), stem="diffusion_pytorch_model")
        (target / WRITTEN).write_text(json.dumps({"size": size}))
    return giant.card.model_copy(update={"source": Source(path=str(whole)), "denoiser": None})


def whole_folder(where: Path) -> Path:
    """Where a giant's unquantised twin lies."""
    return where.with_name(f"{where.name}-whole")


class _Writer:
    """Writes one part: weights by their names and shapes, in shards, and its settings."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device):
        self.folder = folder
        self.norms = 1.0
        self._dtype = dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def module(self, make: Callable[[], Any], *, stem: str) -> None:
        """Write a module of diffusers or transformers, which is only made on torch's meta device."""
        with torch.device("meta"):
            made = make()
        self.weights({name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}, stem=stem)
        save = getattr(made, "save_config", None) or made.config.save_pretrained
        save(self.folder)

    def weights(self, shapes: Shapes, *, stem: str) -> None:
        """Write tensors in as many files as they fill, with an index where there is more than one."""
        shards = list(_shards(shapes, self._dtype.itemsize))
        index: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
            tensors = {name: self.drawn(name, shapes[name]) for name in names}
            save_file(tensors, self.folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        if len(shards) > 1:
            written = {"metadata": {}, "weight_map": index}
            (self.folder / f"{stem}.safetensors.index.json").write_text(json.dumps(written))

    def drawn(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Norms weigh `norms`, biases nothing, matrices and kernels what keeps a sum of their inputs near one."""
        if name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
            return torch.full(shape, self.norms, dtype=self._dtype)
        if len(shape) < 2:
            return torch.zeros(shape, dtype=self._dtype)
        deviation = _deviation(shape)
        noise = torch.randn(shape, generator=self._generator, device=self._generator.device, dtype=self._dtype)
        return noise.mul_(deviation).cpu()

    def json(self, name: str, value: Any) -> None:
        """Write settings by themselves."""
        (self.folder / name).write_text(json.dumps(value))

    def gguf(self, make: Callable[[], Any]) -> None:
        """Write a denoiser as a GGUF file, and its settings. Matrices whose rows are no whole blocks are F32, as biases are."""
        from gguf import GGMLQuantizationType, GGUFWriter

        with torch.device("meta"):
            made = make()
        made.save_config(self.folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        kinds = _kinds(shapes)
        writer = GGUFWriter(self.folder / GGUF_FILE, "qwen_image")
        for name, shape in shapes.items():
            block = kinds[name]
            if block is None:
                writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
            else:
                kind = GGMLQuantizationType.Q4_K if block == Q4_K else GGMLQuantizationType.Q6_K
                stored = (shape[0], shape[1] // block[0] * block[1])
                writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        self.fill(writer, shapes, kinds)
        writer.close()

    def fill(self, writer: Any, shapes: Shapes, kinds: Mapping[str, Block | None]) -> None:
        """Write the weights of a GGUF file whose heads are written, a tensor at a time."""
        draw = np.random.default_rng(0)
        for name, shape in shapes.items():
            block = kinds[name]
            writer.write_tensor_data(
                self.drawn(name, shape).float().numpy() if block is None else _blocks(draw, shape, block)
            )


def _deviation(shape: tuple[int, ...]) -> float:
    return 1 / math.sqrt(math.prod(shape[1:]))


def _shards(shapes: Shapes, itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * itemsize
        if names and filled + nbytes > SHARD_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += nbytes
    yield names


def _kinds(shapes: Shapes) -> dict[str, Block | None]:
    """Which matrices are Q4_K and which Q6_K, so that together they take the bits of a Q4_K_M; None: neither."""
    kinds: dict[str, Block | None] = {}
    weights, nbytes = 0, 0.0
    for name, shape in shapes.items():
        block = None
        if len(shape) == 2 and shape[1] % Q4_K[0] == 0:
            block = Q6_K if nbytes * 8 < weights * Q4_BITS else Q4_K
            weights += math.prod(shape)
            nbytes += math.prod(shape) / block[0] * block[1]
        kinds[name] = block
    return kinds


def _blocks(draw: np.random.Generator, shape: tuple[int, ...], block: Block) -> np.ndarray:
    """Blocks of random weights around zero, in GGML's layouts; all scales are alike, so that their spread is known."""
    rows, count = shape[0], shape[1] // block[0]
    made = np.frombuffer(draw.bytes(rows * count * block[1]), np.uint8).reshape(rows * count, block[1]).copy()
    deviation = _deviation(shape)
    if block == Q4_K:  # d, dmin: two halves; 12 bytes of 6-bit scales and minima; 128 of weights. d * 32 * (q - 7.5)
        step = deviation / (32 * 16 / 12**0.5)
        made[:, :4] = np.array([step, 7.5 * step], np.float16).view(np.uint8)
        made[:, 4:16] = [160] * 8 + [0] * 4  # both 32, their upper two bits in the first eight bytes
    else:  # 192 bytes of weights, 16 scales, d: a half. d * 8 * (q - 32)
        made[:, 192:208] = 8
        made[:, 208:] = np.array([deviation / (8 * 64 / 12**0.5)], np.float16).view(np.uint8)
    return made.reshape(rows, count * block[1])


def _zimage(size: Size) -> dict[str, Callable[[_Writer], None]]:
    from diffusers import ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tiny: dict[str, Any] = {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
    }
    tiny |= {"cap_feat_dim": 32, "axes_dims": [4, 6, 6], "axes_lens": [1024, 64, 64]}
    shape = tiny if size == "tiny" else {}
    reader: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "pad_token_id": 0,
    }
    if size == "tiny":
        reader |= {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        reader |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}
    return {
        "tokenizer": lambda to: _tokenizer(to.folder, chat=True),
        "text_encoder": lambda to: to.module(lambda: Qwen3Model(Qwen3Config(**reader)), stem="model"),
        "transformer": lambda to: to.module(lambda: ZImageTransformer2DModel(**shape), stem="diffusion_pytorch_model"),
        "vae": lambda to: to.module(lambda: _flux_vae(size), stem="diffusion_pytorch_model"),
        "scheduler": lambda to: _scheduler(to.folder, shift=3.0),
    }


def _qwen(size: Size) -> dict[str, Callable[[_Writer], None]]:
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words: dict[str, Any] = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    eyes: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    eyes |= {"out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}
    vae: dict[str, Any] = {}
    if size == "tiny":
        words |= {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        words |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
        words["rope_parameters"] = words["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        eyes |= {"fullatt_block_indexes": [0]}
        vae = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
        vae |= {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.5, 2.0, 0.7, 1.1]}
    return {
        "tokenizer": lambda to: _tokenizer(to.folder),
        "text_encoder": lambda to: to.module(
            lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=eyes)),
            stem="model",
        ),
        "transformer": lambda to: to.gguf(_qwen_denoiser(size)),
        "vae": lambda to: to.module(lambda: AutoencoderKLQwenImage(**vae), stem="diffusion_pytorch_model"),
        "scheduler": lambda to: _scheduler(
            to.folder,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
    }


def _qwen_denoiser(size: Size) -> Callable[[], Any]:
    """Tiny: rows of 256, so that a GGUF file has whole blocks, and two layers, a first and a last."""
    from diffusers import QwenImageTransformer2DModel

    shape: dict[str, Any] = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2}
    shape |= {"joint_attention_dim": 32}
    return lambda: QwenImageTransformer2DModel(**(shape if size == "tiny" else {}))


def write_gemma(to: _Writer, shape: Mapping[str, Any]) -> None:
    """Write a text encoder of NewBie."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    to.norms = 0.0  # it adds one
    to.module(lambda: Gemma3TextModel(Gemma3TextConfig(**shape)), stem="model")


def _newbie(size: Size) -> dict[str, Callable[[_Writer], None]]:
    shape: dict[str, Any] = {}
    reader: dict[str, Any] = {
        "vocab_size": 262208,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
    }
    jina: dict[str, Any] = {
        "vocab_size": 250002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 8194,
        "pad_token_id": 1,
    }
    if size == "tiny":
        shape = {"in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1}
        shape |= {"axes_dim_rope": (4, 4, 4), "cap_feat_dim": 16, "pooled_dim": 16}
        reader |= {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
        reader |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16}
        reader |= {"query_pre_attn_scalar": 8, "max_position_embeddings": 512}
        jina |= {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        jina |= {"intermediate_size": 24, "max_position_embeddings": 512, "pad_token_id": 0}

    def write_jina(to: _Writer) -> None:
        to.weights(dict(_jina_shapes(jina)), stem="model")
        to.json(
            "config.json",
            {
                "model_type": "jina_clip",
                "add_projections": False,
                "text_config": {"pooler_type": "mean_pooler", "hf_model_config_kwargs": jina},
            },
        )

    return {
        "tokenizer": lambda to: _tokenizer(to.folder, begins=True),
        "tokenizer_2": lambda to: _tokenizer(to.folder, begins=True),
        "text_encoder": lambda to: write_gemma(to, reader),
        "text_encoder_2": write_jina,
        "transformer": lambda to: to.module(lambda: NewBieTransformer(**shape), stem="diffusion_pytorch_model"),
        "vae": lambda to: to.module(lambda: _flux_vae(size), stem="diffusion_pytorch_model"),
    }


def _jina_shapes(sizes: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The text tower of a Jina CLIP v2, by the names of its checkpoint; its adapter is merged already."""
    width, inner, root = sizes["hidden_size"], sizes["intermediate_size"], "text_model.transformer.roberta."

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{root}{name}.weight", (width,)
        yield f"{root}{name}.bias", (width,)

    yield f"{root}embeddings.word_embeddings.weight", (sizes["vocab_size"], width)
    yield f"{root}embeddings.token_type_embeddings.weight", (1, width)
    yield from norm("emb_ln")
    for layer in range(sizes["num_hidden_layers"]):
        block = f"encoder.layers.{layer}"
        for name, rows, columns in (
            ("mixer.Wqkv", 3 * width, width),
            ("mixer.out_proj", width, width),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ):
            yield f"{root}{block}.{name}.weight", (rows, columns)
            yield f"{root}{block}.{name}.bias", (rows,)
        yield from norm(f"{block}.norm1")
        yield from norm(f"{block}.norm2")


def _flux_vae(size: Size) -> nn.Module:
    from diffusers import AutoencoderKL

    widths = (8, 8, 8) if size == "tiny" else (128, 256, 512, 512)
    vae: nn.Module = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if size == "tiny" else 2,
        latent_channels=4 if size == "tiny" else 16,
        norm_num_groups=2 if size == "tiny" else 32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    return vae


def _scheduler(folder: Path, **options: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(**options).save_pretrained(folder)


def _tokenizer(folder: Path, *, chat: bool = False, begins: bool = False) -> None:
    """`chat`: with a chat template; `begins`: every text begins with a token of its own, an empty one too."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = dict.fromkeys([*SPECIAL, "\n", ":", *SUBJECTS, *" ".join(OTHERS).split(), *NUMBERS])
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    words.add_special_tokens(SPECIAL)
    if begins:
        words.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[2]} $A", special_tokens=[(SPECIAL[2], SPECIAL.index(SPECIAL[2]))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=SPECIAL[0],
        unk_token="[UNK]",
        padding_side="right",
        model_max_length=2048,
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<|im_start|> {{ m['content'] }} <|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
