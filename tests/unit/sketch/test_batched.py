import json

import pytest
import torch

from farm.sketch import WEIGHTS
from farm.sketch.architecture import build_text_encoder, build_tokenizer, build_transformer, token_ids
from farm.sketch.batched import BatchedModel, pad_ids, patchify
from farm.sketch.muon import orthogonal

PROMPTS = ["a red circle left of a blue star on a white background", "", "héllo 2 tiny, GREY discs & a 狗"]


def tokenized(prompt: str) -> list[int]:
    """As the pipeline does it."""
    tokenizer = build_tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    inputs = tokenizer([text], padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    return inputs.input_ids[0][inputs.attention_mask[0].bool()].tolist()


@pytest.mark.parametrize("prompt", [*PROMPTS, "unheard of words " * 30])
def test_tokenizer_and_rules_agree(prompt: str) -> None:
    assert token_ids(prompt) == tokenized(prompt)


def test_shipped_tokenizer_is_the_built_one() -> None:
    shipped = json.loads((WEIGHTS / "tokenizer" / "tokenizer.json").read_text())
    built = json.loads(build_tokenizer().backend_tokenizer.to_str())
    for part in ("model", "normalizer", "pre_tokenizer", "added_tokens"):
        assert shipped[part] == built[part], part


@torch.no_grad()
def test_batched_pass_gives_the_numbers_of_the_library() -> None:
    torch.manual_seed(0)
    transformer, text_encoder = build_transformer(8).eval(), build_text_encoder().eval()
    torch.nn.init.normal_(transformer.cap_pad_token)
    latents, time = torch.randn(len(PROMPTS), 8, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    captions = [token_ids(prompt) for prompt in PROMPTS]
    encoded = [text_encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0] for ids in captions]
    library = transformer(list(latents.unsqueeze(2)), time, encoded, return_dict=False)[0]
    batched = BatchedModel(transformer, text_encoder)(patchify(latents), time, *pad_ids(captions))
    assert torch.allclose(patchify(torch.stack(library).squeeze(2)), batched, atol=1e-5)


def test_muon_makes_matrices_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    directions = orthogonal(torch.randn(2, 16, 40)).float()
    assert torch.linalg.svdvals(directions).sub(1).abs().max() < 0.5
