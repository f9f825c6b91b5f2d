"""What a model needs, by its files' headers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from farm.cardparts import Acceleration, Adapter, Denoiser, SizeLimits, Source
from farm.errors import ModelCardError
from farm.modelcard import ModelCard, RenderParams
from farm.needs import GIB, WORKING_SETS, folders_of, measured_of, needs_of, part_bytes
from farm.plan import drawing_identity
from farm.records import Profile, WorkingMemory
from tests.drawing import card, numerics
from tests.unit.profiles import make_profile, make_stages
from tests.unit.test_tensorfiles import write_gguf, write_safetensors

WEIGHTS = {
    "text_encoder": {
        "model.embed_tokens.weight": (64, 32),
        "model.layers.0.mlp.weight": (64, 64),
        "model.layers.1.mlp.weight": (64, 64),
        "model.layers.2.mlp.weight": (64, 64),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
        "visual.blocks.0.weight": (64, 64),
    },
    "transformer": {"x_in.weight": (10, 10), "layers.0.a.weight": (32, 64), "layers.1.a.weight": (32, 64)},
    "vae": {"decoder.conv.weight": (4, 4, 3, 3)},
}
PARAMS = RenderParams(width=1024, height=1024, num_inference_steps=8, guidance_scale=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, shapes in WEIGHTS.items():
        write_safetensors(tmp_path / name / "model.safetensors", shapes)
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def big(family: str = "z-image", **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {"defaults": PARAMS, "limits": SizeLimits(max_pixels=2**20)}
    return card(family=family, **fields | changes)


def in_bytes(gib: float | None) -> int:
    return round((gib or 0.0) * GIB)


def test_parts_count_in_the_plans_dtype_without_what_prompts_never_use(folder: Path) -> None:
    needs = needs_of(big(), folder, dtype="bfloat16", batch=1)
    assert in_bytes(needs.encoder_gib) == (64 * 32 + 3 * 64 * 64 + 32) * 2
    assert in_bytes(needs.denoiser_gib) == (100 + 2 * 32 * 64) * 2
    assert in_bytes(needs.decoder_gib) == 144 * 2
    doubled = needs_of(big(), folder, dtype="float32", batch=1)
    assert doubled.denoiser_gib == 2 * needs.denoiser_gib
    assert part_bytes(big(), folder, "transformer", itemsize=2) == in_bytes(needs.denoiser_gib)


def test_working_sets_follow_the_size_the_batch_and_guidance(folder: Path) -> None:
    one = needs_of(big(), folder, dtype="bfloat16", batch=1, params=PARAMS)
    assert (one.step_gib, one.decode_gib, one.batch, one.pixels) == (0.53, 1.52, 1, 2**20)
    four = needs_of(big(), folder, dtype="bfloat16", batch=4, params=PARAMS)
    assert (four.step_gib, four.decode_gib) == (4 * 0.53, 1.52)  # decoded one after the other
    guided = PARAMS.model_copy(update={"guidance_scale": 4.0})
    assert needs_of(big(), folder, dtype="bfloat16", batch=1, params=guided).step_gib == 2 * 0.53
    in_turn = needs_of(big("qwen-image"), folder, dtype="bfloat16", batch=1, params=guided)
    assert in_turn.step_gib == 0.40  # the two halves one after the other
    assert needs_of(big(), folder, dtype="float32", batch=1, params=PARAMS).step_gib == 2 * 0.53


def test_without_parameters_a_decode_and_urgent_images_count_at_the_cards_limits(folder: Path) -> None:
    small = RenderParams(width=512, height=512, num_inference_steps=8, guidance_scale=0)
    needs = needs_of(big(defaults=small, limits=SizeLimits(max_pixels=2**21)), folder, dtype="bfloat16", batch=1)
    assert (needs.step_gib, needs.decode_gib) == (0.53 / 4, 2 * 1.52)
    assert (needs.inner_step_gib, needs.inner_decode_gib) == (2 * 0.53, 2 * 1.52)
    assert (needs.pixels, needs.limit_pixels) == (2**18, 2**21)
    assert needs_of(big(), folder, dtype="bfloat16", batch=1, params=small).limit_pixels is None


def test_without_parameters_a_step_of_several_pictures_counts_at_the_limits_and_with_guidance(folder: Path) -> None:
    small = RenderParams(width=512, height=512, num_inference_steps=8, guidance_scale=0)
    some = big(defaults=small, limits=SizeLimits(max_pixels=2**21))
    needs = needs_of(some, folder, dtype="bfloat16", batch=3)
    assert (needs.step_gib, needs.inner_step_gib, needs.pixels) == (3 * 2 * 2 * 0.53, 2 * 2 * 0.53, 2**21)
    told = needs_of(some, folder, dtype="bfloat16", batch=3, params=small)
    assert told.step_gib == pytest.approx(3 * 0.53 / 4)


def test_quantising_shrinks_matrices_and_leaves_embeddings_and_norms(folder: Path) -> None:
    nf4 = needs_of(big(quantise={"encoder": "nf4"}), folder, dtype="bfloat16", batch=1)
    assert in_bytes(nf4.encoder_gib) == (64 * 32 + 32) * 2 + 3 * 64 * 64 * 4.5 / 8
    int8 = needs_of(big(quantise={"denoiser": "int8"}), folder, dtype="bfloat16", batch=1)
    assert in_bytes(int8.denoiser_gib) == (100 + 2 * 32 * 64) + 4 * (10 + 2 * 32)  # a scale for each row
    plain = needs_of(big(), folder, dtype="bfloat16", batch=1)
    assert (nf4.encoder_q4_gib, plain.encoder_q4_gib) == (None, nf4.encoder_gib)
    uneven = needs_of(big(quantise={"denoiser": "nf4"}), folder, dtype="bfloat16", batch=1)
    assert in_bytes(uneven.denoiser_gib) == 100 * 2 + 2 * 32 * 64 * 4.5 / 8  # rows of 10 are no whole blocks
    assert (nf4.encoder_streamed_gib, int8.denoiser_streamed_gib, int8.denoiser_q4_gib) == (None, None, None)
    on_cpu = needs_of(big(quantise={"encoder": "nf4"}), folder, dtype="bfloat16", batch=1, device="cpu")
    assert in_bytes(on_cpu.encoder_gib) == (64 * 32 + 3 * 64 * 64 + 32) * 2
    told = needs_of(big(), folder, dtype="bfloat16", batch=1, device="cpu", quantise={"encoder": "nf4"})
    assert told.encoder_gib == nf4.encoder_gib


def test_of_newbies_encoders_gemma_alone_is_quantised_and_jinas_adapters_are_merged(folder: Path) -> None:
    jina = {
        "embeddings.word_embeddings.parametrizations.weight.original": (16, 8),
        "embeddings.word_embeddings.parametrizations.weight.0.lora_A": (5, 16, 4),
        "layers.0.fc.weight": (32, 64),
    }
    for name in ("clip_model", "text_encoder_2"):
        write_safetensors(folder / name / "model.safetensors", jina)
        (folder / name / "config.json").write_text("{}")
        needs = needs_of(big("newbie", quantise={"encoder": "nf4"}), folder, dtype="bfloat16", batch=1)
        gemma = (64 * 32 + 32) * 2 + 3 * 64 * 64 * 4.5 / 8
        assert in_bytes(needs.encoder_gib) == gemma + (16 * 8 + 32 * 64) * 2
        assert needs.denoiser_q4_gib is None  # the family reads no GGUF file
        shutil.rmtree(folder / name)


def test_the_second_feed_forward_layer_of_t5_stays_whole(folder: Path) -> None:
    shapes = {"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (64, 64)}
    wo = {"encoder.block.0.layer.1.DenseReluDense.wo.weight": (64, 64)}
    write_safetensors(folder / "text_encoder" / "model.safetensors", shapes | wo)
    needs = needs_of(big(quantise={"encoder": "nf4"}), folder, dtype="bfloat16", batch=1)
    assert in_bytes(needs.encoder_gib) == 64 * 64 * 4.5 / 8 + 64 * 64 * 2


def test_streaming_has_two_blocks_on_the_device_and_what_lies_outside_of_blocks(folder: Path) -> None:
    needs = needs_of(big(), folder, dtype="bfloat16", batch=1)
    assert in_bytes(needs.encoder_streamed_gib) == (64 * 32 + 2 * 64 * 64 + 32) * 2
    assert in_bytes(needs.denoiser_streamed_gib) == (100 + 2 * 32 * 64) * 2


@pytest.mark.parametrize("how", [Acceleration(compile=True), Acceleration(first_block_cache=0.1)])
def test_blocks_that_are_compiled_or_left_out_are_not_streamed(folder: Path, how: Acceleration) -> None:
    accelerated = big("qwen-image", acceleration={"cuda": how})
    needs = needs_of(accelerated, folder, dtype="bfloat16", batch=1)
    assert needs.denoiser_streamed_gib is None
    on_a_cpu = needs_of(accelerated, folder, dtype="bfloat16", batch=1, device="cpu")
    assert on_a_cpu.denoiser_streamed_gib is not None


@pytest.mark.parametrize(("family", "halves"), [("z-image", 2), ("qwen-image", 1)])
def test_what_a_first_block_cache_keeps_counts_in_a_step_and_beside_an_urgent_image(
    folder: Path, family: str, halves: int
) -> None:
    guided = PARAMS.model_copy(update={"guidance_scale": 4.0})
    cached = big(family, acceleration={"cuda": Acceleration(first_block_cache=0.1)})
    plain, needs = (needs_of(one, folder, dtype="bfloat16", batch=1, params=guided) for one in (big(family), cached))
    kept = WORKING_SETS[family].cached * halves
    assert (plain.kept_gib, needs.kept_gib) == (0.0, pytest.approx(kept))
    assert needs.step_gib == pytest.approx(plain.step_gib + kept)
    assert needs.inner_gib - plain.inner_gib == pytest.approx(
        kept
    )  # of the batch: the image's own decode takes the most
    measured = WorkingMemory(encode_gib=0.1, step_gib=0.4, decode_gib=1.2, identity="x")
    found = needs_of(cached, folder, dtype="bfloat16", batch=1, params=guided, measured=measured)
    assert (found.step_gib, found.kept_gib) == (pytest.approx(0.4 * halves), pytest.approx(kept))


def test_measured_working_sets_take_the_place_of_estimates(folder: Path) -> None:
    guided = PARAMS.model_copy(update={"guidance_scale": 4.0})
    measured = WorkingMemory(encode_gib=0.1, step_gib=0.4, decode_gib=1.2, identity="x")
    one = needs_of(big(), folder, dtype="bfloat16", batch=3, params=guided, measured=measured)
    assert (one.encode_gib, one.step_gib, one.decode_gib) == (0.1, pytest.approx(3 * 2 * 0.4), 1.2)
    assert (one.inner_step_gib, one.inner_decode_gib, one.measured) == (2 * 0.4, 1.2, True)
    whole = needs_of(big(), folder, dtype="float32", batch=1, measured=measured)
    assert (whole.step_gib, whole.decode_gib) == (0.4, 1.2)  # as measured, in whichever dtype that was
    assert not needs_of(big(), folder, dtype="bfloat16", batch=1).measured


def test_what_was_measured_counts_for_exactly_that_model_dtype_and_versions() -> None:
    here = numerics(device="cuda", dtype="bfloat16")
    working = WorkingMemory(encode_gib=0.1, step_gib=0.4, decode_gib=1.2, identity=drawing_identity(big(), here))
    profile = profile_with(working)
    assert measured_of(profile, big(), here) == working
    assert measured_of(profile, big(), here.model_copy(update={"batch": 7})) == working
    for another, given in (
        (big(quantise={"encoder": "nf4"}), here),
        (big(), here.model_copy(update={"dtype": "float32"})),
        (big(), here.model_copy(update={"versions": here.versions | {"torch": "1.0"}})),
    ):
        assert measured_of(profile, another, given) is None
    assert [measured_of(one, big(), here) for one in (None, profile_with(None))] == [None, None]


def profile_with(working: WorkingMemory | None) -> Profile:
    return make_profile(stages=make_stages(working=working))


def test_a_gguf_denoiser_counts_as_its_bytes_and_dequantises_in_each_step(folder: Path, tmp_path: Path) -> None:
    own = Denoiser(path=str(tmp_path), file="m.gguf", format="gguf")
    files = {"denoiser": write_gguf(tmp_path / "m.gguf")}
    needs = needs_of(big("qwen-image", denoiser=own), folder, dtype="bfloat16", batch=1, files=files)
    assert in_bytes(needs.denoiser_gib) == 4 * 36 + 24
    assert (needs.step_gib, needs.fixed_step_gib, needs.denoiser_q4_gib) == (pytest.approx(0.4 + 0.4), 0.4, None)


def test_of_qwens_vae_only_the_folded_decoder_counts(folder: Path) -> None:
    shapes = {"encoder.conv.weight": (4, 4, 3, 3, 3), "decoder.conv.weight": (4, 4, 3, 3, 3), "decoder.conv.bias": (4,)}
    write_safetensors(folder / "vae" / "model.safetensors", shapes)
    needs = needs_of(big("qwen-image"), folder, dtype="bfloat16", batch=1)
    assert in_bytes(needs.decoder_gib) == (4 * 4 * 3 * 3 + 4) * 2


def test_a_vae_of_its_own_and_adapters_count_too(folder: Path, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "own" / "vae.safetensors", {"w": (10,)})
    (tmp_path / "own" / "config.json").write_text("{}")
    lora = write_safetensors(tmp_path / "lora.safetensors", {"layers.0.a.lora_A.weight": (8, 64)})
    files = {"decoder": tmp_path / "own", "adapter:fast": lora}
    adapted = big(
        adapters=(Adapter(name="fast", path=str(tmp_path), file="lora.safetensors"),), decoder=Source(path="own")
    )
    needs = needs_of(adapted, folder, dtype="bfloat16", batch=1, files=files)
    assert in_bytes(needs.decoder_gib) == 20
    assert in_bytes(needs.denoiser_gib) == (100 + 2 * 32 * 64 + 8 * 64) * 2


def test_an_encoder_on_the_cpu_is_the_cards_word(folder: Path) -> None:
    assert not needs_of(big(), folder, dtype="bfloat16", batch=1).encoder_on_cpu
    assert needs_of(big(options={"encoder_on": "cpu"}), folder, dtype="bfloat16", batch=1).encoder_on_cpu
    assert needs_of(big(), folder, dtype="bfloat16", batch=1).encoder_moves


def test_the_parts_of_any_other_pipeline_follow_from_its_index(folder: Path) -> None:
    index = {
        "_class_name": "SomePipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "transformer": ["diffusers", "SomeTransformer"],
        "text_encoder": ["transformers", "SomeModel"],
        "text_encoder_2": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    some = big("diffusers")
    assert folders_of(some, folder) == {
        "encoder": ("text_encoder",),
        "denoiser": ("transformer",),
        "decoder": ("vae",),
    }
    assert not needs_of(some, folder, dtype="bfloat16", batch=1).encoder_moves
    assert in_bytes(needs_of(some, folder, dtype="bfloat16", batch=1).encoder_gib) == 2 * sum(
        a * b for a, b in ((64, 32), (192, 64), (32, 1), (64, 32), (64, 64))
    )
    coded = {"_class_name": ["pipeline", "SomePipeline"], "transformer": ["my_transformer", "SomeTransformer"]}
    (folder / "model_index.json").write_text(json.dumps(index | coded))
    shutil.copytree(folder / "vae", folder / "_class_name")
    assert folders_of(some, folder)["encoder"] == ("text_encoder",)
    del index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelCardError, match=r"model_index\.json names no denoiser \(transformer or unet\) with a"):
        folders_of(some, folder)


def test_files_that_are_missing_are_named(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("[1]")
    with pytest.raises(ModelCardError, match=r"vae/config\.json is not a JSON object; fetch the weights again"):
        needs_of(big(), folder, dtype="bfloat16", batch=1)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelCardError, match=r"transformer/model-2\.safetensors is not there, 1 of 2 files missing"):
        needs_of(big(), folder, dtype="bfloat16", batch=1)
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ModelCardError, match=r"text_encoder has no \.safetensors file"):
        needs_of(big(), folder, dtype="bfloat16", batch=1)
