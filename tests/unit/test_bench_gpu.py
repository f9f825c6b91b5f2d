"""The benchmark for GPUs, with tiny models on the CPU: the same code, figures that mean nothing."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from farm.bench import giants, gpu
from farm.bench.gpufigures import Case, Row, idle_share, memory_table, peer_table, ratios
from farm.bench.gpugains import OWN
from farm.modelcard import find_card
from farm.models.loading import Loader
from farm.models.newbie_text import Gemma
from farm.needs import needs_of
from farm.settings import load_settings
from tests.drawing import card
from tests.quantised import cosine, quantised_layers, shuffle

CPU = torch.device("cpu")
CASE = Case(1024, 1024, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("giants")


def row(**found: object) -> Row:
    return Row("a-model", CASE, 16.0, 1, 4, **found)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be the GPU's")
@pytest.mark.parametrize("model", ["z-image-turbo", "newbie-image-exp0.1", "qwen-image-2512"])
def test_a_model_is_written_measured_and_compared(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "OTHER_BUDGETS_GIB", (64.0,))
    monkeypatch.setattr(gpu, "TINY_CASES", (Case(64, 48, 2),))
    monkeypatch.setattr("farm.models.acceleration.COMPILER", {"backend": "eager"})  # half a minute less
    gpu.main(["--tiny", "--model", model, "--folder", str(folder)])
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    assert "the figures of memory and time mean nothing" in said
    assert [(each["batch"], each["budget_gib"], each["failed"]) for each in found["rows"]] == [
        (1, 16.0, None),
        (4, 16.0, None),
        (1, 64.0, None),
    ]
    assert all(each["seconds_per_image"] > 0 and each["outside"] < 1 for each in found["rows"])  # by noise below 0, too
    assert all(each["peak_gib"] is None and each["within"] == "—" for each in found["rows"])
    assert [each["failed"] for each in found["peers"]] == [None]
    assert found["peers"][0]["ratio"] > 0
    assert {each["held"] for each in found["checks"]} == {True}
    assert len(found["checks"]) == (5 if model == "qwen-image-2512" else 3)
    assert found["environment"]["gpu"] == "none"
    ways = {each["way"]: each for each in found["gains"]}
    assert ways[OWN]["gain"] == 1.0
    assert ways[OWN]["apart"] == 0.0
    for way in ("compiled blocks", "batches of 4"):
        assert ways[way]["failed"] is None
        assert ways[way]["gain"] > 0
        assert ways[way]["apart"] < 0.5
    if model != "newbie-image-exp0.1":
        assert "cannot be drawn on cpu" in ways["attention _native_cudnn"]["failed"]
        assert ways["first-block cache, 0.1"]["failed"] is None
    if model == "qwen-image-2512":
        assert ways["denoiser in nf4 in place of GGUF"]["failed"] == "on a CPU nothing is quantised as it loads"


def test_a_denoiser_that_is_a_gguf_file_is_written_whole_beside_the_same_other_parts(tmp_path: Path) -> None:
    card = find_card("qwen-image-2512", load_settings())
    giant = giants.write_giant(card, tmp_path, tiny=True, device="cpu", say=lambda text: None)
    whole = giants.unquantised(giant, say=lambda text: None)
    where = Path(str(whole.source.path))
    assert whole.denoiser is None
    assert (where / "vae").resolve() == (tmp_path / "qwen-image-2512-tiny" / "vae")
    assert [file.name for file in (where / "transformer").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert not (tmp_path / "qwen-image-2512-tiny" / "transformer").exists()
    assert giants.unquantised(giant, say=lambda text: None) == whole


def test_a_part_that_was_written_is_kept(tmp_path: Path) -> None:
    card, said = find_card("z-image-turbo", load_settings()), list[str]()
    giants.write_giant(card, tmp_path, tiny=True, device="cpu", say=said.append)
    (tmp_path / "z-image-turbo-tiny" / "vae" / giants.WRITTEN).unlink()
    giants.write_giant(card, tmp_path, tiny=True, device="cpu", say=said.append)
    assert [line.rpartition("/")[2] for line in said] == [
        "tokenizer",
        "text_encoder",
        "transformer",
        "vae",
        "scheduler",
        "vae",
    ]


@pytest.mark.parametrize("block", [giants.Q4_K, giants.Q6_K])
def test_random_blocks_are_weights_around_zero_of_the_spread_that_was_asked_for(block: tuple[int, int]) -> None:
    made = giants._blocks(np.random.default_rng(0), (64, 1024), block)
    kind = gguf.GGMLQuantizationType.Q4_K if block == giants.Q4_K else gguf.GGMLQuantizationType.Q6_K
    weights = quants.dequantize(made, kind)
    assert weights.shape == (64, 1024)
    assert abs(weights.mean()) < 0.001
    assert weights.std() == pytest.approx(1024**-0.5, rel=0.05)


def test_a_random_gemma_as_deep_as_the_real_one_bears_nf4(tmp_path: Path) -> None:
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 34}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 64}
    writer = giants._Writer(tmp_path / "text_encoder", torch.float32, CPU)
    writer.folder.mkdir()
    giants.write_gemma(writer, shape)
    ids = torch.randint(5, 512, (1, 64), generator=torch.Generator().manual_seed(0))

    def states(quantise: dict[str, str], *, shuffled: bool = False) -> torch.Tensor:
        encoder = Loader(card(tmp_path), tmp_path, {}, torch.float32, CPU, quantise).encoder("text_encoder", Gemma)
        if shuffled:
            shuffle(quantised_layers(encoder))
        with torch.inference_mode():
            found = encoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-2][0]
        return torch.as_tensor(found)

    whole, nf4 = states({}), {"encoder": "nf4"}
    assert 0.7 < cosine(states(nf4), whole) < 0.95
    assert cosine(states(nf4, shuffled=True), whole) < 0.3


def test_large_parts_come_in_shards_that_hold_every_tensor_once() -> None:
    shapes = {f"layers.{place}.weight": (2**14, 2**14) for place in range(9)}  # half a GiB each in bfloat16
    shards = list(giants._shards(shapes, 2))
    assert [len(names) for names in shards] == [4, 4, 1]
    assert [name for names in shards for name in names] == list(shapes)


def test_prompts_differ_and_have_one_length() -> None:
    made = giants.prompts(300, first=400)
    assert len(set(made)) == 300
    assert {len(prompt.split()) for prompt in made} == {giants.PROMPT_WORDS}


@pytest.mark.parametrize(
    ("model", "encoder", "denoiser"),
    [("z-image-turbo", 7.5, 11.5), ("newbie-image-exp0.1", 8.3, 6.5), ("qwen-image-2512", 13.2, 12.2)],
)
def test_a_giant_has_the_size_of_the_published_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, encoder: float, denoiser: float
) -> None:
    """Files with the right headers and holes for weights."""
    monkeypatch.setattr(giants, "_Writer", Hollow)
    giant = giants.write_giant(
        find_card(model, load_settings()), tmp_path, tiny=False, device="cpu", say=lambda text: None
    )
    where = tmp_path / f"{model}-full"
    files = {"denoiser": where / "transformer" / giants.GGUF_FILE} if giant.card.denoiser else {}
    card = giant.card.model_copy(update={"quantise": {}})
    needs = needs_of(card, where, dtype="bfloat16", batch=1, files=files)
    assert needs.encoder_gib == pytest.approx(encoder, abs=0.1)
    assert needs.denoiser_gib == pytest.approx(denoiser, abs=0.2)


class Hollow(giants._Writer):
    """Writes headers, and after them nothing that takes place on a disk."""

    def weights(self, shapes: giants.Shapes, *, stem: str) -> None:
        heads, end = {}, 0
        for name, shape in shapes.items():
            size = 2 * int(np.prod(shape))
            heads[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        head = json.dumps(heads).encode()
        with (self.folder / f"{stem}.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(8 + len(head) + end)

    def fill(self, writer: gguf.GGUFWriter, *given: object) -> None:
        writer.fout[0].flush()
        stored = sum(tensor.nbytes + 32 for tensor in writer.tensors[0].values())
        writer.fout[0].truncate(writer.fout[0].tell() + stored)


def test_idle_time_is_what_no_kernel_covers() -> None:
    assert idle_share([(0, 4), (2, 6), (8, 10)]) == pytest.approx(0.2)
    assert idle_share([(0, 4), (4, 6)]) == 0.0
    assert idle_share([]) is None


def test_rows_say_whether_memory_was_kept_to_and_what_failed() -> None:
    lines = memory_table(
        [
            row(placement="phased", peak_gib=14.7, seconds_per_image=1.25, outside=0.021, idle_between=0.001),
            row(placement="phased", peak_gib=15.2, seconds_per_image=1.25),
            row(failed="no memory left"),
        ]
    ).splitlines()[2:]
    assert "| phased | 14.70 | ok | — | 1.25 | 2.1% | 0.1% | — |" in lines[0]
    assert "| 15.20 | over |" in lines[1]
    assert "| none | | | | no memory left |" in lines[2]


def test_a_peer_is_compared_with_the_row_of_its_shape_budget_and_batch() -> None:
    ours = [row(seconds_per_image=2.0), Row("a-model", CASE, 64.0, 1, 4, seconds_per_image=1.0)]
    compared = list(ratios(ours, [row(seconds_per_image=5.0, peak_gib=13.0)]))
    assert [ratio for _, _, ratio in compared] == [2.5]
    assert "| 2.00 | 5.00 | 2.50× | 13.00 |" in peer_table(compared)
    failed = list(ratios(ours, [row(failed="OutOfMemoryError: no more")]))
    assert "| OutOfMemoryError: no more | — | — |" in peer_table(failed)


def test_without_a_gpu_only_tiny_models_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("it has a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "there is no CUDA device here; --tiny runs the same code on a CPU" in capsys.readouterr().err
