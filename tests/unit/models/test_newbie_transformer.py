"""NewBie's denoiser against diffusers' Lumina2, and both of its published layouts."""

import pytest
import torch
from diffusers import Lumina2Transformer2DModel

from farm.errors import ModelCardError
from farm.models.device import Streamed
from farm.models.newbie_keys import converted, shape_of
from farm.models.newbie_transformer import Caption, NewBieTransformer
from tests.newbie import CAPTION, HIDDEN, POOLED, as_published, denoiser_tensors

TIMES = torch.tensor([0.3, 0.7])


def model_of(tensors: dict[str, torch.Tensor]) -> NewBieTransformer:
    plain = converted("tiny", tensors)
    with torch.device("meta"):
        model = NewBieTransformer(**shape_of("tiny", plain, {}))
    model.load_state_dict(plain, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return denoiser_tensors()


@pytest.fixture(scope="module")
def model(tensors: dict[str, torch.Tensor]) -> NewBieTransformer:
    return model_of(tensors)


def captions(lengths: tuple[int, ...], *, pooled: bool = True) -> list[Caption]:
    torch.manual_seed(1)
    states = [torch.randn(length, CAPTION) for length in lengths]
    return [Caption(each, torch.randn(POOLED) if pooled else None) for each in states]


@torch.inference_mode()
def predict(model: NewBieTransformer, latents: torch.Tensor, times: torch.Tensor, given: list[Caption]) -> torch.Tensor:
    height, width = latents.shape[-2:]
    return model(latents, times, model.prepare(given, height=height, width=width))


@pytest.mark.parametrize("lengths", [(5, 5), (3, 9)], ids=["of one length", "of two lengths"])
@pytest.mark.parametrize("size", [(8, 8), (6, 14)], ids=["square", "wide"])
def test_without_a_pooled_vector_it_is_diffusers_lumina2(
    model: NewBieTransformer, tensors: dict[str, torch.Tensor], lengths: tuple[int, int], size: tuple[int, int]
) -> None:
    names = ("patch_size", "in_channels", "hidden_size", "num_layers", "num_refiner_layers", "num_attention_heads")
    names += ("num_kv_heads", "axes_dim_rope", "axes_lens", "cap_feat_dim")
    stock = Lumina2Transformer2DModel(**{name: model.config[name] for name in names}).eval()
    stock.load_state_dict({name: tensors[name] for name in stock.state_dict()})
    given = captions(lengths, pooled=False)
    latents = torch.randn(2, 4, *size)
    mask = torch.tensor([[place < length for place in range(max(lengths))] for length in lengths])
    padded = torch.nn.utils.rnn.pad_sequence([caption.states for caption in given], batch_first=True)
    with torch.inference_mode():
        expected = stock(latents, TIMES, padded, mask.long(), return_dict=False)[0]
    assert torch.allclose(predict(model, latents, TIMES, given), expected, atol=1e-5, rtol=1e-5)


def test_the_pooled_vector_joins_the_times_embedding_in_the_modulation(
    model: NewBieTransformer, tensors: dict[str, torch.Tensor]
) -> None:
    given = captions((4,))
    vector = given[0].pooled
    assert vector is not None
    norm = vector * torch.rsqrt(vector.pow(2).mean() + 1e-5) * tensors["clip_text_pooled_proj.0.weight"]
    pooled = tensors["clip_text_pooled_proj.1.weight"] @ norm + tensors["clip_text_pooled_proj.1.bias"]
    embed = model.time_caption_embed
    with torch.inference_mode():
        time = embed.timestep_embedder(embed.time_proj(TIMES[:1]))[0]
    joined = torch.nn.functional.silu(torch.cat([time, pooled]))
    expected = tensors["time_text_embed.1.weight"] @ joined + tensors["time_text_embed.1.bias"]
    seen: list[torch.Tensor] = []
    handle = model.norm_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    predict(model, torch.randn(1, 4, 8, 8), TIMES[:1], given)
    handle.remove()
    assert expected.shape == (HIDDEN,)
    assert torch.allclose(seen[0][0], expected, atol=1e-5)


def test_an_image_hardly_depends_on_the_captions_beside_its_own(model: NewBieTransformer) -> None:
    given = captions((3, 9))
    latents = torch.randn(2, 4, 8, 8)
    together = predict(model, latents, TIMES, given)
    alone = [predict(model, latents[i : i + 1], TIMES[i : i + 1], given[i : i + 1]) for i in range(2)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_captions_past_the_stock_tables_are_taken(model: NewBieTransformer) -> None:
    assert model.config.axes_lens[0] == 1024
    out = predict(model, torch.randn(1, 4, 8, 8), TIMES[:1], captions((1100,)))
    assert torch.isfinite(out).all()


def test_streamed_block_by_block_it_predicts_the_same_at_every_step(tensors: dict[str, torch.Tensor]) -> None:
    model, given, latents = model_of(tensors), captions((3, 9)), torch.randn(2, 4, 8, 8)
    expected = predict(model, latents, TIMES, given)
    Streamed(model).stream_to(torch.device("cpu"))
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(model(latents, TIMES, given), expected)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["the authors'", "ComfyUI's"])
def test_the_authors_names_give_the_same_model_as_diffusers(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    published = {f"{prefix}{name}": tensor for name, tensor in as_published(tensors).items()}
    assert f"{prefix}layers.0.attention.qkv.weight" in published
    plain = converted("tiny", published)
    assert plain.keys() == tensors.keys()
    assert all(torch.equal(plain[name], tensors[name]) for name in tensors)


def test_the_pooled_inputs_tensors_are_told_by_their_shapes(tensors: dict[str, torch.Tensor]) -> None:
    moved = {
        name.replace("clip_text_pooled_proj.", "time_caption_embed.pooled.").replace(
            "time_text_embed.1", "time_caption_embed.joined"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert "time_caption_embed.joined.bias" in moved
    plain = converted("tiny", moved)
    assert all(torch.equal(plain[name], tensors[name]) for name in tensors)


def test_a_models_shape_follows_from_its_tensors(tensors: dict[str, torch.Tensor]) -> None:
    shape = shape_of("tiny", tensors, {})
    assert (shape["hidden_size"], shape["num_layers"], shape["num_attention_heads"], shape["num_kv_heads"]) == (
        24,
        2,
        2,
        1,
    )
    assert (shape["in_channels"], shape["cap_feat_dim"], shape["pooled_dim"]) == (4, CAPTION, POOLED)
    assert shape["axes_dim_rope"] == (4, 4, 4)
    given = shape_of("tiny", tensors, {"axes_dims": [8, 2, 2], "norm_eps": 1e-6})
    assert (given["axes_dim_rope"], given["norm_eps"]) == ((8, 2, 2), 1e-6)


def test_the_default_shape_is_the_published_models() -> None:
    with torch.device("meta"):
        model = NewBieTransformer()
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sizes["time_text_embed.1.weight"] == (1024, 2048)
    assert sizes["clip_text_pooled_proj.1.weight"] == (1024, 1024)
    assert sizes["layers.35.attn.to_k.weight"] == (768, 2304)
    assert sizes["layers.0.feed_forward.linear_1.weight"] == (9216, 2304)
    assert sum(tensor.numel() for tensor in model.parameters()) == pytest.approx(3.48e9, rel=0.01)


def test_another_models_tensors_are_refused(tensors: dict[str, torch.Tensor]) -> None:
    lumina = {name: tensor for name, tensor in tensors.items() if not name.startswith(("clip_text", "time_text"))}
    told = r"^model tiny: its denoiser is not NewBie's: beside Lumina2's tensors it has 0 \(none\) in place of the five"
    with pytest.raises(ModelCardError, match=told):
        converted("tiny", lumina)
    with pytest.raises(
        ModelCardError, match=r"it has 6 \(.*control\.weight.*\) in place of the five of a pooled input"
    ):
        converted("tiny", tensors | {"control.weight": torch.ones(3)})
    with pytest.raises(ModelCardError, match=r"'x_embedder\.weight' is not among its tensors; name another file"):
        shape_of("tiny", {}, {})
