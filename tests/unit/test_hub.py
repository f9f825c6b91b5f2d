"""Which commit a hub id stands for: the card's word, the cache, the hub, in this order."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from farm.cardparts import Source
from farm.errors import ModelCardError
from farm.hub import commit_of
from farm.weights import pinned
from tests.drawing import card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Questions that reach the hub, which knows COMMIT only as `main`."""
    questions: list[str] = []

    def model_info(self: object, repo_id: str, *, revision: str, timeout: float) -> huggingface_hub.ModelInfo:
        questions.append(f"{repo_id}@{revision}")
        if revision != "main":
            raise ConnectionError("the hub does not answer")
        return huggingface_hub.ModelInfo(id=repo_id, sha=COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return questions


def test_a_commit_is_taken_as_it_stands(asked: list[str]) -> None:
    assert commit_of("z", "some/model", COMMIT) == COMMIT
    assert asked == []


def test_a_cached_branch_needs_no_network(asked: list[str], tmp_path: Path) -> None:
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(OTHER)
    (repo / "snapshots" / OTHER).mkdir(parents=True)
    (repo / "snapshots" / OTHER / "model_index.json").write_text("{}")
    assert commit_of("z", "some/model", None) == OTHER
    assert asked == []


def test_without_a_branch_the_one_cached_commit_will_do(asked: list[str], tmp_path: Path) -> None:
    snapshots = tmp_path / "models--some--model" / "snapshots"
    (snapshots / OTHER).mkdir(parents=True)
    assert commit_of("z", "some/model", None) == OTHER
    assert asked == []
    (snapshots / ("e" * 40)).mkdir()
    assert commit_of("z", "some/model", None) == COMMIT
    assert asked == ["some/model@main"]


def test_what_is_not_cached_is_asked_of_the_hub(asked: list[str]) -> None:
    hub = card().model_copy(update={"source": Source(hub="some/model")})
    assert pinned(hub).source == Source(hub="some/model", revision=COMMIT)
    assert asked == ["some/model@main"]


def test_without_cache_and_network_the_card_is_to_name_a_commit(asked: list[str]) -> None:
    with pytest.raises(ModelCardError) as caught:
        commit_of("z", "some/model", "v2")
    assert caught.value.message == (
        "model z: the commit of some/model at revision v2 is neither in the cache nor to be had from the hub: the hub does "
        "not answer; check the network, the id, the revision and HF_TOKEN, or name a commit as the card's source.revision"
    )


def test_a_name_that_is_no_hub_id_is_refused(asked: list[str]) -> None:
    with pytest.raises(ModelCardError, match="model z: the commit of not a hub id at revision main"):
        commit_of("z", "not a hub id", None)
