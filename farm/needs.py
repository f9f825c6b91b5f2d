"""How much memory a model needs, from its files' headers and measured working sets: no tensor is read, nothing is loaded.

Says how large each part is in the plan's dtype or its quantisation, and what a step and a decode take beside it. Where it all
lies is `farm.placement`'s decision. Imports no torch.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farm.errors import ModelCardError
from farm.families import FAMILIES
from farm.modelcard import ModelCard, RenderParams
from farm.placement import ENCODE_GIB, GGUF_STEP_GIB, Needs
from farm.plan import Numerics, drawing_identity
from farm.records import Profile, WorkingMemory
from farm.settings import Settings
from farm.tensorfiles import TensorHead, read_heads, without_copies
from farm.weights import locate_file, locate_source

GIB, MEGAPIXEL = 2**30, 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DECODE_PIXELS = 2**20
"""Pictures are decoded in slices of at most so many pixels, at least one picture: decoding needs the most memory."""

PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "z-image": {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)},
    "qwen-image": {"encoder": ("text_encoder",), "denoiser": ("transformer",), "decoder": ("vae",)},
    "newbie": {"encoder": ("text_encoder", "clip_model"), "denoiser": ("transformer",), "decoder": ("vae",)},
}
"""Family -> part -> folders; those of the family `diffusers` follow from its model_index.json."""
ALSO_CALLED = {"clip_model": "text_encoder_2"}
"""What a folder of the above is called in diffusers' layout, where a model's authors have their own."""
NOT_QUANTISED = {"newbie": ("clip_model", "text_encoder_2")}
"""Family -> folders of its encoder that a card's `quantise` leaves as they are."""
NOT_LOADED = frozenset(
    {
        "lm_head",
        "visual",
        "vision_tower",
        "vision_model",
        "multi_modal_projector",
        "visual_projection",
        "text_projection",
        "spiece_model",
    }
)
"""What the text encoders of the families above have in their files and prompts never use, by a segment of a tensor's name."""
MERGED = frozenset({"lora_A", "lora_B"})
"""Segments of names of what is added to other weights as they load (`farm/models/newbie_text.py`)."""
ENCODING = ("encoder.", "quant_conv.")
"""What Qwen's VAE has for encoding pictures, which is let go of when it is folded (`farm/models/qwen_vae.py`)."""
KEPT_WHOLE = ("embed", "shared", "lm_head", ".wo.")
"""Words in the names of a text encoder's matrices that are no linear layers, or its last one, or that transformers leaves as they
are (the second of T5's feed-forward layers), and are not quantised."""

NF4_BLOCK = 64
"""Weights that share a scale in nf4. A matrix whose rows are no whole blocks is not quantised: it would be slow on a GPU, and on
a CPU bitsandbytes 0.50 takes the wrong scales for it."""
Q4_BITS = 5.13
"""Bits a weight takes in a denoiser of type Q4_K_M: Qwen-Image-2512's 20.4 billion in 12.2 GiB."""


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """GiB in bfloat16 per megapixel (2**20 pixels) of one picture; linear in the batch.

    `joined`: with guidance both halves go through the denoiser together and take twice as much. `cached`: what a first-block
    cache adds to a step, and keeps between two.
    """

    step: float
    decode: float
    joined: bool
    cached: float = 0.0


WORKING_SETS = {
    "z-image": WorkingSet(step=0.53, decode=1.52, joined=True, cached=0.1),
    "qwen-image": WorkingSet(step=0.40, decode=1.51, joined=False, cached=0.13),
    "newbie": WorkingSet(step=0.68, decode=1.52, joined=True),
    "diffusers": WorkingSet(step=1.0, decode=3.4, joined=True),
}
"""Measured with the real classes at full size on fake tensors, the larger of 512x512, 1024x1024 and a batch of 8 per megapixel.

Steps: Z-Image 0.13 and 0.48, 1.05 for 8 at 512x512; Qwen-Image 0.10 and 0.37; NewBie 0.17 and 0.51. Decodes, untiled: FLUX's VAE
0.38, 1.50 and 2.52 at 1328x1328; Qwen's, folded for one frame, 1.51. Other pipelines (`diffusers`): estimates, the
largest of these and more. A first-block cache, by its shapes: three tensors of all tokens, and two of Qwen-Image's other pass.
"""


@dataclass(frozen=True, slots=True)
class Sized:
    """One tensor of a part: its name, its weights, and the bytes that it takes once it is loaded."""

    name: str
    elements: int
    nbytes: float


def needs_of(
    card: ModelCard,
    folder: Path,
    *,
    dtype: str,
    batch: int,
    params: RenderParams | None = None,
    files: Mapping[str, Path] | None = None,
    device: str = "cuda",
    quantise: Mapping[Any, str] | None = None,
    measured: WorkingMemory | None = None,
) -> Needs:
    """Return what a card's model needs. Raises ModelCardError for files that are missing, cut off or of another kind.

    `folder`: the model's. `files`: where the card's own `denoiser` (a file) and `decoder` (a folder) lie, and each adapter's
    file by `adapter:NAME`. Without `params` a decode is counted at the card's limits, and so is a step of several pictures, with
    guidance; a step of one at the card's defaults: an engine is loaded before it sees a plan's sizes. `quantise`: which parts
    are, and how; where nobody says, as the card does, and on a CPU none. `measured`: working sets in place of the estimates.
    """
    if quantise is None:
        quantise = card.quantise if device != "cpu" else {}
    parts = _parts(card, folder, files or {}, dtype=dtype, quantise=quantise)
    takes = FAMILIES[card.family]
    accelerated = card.accelerated_on("cpu" if device == "cpu" else "cuda")
    cached = accelerated.first_block_cache is not None
    whole_blocks = accelerated.compile or cached  # they do not come and go
    gguf = card.denoiser is not None and card.denoiser.format == "gguf"
    drawn = params or card.defaults
    limit = min(card.limits.max_pixels, card.limits.max_px**2)
    at_most = params is None and batch > 1
    pixels = limit if at_most else drawn.width * drawn.height
    guided = at_most or drawn.guidance_scale > 0
    working = measured or _estimated(card, dtype, cached=cached)
    kept = WORKING_SETS[card.family].cached * ITEM_BYTES[dtype] / ITEM_BYTES["bfloat16"] if cached else 0.0
    streamed_gib = None if "denoiser" in quantise else _streamed_gib(parts["denoiser"])
    largest_decode_gib = working.decode_gib * decoded_together(limit, batch) / MEGAPIXEL
    decode_gib = working.decode_gib * decoded_together(pixels, batch) / MEGAPIXEL
    gguf_gib = GGUF_STEP_GIB if gguf and measured is None else 0.0
    return Needs(
        encoder_gib=_gib(parts["encoder"]),
        denoiser_gib=_gib(parts["denoiser"]),
        decoder_gib=_gib(parts["decoder"]),
        encode_gib=working.encode_gib,
        step_gib=working.step_gib * denoised_together(card, pixels, batch, guided=guided) / MEGAPIXEL + gguf_gib,
        decode_gib=decode_gib if params else largest_decode_gib,
        inner_step_gib=working.step_gib * denoised_together(card, limit, 1, guided=guided) / MEGAPIXEL + gguf_gib,
        inner_decode_gib=largest_decode_gib,
        kept_gib=kept
        * (
            denoised_together(card, pixels, batch, guided=guided)
            if params
            else denoised_together(card, limit, 1, guided=True)
        )
        / MEGAPIXEL,
        encoder_streamed_gib=None if "encoder" in quantise else _streamed_gib(parts["encoder"]),
        denoiser_streamed_gib=None if whole_blocks else streamed_gib,
        plain_streamed_gib=streamed_gib if whole_blocks else None,
        encoder_on_cpu=card.options.get("encoder_on") == "cpu",
        encoder_moves="encoder_on" in takes.options,
        batch=batch,
        pixels=pixels,
        limit_pixels=None if params else limit,
        fixed_step_gib=gguf_gib,
        measured=measured is not None,
        denoiser_q4_gib=None
        if gguf or "denoiser" in quantise or "gguf" not in takes.denoiser
        else sum(tensor.elements for tensor in parts["denoiser"]) * Q4_BITS / 8 / GIB,
        encoder_q4_gib=None
        if "encoder" in quantise or "encoder" not in takes.quantise
        else _gib(_encoder(card, folder, ITEM_BYTES[dtype], "nf4")),
    )


def denoised_together(card: ModelCard, pixels: int, batch: int, *, guided: bool) -> int:
    """Return how many pixels go through the denoiser together, which is what a step's memory grows with."""
    return pixels * batch * (2 if guided and WORKING_SETS[card.family].joined else 1)


def decoded_together(pixels: int, batch: int) -> int:
    """Return how many pixels of a batch are decoded together, pictures of `pixels` each."""
    return max(pixels, min(DECODE_PIXELS, pixels * batch))


def measured_of(profile: Profile | None, card: ModelCard, numerics: Numerics) -> WorkingMemory | None:
    """Return what `farm bench` measured of exactly this model, dtype and versions, where it did."""
    working = profile.stages.working if profile is not None and profile.stages is not None else None
    return working if working is not None and working.identity == drawing_identity(card, numerics) else None


def _estimated(card: ModelCard, dtype: str, *, cached: bool) -> WorkingMemory:
    known, scale = WORKING_SETS[card.family], ITEM_BYTES[dtype] / ITEM_BYTES["bfloat16"]
    step = known.step + (known.cached if cached else 0.0)
    return WorkingMemory(encode_gib=ENCODE_GIB, step_gib=step * scale, decode_gib=known.decode * scale, identity="")


def files_of(card: ModelCard, *, settings: Settings | None = None) -> dict[str, Path]:
    """Return where the files lie that a card has besides its model's folder, by the names that `needs_of` takes.

    Raises as `farm.weights.locate_file` does.
    """
    files: dict[str, Path] = {}
    if card.denoiser is not None:
        files["denoiser"] = locate_file(card, card.denoiser, settings=settings)
    if card.decoder is not None:
        where = locate_source(card, card.decoder, settings=settings)
        files["decoder"] = where / "vae" if (where / "vae").is_dir() else where
    for adapter in card.adapters:
        files[f"adapter:{adapter.name}"] = locate_file(card, adapter, settings=settings)
    return files


def part_bytes(card: ModelCard, folder: Path, part: str, *, itemsize: int) -> int:
    """Return the bytes of a folder's weights at `itemsize` bytes an element.

    Raises ModelCardError for a part without files, a shard that its index names and is not there, or a cut-off file.
    """
    return sum(head.elements for head in _folder_heads(card, folder / part)) * itemsize


def folders_of(card: ModelCard, folder: Path) -> dict[str, tuple[str, ...]]:
    """Return which folders of a model make its encoder, denoiser and decoder. Raises ModelCardError."""
    if card.family in PARTS:
        return {
            part: tuple(ALSO_CALLED[name] if _is_called_otherwise(folder, name) else name for name in names)
            for part, names in PARTS[card.family].items()
        }
    index = _json(card, folder / "model_index.json")
    named = {name: entry for name, entry in index.items() if not name.startswith("_")}
    there = [name for name, entry in named.items() if isinstance(entry, list) and entry and entry[0] is not None]
    weighty = [name for name in sorted(there) if any((folder / name).glob("*.safetensors"))]
    denoiser = tuple(name for name in weighty if name.startswith(("transformer", "unet")))
    decoder = tuple(name for name in weighty if name.startswith(("vae", "vqvae", "movq")))
    encoder = tuple(name for name in weighty if name not in (*denoiser, *decoder))
    for part, names in (("denoiser (transformer or unet)", denoiser), ("decoder (vae)", decoder)):
        if not names:
            raise ModelCardError(
                f"model {card.name}: {folder / 'model_index.json'} names no {part} with a .safetensors file; fetch the weights "
                f"again (pickles are not read)"
            )
    return {"encoder": encoder, "denoiser": denoiser, "decoder": decoder}


def _is_called_otherwise(folder: Path, name: str) -> bool:
    return name in ALSO_CALLED and not (folder / name).is_dir() and (folder / ALSO_CALLED[name]).is_dir()


def _parts(
    card: ModelCard, folder: Path, files: Mapping[str, Path], *, dtype: str, quantise: Mapping[Any, str]
) -> dict[str, list[Sized]]:
    itemsize, folders = ITEM_BYTES[dtype], folders_of(card, folder)

    def heads(part: str) -> list[TensorHead]:
        return [head for name in folders[part] for head in _folder_heads(card, folder / name)]

    encoder = _encoder(card, folder, itemsize, quantise.get("encoder"))
    own = files.get("denoiser")
    read = heads("denoiser") if own is None else read_heads(card.name, own)
    if own is not None and own.suffix == ".gguf":
        denoiser = [Sized(head.name, head.elements, head.nbytes) for head in read]
    else:
        denoiser = _sized(read, itemsize, quantise.get("denoiser"))
    for name, path in sorted(files.items()):
        if name.startswith("adapter:"):
            denoiser += _sized(read_heads(card.name, path), itemsize, None)
    decoder = list(_folder_heads(card, files["decoder"]) if "decoder" in files else heads("decoder"))
    if card.family == "qwen-image":
        decoder = [_folded(head) for head in decoder if not head.name.startswith(ENCODING)]
    return {
        "encoder": encoder,
        "denoiser": denoiser,
        "decoder": _sized(decoder, itemsize, None),
    }


def _encoder(card: ModelCard, folder: Path, itemsize: int, how: str | None) -> list[Sized]:
    encoder: list[Sized] = []
    for name in folders_of(card, folder)["encoder"]:
        given = _folder_heads(card, folder / name)
        if card.family in PARTS:
            given = tuple(head for head in given if not (NOT_LOADED | MERGED) & set(head.name.split(".")))
        whole = name in NOT_QUANTISED.get(card.family, ())
        encoder += _sized(given, itemsize, None if whole else how, whole=KEPT_WHOLE)
    return encoder


def _folded(head: TensorHead) -> TensorHead:
    """Of a kernel over time, the one slice that a single frame meets."""
    return replace(head, shape=(*head.shape[:2], *head.shape[3:])) if len(head.shape) == 5 else head


def _sized(heads: Iterable[TensorHead], itemsize: int, how: str | None, *, whole: tuple[str, ...] = ()) -> list[Sized]:
    """`how`: linear layers' matrices are quantised, and those with a word of `whole` in their names are not."""
    return [
        Sized(
            head.name,
            head.elements,
            _loaded_bytes(head, itemsize, None if any(word in head.name for word in whole) else how),
        )
        for head in heads
    ]


def _loaded_bytes(head: TensorHead, itemsize: int, how: str | None) -> float:
    """With bitsandbytes' scales of 32 bits, one a block in nf4 and one a row in int8."""
    if len(head.shape) == 2 and how == "int8":
        return head.elements + 4 * head.shape[0]
    if len(head.shape) == 2 and how == "nf4" and head.shape[1] % NF4_BLOCK == 0:
        return head.elements / 2 + 4 * head.elements / NF4_BLOCK
    return head.elements * itemsize


def _gib(tensors: Iterable[Sized]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / GIB


def _streamed_gib(tensors: Iterable[Sized]) -> float:
    """What is on the device at once, block by block: what lies outside the blocks, and two blocks, of which one is on its
    way. A block is what the first number in its tensors' names counts: `transformer_blocks.7`."""
    blocks: dict[str, float] = defaultdict(float)
    rest = 0.0
    for tensor in tensors:
        segments = tensor.name.split(".")
        number = next((place for place, segment in enumerate(segments) if segment.isdigit()), 0)
        if number:
            blocks[".".join(segments[: number + 1])] += tensor.nbytes
        else:
            rest += tensor.nbytes
    return (rest + sum(sorted(blocks.values())[-2:])) / GIB


def _folder_heads(card: ModelCard, where: Path) -> tuple[TensorHead, ...]:
    files = sorted(where.glob("*.safetensors"))
    indexes = list(where.glob("*.safetensors.index.json"))
    if not indexes:
        files = without_copies(files)
    for index in indexes:
        named = set(_json(card, index).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise ModelCardError(
                f"model {card.name}: {where / missing[0]} is not there, {len(missing)} of {len(named)} files missing; "
                f"fetch the weights again"
            )
        files = [file for file in files if file.name in named]
    if not files:
        raise ModelCardError(
            f"model {card.name}: {where} has no .safetensors file; fetch the weights again (pickles are not read)"
        )
    _json(card, where / "config.json")
    return tuple(head for file in files for head in read_heads(card.name, file))


def _json(card: ModelCard, path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelCardError(f"model {card.name}: {path} cannot be read: {exc}; fetch the weights again") from exc
    if not isinstance(loaded, dict):
        raise ModelCardError(f"model {card.name}: {path} is not a JSON object; fetch the weights again")
    return loaded
