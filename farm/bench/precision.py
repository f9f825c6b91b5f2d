"""What quantising costs in fidelity, and what compiling changes: the bundled model against itself in float32.

The same prompts with the same seeds are drawn by the very engine that renders jobs, a part of it each time another: the denoiser
in bfloat16, from GGUF files of 8 to 4 bits a weight, in nf4 and int8 by bitsandbytes, compiled; the text encoder in nf4 and int8.
Two things are told of each. How far its pictures are from the reference's, in PSNR and in levels of 255: that is what was lost.
And how often a judge that has no taste finds them right (`farm.sketch.judge`): that is whether it matters. A small model has no
weights to spare, so it loses more than a large one would.

Seconds stand beside the reference's of the same run. On a CPU that one has the packed layers of `farm.models.packed`, which other
denoisers have not; a quantised one is dequantised at every step, too. What it saves is memory. Jobs on a CPU have nothing
quantised as it loads: here it is, so that what a GPU would draw can be judged where there is none.

    python -m farm.bench.precision [--prompts N] [--page infra/bench/precision.md]
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from farm.bench.environment import environment
from farm.bench.page import check_page, fill_page
from farm.bench.quality import BATCH, drawn, judged, specs_of
from farm.cardparts import Acceleration, Denoiser
from farm.devices import local_device, numerics_for
from farm.engine import Engine, Picture
from farm.modelcard import ModelCard, find_card
from farm.models.family import open_family
from farm.needs import files_of, folders_of
from farm.settings import Settings, load_settings
from farm.sketch.adherence import unseen_prompts
from farm.weights import locate

PROMPTS = 200
ROUNDS = 2
GGUF_KINDS = ("Q8_0", "Q5_1", "Q4_1", "Q4_0")
GGUF_BLOCK = 32
WHOLE = ("pad_token",)
"""Words in names of matrices that are no linear layer's, and stay as they are."""
FIGURES = "<!-- figures: python -m farm.bench.precision --page infra/bench/precision.md -->"


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to draw; `part` is the one that is another."""

    name: str
    card: ModelCard
    dtype: str = "float32"
    part: Literal["encoder", "denoiser"] = "denoiser"


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant came to. `apart`: mean difference in levels of 255; `psnr_db`: of the median picture, None where equal.

    `ratio`: its seconds against the reference's.
    """

    name: str
    megabytes: float
    right: int
    of: int
    low: float
    high: float
    equal: int
    apart: float
    psnr_db: float | None
    seconds_per_image: float
    ratio: float


def measure(*, prompts: int = PROMPTS, rounds: int = ROUNDS) -> list[Row]:
    """Draw and judge the same prompts with every variant, the reference first; times take turns."""
    settings = load_settings()
    card = find_card("sketch", settings)
    specs = specs_of(unseen_prompts(prompts), card.defaults)
    with tempfile.TemporaryDirectory() as folder:
        variants = variants_of(card, Path(folder), settings)
        engines = [_engine(variant, settings) for variant in variants]
        pictures: list[list[Picture]] = []
        seconds: list[list[float]] = [[] for _ in variants]
        for number in range(rounds):
            for place, (variant, engine) in enumerate(zip(variants, engines, strict=True)):
                if not engine.loaded:
                    engine.load()
                    drawn(engine, specs[:BATCH])  # the first batch is slow, and is none of the figures
                found = drawn(engine, specs)
                seconds[place] += [one.seconds for one in found]
                if number == 0:
                    pictures.append(found)
                    print(f"  {variant.name}: {judged(found).right} of {len(found)}", file=sys.stderr)
        sizes = [_megabytes(variant, settings) for variant in variants]
        for engine in engines:
            engine.unload()
    each = [statistics.median(some) for some in seconds]
    return [
        _row(variant.name, megabytes, mine, pictures[0], seconds_each, seconds_each / each[0])
        for variant, megabytes, mine, seconds_each in zip(variants, sizes, pictures, each, strict=True)
    ]


def variants_of(card: ModelCard, folder: Path, settings: Settings) -> list[Variant]:
    """Return the reference and all others; their files are written to `folder`."""
    weights = _weights_of(card, settings)
    found = [
        Variant("float32", card),
        Variant("float32, stock layers", with_stock_layers(card, settings)),
        Variant("bfloat16", card, "bfloat16"),
    ]
    for kind in GGUF_KINDS:
        file = folder / f"{kind}.gguf"
        write_gguf(weights, file, kind=kind, architecture="z_image")
        denoiser = Denoiser(path=str(folder), file=file.name, format="gguf")
        found.append(Variant(f"GGUF {kind}", card.model_copy(update={"denoiser": denoiser})))
    for how in ("nf4", "int8"):
        found.append(Variant(how, card.model_copy(update={"quantise": {"denoiser": how}})))
    for how in ("nf4", "int8"):
        quantised = card.model_copy(update={"quantise": {"encoder": how}})
        found.append(Variant(f"text encoder {how}", quantised, part="encoder"))
    compiled = {"cpu": Acceleration(compile=True), "cuda": Acceleration(compile=True)}
    found.append(Variant("float32, compiled", card.model_copy(update={"acceleration": compiled})))
    return found


def with_stock_layers(card: ModelCard, settings: Settings) -> ModelCard:
    """Return a card of the same denoiser, given as its own file: such a one keeps the layers of diffusers on a CPU, too."""
    weights = _weights_of(card, settings)
    (file,) = weights.glob("*.safetensors")
    return card.model_copy(update={"denoiser": Denoiser(path=str(weights), file=file.name, format="safetensors")})


def _weights_of(card: ModelCard, settings: Settings) -> Path:
    folder = locate(card, settings=settings)
    return folder / folders_of(card, folder)["denoiser"][0]


def write_gguf(weights: Path, file: Path, *, kind: str, architecture: str) -> None:
    """Write the safetensors of a folder as one GGUF file, matrices of whole blocks quantised as `kind`, the others in float32."""
    import gguf
    from safetensors.torch import load_file

    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, architecture)
    for part in sorted(weights.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            values = tensor.float().numpy()
            whole = values.ndim != 2 or values.shape[1] % GGUF_BLOCK or any(word in name for word in WHOLE)
            if whole:
                writer.add_tensor(name, values)
            else:
                writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _engine(variant: Variant, settings: Settings) -> Engine:
    device = local_device()
    numerics = numerics_for(variant.card, device=device, renderers=1)
    numerics = numerics.model_copy(update={"batch": BATCH, "dtype": variant.dtype})
    name = "cuda:0" if device.kind == "cuda" else "cpu"
    family = open_family(variant.card, numerics, device=name, vram_gib=settings.vram_gib, quantises=True)
    return Engine(variant.card, numerics, name, settings.vram_gib, family=family)


def _megabytes(variant: Variant, settings: Settings) -> float:
    """What the part's weights take once they are loaded."""
    from farm.needs import needs_of

    folder, files = locate(variant.card, settings=settings), files_of(variant.card, settings=settings)
    quantise = variant.card.quantise
    needs = needs_of(variant.card, folder, dtype=variant.dtype, batch=1, files=files, device="cpu", quantise=quantise)
    return {"encoder": needs.encoder_gib, "denoiser": needs.denoiser_gib}[variant.part] * 2**30 / 1e6


def _row(
    name: str,
    megabytes: float,
    mine: Sequence[Picture],
    reference: Sequence[Picture],
    seconds_each: float,
    ratio: float,
) -> Row:
    far, verdict = distance(mine, reference), judged(mine)
    return Row(
        name=name,
        megabytes=megabytes,
        right=verdict.right,
        of=verdict.of,
        low=verdict.low,
        high=verdict.high,
        equal=far.equal,
        apart=far.apart,
        psnr_db=far.psnr_db,
        seconds_per_image=seconds_each,
        ratio=ratio,
    )


@dataclass(frozen=True, slots=True)
class Distance:
    """How far pictures are from the reference's, by the fields of the same names in `Row`."""

    equal: int
    apart: float
    psnr_db: float | None


def distance(mine: Sequence[Picture], reference: Sequence[Picture]) -> Distance:
    """Compare pictures of the same specs."""
    apart = [np.abs(one.pixels.astype(float) - other.pixels) for one, other in zip(mine, reference, strict=True)]
    squares = [float((each**2).mean()) for each in apart]
    median = statistics.median(squares)
    return Distance(
        equal=squares.count(0.0),
        apart=statistics.fmean(float(each.mean()) for each in apart),
        psnr_db=float(10 * np.log10(255**2 / median)) if median else None,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| part | its weights, MB | right, % | 95 % interval | pictures equal | levels apart | PSNR, dB | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        psnr = "—" if row.psnr_db is None else f"{row.psnr_db:.1f}"
        lines.append(
            f"| {row.name} | {row.megabytes:.2f} | {100 * row.right / row.of:.1f} | {100 * row.low:.0f}–{100 * row.high:.0f} | "
            f"{row.equal} of {row.of} | {row.apart:.2f} | {psnr} | {row.ratio:.2f}× |"
        )
    return "\n".join(lines)


def write_page(path: Path, rows: Sequence[Row]) -> None:
    """Put the table and what it was measured on below the page's mark."""
    about: dict[str, Any] = dict(environment())
    said = (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, Python {about['python']}, torch {about['torch']}, "
        f"diffusers {about['diffusers']}. {rows[0].of} prompts, seeds from 0, batches of {BATCH}, one thread, 64×64, the card's "
        f"8 steps and guidance 2. {1000 * rows[0].seconds_per_image:.0f} ms an image in float32."
    )
    fill_page(path, FIGURES, said, table(rows))


def main() -> None:
    arguments = argparse.ArgumentParser(
        prog="python -m farm.bench.precision", description=(__doc__ or "").splitlines()[0]
    )
    arguments.add_argument("--prompts", type=int, default=PROMPTS, help="pictures of each row")
    arguments.add_argument("--page", type=Path, help="page to put the figures into")
    given = arguments.parse_args()
    if given.prompts < 1:
        arguments.error(f"--prompts must be 1 or more, got {given.prompts}")
    if given.page:
        check_page(given.page, FIGURES)
    rows = measure(prompts=given.prompts)
    print(table(rows))
    if given.page:
        write_page(given.page, rows)
    print(json.dumps({"environment": environment(), "precision": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
