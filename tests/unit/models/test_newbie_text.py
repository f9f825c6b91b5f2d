"""NewBie's readers of prompts: Jina CLIP v2's text tower against its formulas, Gemma against transformers' whole model."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import Gemma3Model

from farm.errors import ModelCardError
from farm.models.newbie_text import SYSTEM_PROMPT, Adapter, Gemma, for_gemma, load_jina, merged, pooled_of
from tests.newbie import ALPHA, JINA, POOLED, RANK, jina_config, jina_tensors, write, write_tiny_newbie

IDS = torch.tensor([[2, 4, 5, 8, 11, 30]])


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return jina_tensors()


def by_its_formulas(tensors: dict[str, torch.Tensor], ids: torch.Tensor, *, adapted: bool) -> torch.Tensor:
    """The tower as published: the adapter computed beside the weights, norms after each half of a block, a mean at the end."""
    root, heads, scale = "text_model.transformer.roberta.", JINA["num_attention_heads"], (ALPHA / RANK) * adapted

    def weight(name: str) -> torch.Tensor:
        given = f"{root}{name}.parametrizations.weight."
        a, b = (tensors[f"{given}0.lora_{letter}"][0] for letter in "AB")
        return tensors[f"{given}original"] + scale * (a @ b if name.startswith("embeddings") else b @ a)

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, weight(name), tensors[f"{root}{name}.bias"])

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(states, (POOLED,), tensors[f"{root}{name}.weight"], tensors[f"{root}{name}.bias"])

    half = POOLED // heads // 2
    angles = torch.outer(torch.arange(len(ids)).float(), 20000.0 ** -(torch.arange(half) / half))
    sines, cosines = (torch.cat([each, each], dim=-1)[:, None] for each in (angles.sin(), angles.cos()))

    def turned(states: torch.Tensor) -> torch.Tensor:
        return states * cosines + torch.cat([-states[..., half:], states[..., :half]], dim=-1) * sines

    states = weight("embeddings.word_embeddings")[ids] + weight("embeddings.token_type_embeddings")[0]
    states = norm("emb_ln", states)
    for layer in range(JINA["num_hidden_layers"]):
        block = f"encoder.layers.{layer}"
        query, key, value = linear(f"{block}.mixer.Wqkv", states).view(len(ids), 3, heads, -1).unbind(dim=1)
        scores = torch.einsum("qhd,khd->hqk", turned(query), turned(key)) / (POOLED / heads) ** 0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value).flatten(1)
        states = norm(f"{block}.norm1", states + linear(f"{block}.mixer.out_proj", mixed))
        inner = functional.gelu(linear(f"{block}.mlp.fc1", states))
        states = norm(f"{block}.norm2", states + linear(f"{block}.mlp.fc2", inner))
    return states.mean(dim=0)


@pytest.mark.parametrize("adapted", [True, False], ids=["with its adapter", "without a default task"])
def test_a_pooled_vector_is_the_published_towers(
    tensors: dict[str, torch.Tensor], tmp_path: Path, adapted: bool
) -> None:
    config = jina_config()
    if not adapted:
        config["text_config"]["default_lora_task"] = None
    write(tmp_path, "model.safetensors", tensors, config)
    tower = load_jina("tiny", tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        pooled = pooled_of(tower, IDS)
    assert pooled.shape == (1, POOLED)
    assert torch.allclose(pooled[0], by_its_formulas(tensors, IDS[0], adapted=adapted), atol=1e-5)
    other = by_its_formulas(tensors, IDS[0], adapted=not adapted)
    assert (pooled[0] - other).abs().max() > 0.01


def test_a_tower_is_read_in_shards_and_without_its_prefix(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write(tmp_path / "whole", "model.safetensors", tensors, jina_config())
    plain = merged(
        {
            name.removeprefix("text_model.transformer.roberta."): tensor
            for name, tensor in tensors.items()
            if "roberta" in name
        },
        Adapter(0, float(ALPHA)),
        dtype=torch.float32,
    )
    names = sorted(plain)
    files = {name: f"model-0000{place % 2 + 1}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        write(tmp_path / "shards", file, {name: plain[name] for name in names if files[name] == file}, jina_config())
    write(tmp_path / "shards", "stray.safetensors", {"emb_ln.weight": torch.zeros(POOLED)}, jina_config())
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    whole, shards = (load_jina("tiny", tmp_path / folder, dtype=torch.float32) for folder in ("whole", "shards"))
    with torch.inference_mode():
        assert torch.equal(pooled_of(whole, IDS), pooled_of(shards, IDS))


def test_a_tower_that_pools_otherwise_or_lacks_tensors_is_refused(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    config = jina_config()
    config["text_config"]["pooler_type"] = "cls_pooler"
    write(tmp_path, "model.safetensors", tensors, config)
    with pytest.raises(ModelCardError, match=r"config\.json is not Jina CLIP v2's: .*\('cls_pooler', None, False\)"):
        load_jina("tiny", tmp_path, dtype=torch.float32)
    lacking = {name: tensor for name, tensor in tensors.items() if "emb_ln" not in name}
    write(tmp_path, "model.safetensors", lacking, jina_config())
    with pytest.raises(
        ModelCardError, match=r"lacks 2 of the tensors of its model, embeddings\.LayerNorm\.bias among them"
    ):
        load_jina("tiny", tmp_path, dtype=torch.float32)


def test_gemmas_language_model_is_loaded_out_of_the_whole(tmp_path: Path) -> None:
    folder = write_tiny_newbie(tmp_path) / "text_encoder"
    ours, told = Gemma.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not told["missing_keys"]
    assert not [name for name in ours.state_dict() if "vision" in name]
    whole = Gemma3Model.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    whole.language_model.layers[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        states = ours(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states[-2]
        whole.language_model(input_ids=IDS, use_cache=False)
    assert torch.equal(states, seen[0])


def test_gemma_reads_a_prompt_behind_the_system_prompt_and_an_empty_one_alone() -> None:
    assert for_gemma("1girl", SYSTEM_PROMPT) == f"{SYSTEM_PROMPT} <Prompt Start> 1girl"
    assert for_gemma("", SYSTEM_PROMPT) == ""
    assert for_gemma("1girl", "") == "1girl"
