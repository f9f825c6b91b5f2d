"""What a card puts in place of its model's own parts: a GGUF or safetensors denoiser, a decoder, adapters, quantisation."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from farm.cardparts import Adapter, Denoiser, Source
from farm.errors import ModelCardError
from farm.models.device import Streamed
from farm.models.loading import Loader
from farm.models.quantising import whole_layers
from farm.models.qwen import QwenFamily
from farm.models.zimage import ZImageFamily
from tests.drawing import card, numerics, spec, write_tiny_zimage
from tests.tiny_qwen import write_tiny_qwen

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("tiny"))


def loaded(folder: Path, **changes: Any) -> QwenFamily:
    family = QwenFamily(card(folder, family="qwen-image", **changes), numerics(), device="cpu", vram_gib=16.0)
    family.load()
    return family


def draw(family: QwenFamily) -> torch.Tensor:
    specs = [spec(0, guidance_scale=1.0)]
    return family.denoise(
        specs,
        family.noise(specs),
        positive=[family.encode(family.tokenize("a red circle"))],
        negative=[],
        on_step=lambda step, of: None,
    )


def write_gguf(folder: Path, file: Path) -> dict[str, torch.Tensor]:
    """Write a denoiser as Q4_0, what is no matrix of whole blocks as it is; return what its tensors mean."""
    writer = gguf.GGUFWriter(file, "qwen_image")
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        values = tensor.numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q4_0
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            values = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name, values)
        meant[name] = torch.from_numpy(np.array(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def write_adapter(file: Path, *layers: str) -> dict[str, torch.Tensor]:
    """Write a LoRA adapter of rank 2; return what it adds to each layer's weight."""
    tensors: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    for layer in layers:
        down, up = torch.randn(2, 32), torch.randn(32, 2)
        tensors[f"transformer.{layer}.lora_A.weight"], tensors[f"transformer.{layer}.lora_B.weight"] = down, up
        added[layer] = up @ down
    save_file(tensors, file)
    return added


def gguf_in(folder: Path) -> Denoiser:
    return Denoiser(path=str(folder), file="tiny.gguf", format="gguf")


def adapter_in(folder: Path) -> Adapter:
    return Adapter(path=str(folder), file="one.safetensors", name="one", weight=0.5)


def test_a_gguf_denoiser_draws_as_the_tensors_that_its_blocks_stand_for(folder: Path, tmp_path: Path) -> None:
    meant = write_gguf(folder, tmp_path / "tiny.gguf")
    family = loaded(folder, denoiser=gguf_in(tmp_path))
    ours = draw(family)
    plain = loaded(folder)
    unquantised = draw(plain)
    plain._modules.denoiser.load_state_dict(meant)
    assert torch.allclose(ours, draw(plain), atol=1e-3)  # scales are applied in half precision
    assert not torch.allclose(ours, unquantised, atol=2e-2)
    quantised = family._modules.denoiser.get_submodule(LAYER)
    assert type(quantised).__name__ == "GGUFLinear"


def test_a_quantised_tensor_that_nothing_computes_with_is_refused_as_the_model_loads(tmp_path: Path) -> None:
    folder = write_tiny_zimage(tmp_path / "model")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "z_image")
    for name, tensor in load_file(folder / WEIGHTS).items():
        values = tensor.numpy()
        if name == "x_pad_token":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    odd = Denoiser(path=str(tmp_path), file="odd.gguf", format="gguf")
    family = ZImageFamily(card(folder, denoiser=odd), numerics(), device="cpu", vram_gib=16.0)
    with pytest.raises(ModelCardError, match=r"odd\.gguf cannot be loaded: .*its tensor x_pad_token is quantised"):
        family.load()


def test_a_gguf_file_without_tensors_is_named(tmp_path: Path) -> None:
    folder = write_tiny_zimage(tmp_path / "model")
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "z_image")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    empty = Denoiser(path=str(tmp_path), file="empty.gguf", format="gguf")
    family = ZImageFamily(card(folder, denoiser=empty), numerics(), device="cpu", vram_gib=16.0)
    with pytest.raises(ModelCardError, match=r"^model sketch: .*empty\.gguf"):
        family.load()


def test_a_denoiser_in_one_file_takes_the_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["proj_out.weight"] = 2 * tensors["proj_out.weight"]
    save_file(tensors, tmp_path / "other.safetensors")
    other = Denoiser(path=str(tmp_path), file="other.safetensors", format="safetensors")
    ours = draw(loaded(folder, denoiser=other))
    plain = loaded(folder)
    assert not torch.allclose(ours, draw(plain), atol=1e-3)
    plain._modules.denoiser.load_state_dict(tensors)
    assert torch.allclose(ours, draw(plain), atol=1e-5)


def test_a_file_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["proj_out.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    short = Denoiser(path=str(tmp_path), file="short.safetensors", format="safetensors")
    with pytest.raises(
        ModelCardError, match=r"short\.safetensors cannot be loaded: .* it lacks tensors that .*transformer"
    ):
        loaded(folder, denoiser=short)
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "transformer" / "config.json").read_bytes())
    with pytest.raises(ModelCardError, match=r"lacks 1 of its tensors, proj_out\.weight among them"):
        loader(folder)._module(tmp_path, "", QwenImageTransformer2DModel)


def loader(folder: Path, device: str = "cpu", **changes: Any) -> Loader:
    made = card(folder, family="qwen-image", **changes)
    return Loader(made, folder, {}, torch.float32, torch.device(device), made.quantise)


def test_a_missing_package_is_named_with_what_needs_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    denoiser = Denoiser(path=str(tmp_path), file="tiny.gguf", format="gguf")
    with_gguf = replace(loader(folder, denoiser=denoiser), files={"denoiser": tmp_path / "tiny.gguf"})
    with pytest.raises(ModelCardError) as caught:
        with_gguf.denoiser("transformer", QwenImageTransformer2DModel)
    assert caught.value.message == (
        "model sketch: loading tiny.gguf as its denoiser needs the package gguf, which is not installed; pip install "
        "'diffusion-farm[quantised]', or choose a card without it"
    )
    adapted = loader(folder, adapters=(Adapter(path=str(tmp_path), file="one.safetensors", name="one"),))
    with pytest.raises(ModelCardError, match="loading adapter one needs the package peft"):
        adapted.adapt(None, QwenImagePipeline)
    with pytest.raises(ModelCardError, match="loading its denoiser as nf4 needs the package bitsandbytes"):
        loader(folder, "cuda", quantise={"denoiser": "nf4"}).denoiser("transformer", QwenImageTransformer2DModel)


def test_nothing_is_quantised_on_a_cpu(folder: Path) -> None:
    family = loaded(folder, quantise={"denoiser": "nf4", "encoder": "int8"})
    assert dict(family.quantised) == {}
    parts = (family._modules.encoder, family._modules.denoiser)
    assert {tensor.dtype for part in parts for tensor in part.parameters()} == {torch.float32}


def test_what_is_asked_of_bitsandbytes_follows_from_the_card(folder: Path) -> None:
    asked = loader(folder, "cuda", quantise={"denoiser": "nf4", "encoder": "int8"})
    assert asked._quantising("denoiser", "transformer", QwenImageTransformer2DModel, dict) == {
        "quantization_config": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.float32,
            "llm_int8_skip_modules": whole_layers(QwenImageTransformer2DModel, folder / "transformer"),
        },
        "device_map": {"": torch.device("cuda")},
    }
    int8 = asked._quantising("encoder", "text_encoder", Qwen2_5_VLForConditionalGeneration, dict)
    assert int8["quantization_config"] == {"load_in_8bit": True}


def test_layers_whose_rows_are_no_whole_blocks_stay_whole(folder: Path) -> None:
    narrow = whole_layers(QwenImageTransformer2DModel, folder / "transformer")
    assert {"img_in", "txt_in", "transformer_blocks.1.attn.to_q"} <= set(narrow)  # 16 and 32 wide
    assert "time_text_embed.timestep_embedder.linear_1" not in narrow  # 256
    words = whole_layers(Qwen2_5_VLForConditionalGeneration, folder / "text_encoder")
    assert "model.language_model.layers.0.self_attn.q_proj" in words
    assert "lm_head" in words


def test_an_adapter_adds_its_weights_by_its_weight_and_is_never_merged(folder: Path, tmp_path: Path) -> None:
    added = write_adapter(tmp_path / "one.safetensors", LAYER, "transformer_blocks.1.attn.to_k")
    also = write_adapter(tmp_path / "two.safetensors", LAYER)
    adapters = tuple(
        Adapter(path=str(tmp_path), file=f"{name}.safetensors", name=name, weight=weight)
        for name, weight in (("one", 0.5), ("two", -1.0))
    )
    family = loaded(folder, adapters=adapters)
    plain = loaded(folder)
    before = draw(plain)
    base = family._modules.denoiser.get_submodule(LAYER).base_layer.weight
    assert torch.equal(base, plain._modules.denoiser.get_submodule(LAYER).weight)
    with torch.no_grad():
        for weight, layers in ((0.5, added), (-1.0, also)):
            for layer, more in layers.items():
                plain._modules.denoiser.get_submodule(layer).weight += weight * more
    assert torch.allclose(draw(family), draw(plain), atol=1e-4)
    assert not torch.allclose(draw(plain), before, atol=1e-3)


def test_an_adapter_over_a_gguf_denoiser_adds_its_weights_to_what_the_blocks_stand_for(
    folder: Path, tmp_path: Path
) -> None:
    meant = write_gguf(folder, tmp_path / "tiny.gguf")
    added = write_adapter(tmp_path / "one.safetensors", LAYER, "transformer_blocks.1.attn.to_k")
    family = loaded(folder, denoiser=gguf_in(tmp_path), adapters=(adapter_in(tmp_path),))
    ours = draw(family)
    adapted: Any = family._modules.denoiser.get_submodule(LAYER)
    assert type(adapted.base_layer).__name__ == "GGUFLinear"
    plain = loaded(folder)
    plain._modules.denoiser.load_state_dict(meant)
    without = draw(plain)
    with torch.no_grad():
        for layer, more in added.items():
            linear: Any = plain._modules.denoiser.get_submodule(layer)
            linear.weight += 0.5 * more
    assert torch.allclose(ours, draw(plain), atol=1e-3)  # scales are applied in half precision
    assert not torch.allclose(ours, without, atol=1e-2)


@pytest.mark.parametrize("adapted", [False, True], ids=["alone", "under an adapter"])
def test_a_gguf_denoiser_draws_the_same_bytes_block_by_block(folder: Path, tmp_path: Path, adapted: bool) -> None:
    write_gguf(folder, tmp_path / "tiny.gguf")
    write_adapter(tmp_path / "one.safetensors", LAYER, "transformer_blocks.1.attn.to_k")
    adapters = (adapter_in(tmp_path),) if adapted else ()
    family = loaded(folder, denoiser=gguf_in(tmp_path), adapters=adapters)
    resident = draw(family)
    denoiser: Any = family._modules.denoiser
    Streamed(denoiser).stream_to(torch.device("cpu"))
    assert [hasattr(block, "_diffusers_hook") for block in denoiser.transformer_blocks] == [True, True]
    assert torch.equal(draw(family), resident)


def test_an_adapter_changes_what_z_image_draws(tmp_path: Path) -> None:
    folder = write_tiny_zimage(tmp_path / "tiny")
    write_adapter(tmp_path / "one.safetensors", "layers.0.attention.to_q", "context_refiner.0.attention.to_k")
    one = Adapter(path=str(tmp_path), file="one.safetensors", name="one")

    def drawn(**changes: Any) -> torch.Tensor:
        family = ZImageFamily(card(folder, **changes), numerics(), device="cpu", vram_gib=16.0)
        family.load()
        prompt = [family.encode(family.tokenize("a red circle"))]
        specs = [spec(0)]
        return family.denoise(
            specs, family.noise(specs), positive=prompt, negative=prompt, on_step=lambda step, of: None
        )

    with_it, without = drawn(adapters=(one,)), drawn()
    assert not torch.allclose(with_it, without, atol=1e-3)
    switched_off = drawn(adapters=(one.model_copy(update={"weight": 0.0}),))
    assert torch.allclose(switched_off, without, atol=1e-4)


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "other.safetensors", LAYER, "transformer_blocks.9.attn.to_q")
    other = (Adapter(path=str(tmp_path), file="other.safetensors", name="other"),)
    with pytest.raises(
        ModelCardError, match=r"other\.safetensors fits 1 layers of the denoiser and has 2; it was made"
    ):
        loaded(folder, adapters=other)
    save_file({"weight": torch.zeros(1)}, tmp_path / "none.safetensors")
    none = (Adapter(path=str(tmp_path), file="none.safetensors", name="none"),)
    with pytest.raises(ModelCardError, match=r"none\.safetensors"):
        loaded(folder, adapters=none)


@pytest.mark.parametrize("below", ["", "vae"], ids=["its own folder", "a model's folder"])
def test_a_decoder_of_its_own_takes_the_place_of_the_models(folder: Path, tmp_path: Path, below: str) -> None:
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", local_files_only=True)
    with torch.no_grad():
        vae.decoder.conv_out.weight.zero_()
        vae.decoder.conv_out.bias.fill_(1.0)
    vae.save_pretrained(tmp_path / below)
    white = loaded(folder, decoder=Source(path=str(tmp_path))).decode(torch.randn(1, 4, 8, 8), spec(0))
    assert int(white.pixels[0].min()) == 255
