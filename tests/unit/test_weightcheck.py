"""What looking a model's files over finds: each way a download can be wrong."""

import json
import pickle
from pathlib import Path

import pytest

from farm.modelcard import ModelCard, Source
from farm.settings import Settings
from farm.weightcheck import PartReport, check_weights
from tests.drawing import card
from tests.unit.cli.test_models import tensors, write_model

SHARD = "model-0000{}-of-00002.safetensors"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """The folder of a text encoder in two shards, of a model that is otherwise sound."""
    write_model(tmp_path)
    folder = tmp_path / "weights" / "text_encoder"
    (folder / "model.safetensors").unlink()
    for number, name in ((1, "a"), (2, "b")):
        (folder / SHARD.format(number)).write_bytes(tensors(**{name: ("BF16", (3,), 6)}))
    index = {"weight_map": {"a": SHARD.format(1), "b": SHARD.format(2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "weights" / "transformer" / "model.safetensors").write_bytes(tensors(w=("BF16", (3,), 6)))
    return folder


def own(encoder: Path) -> ModelCard:
    return card(encoder.parent)


def report(encoder: Path) -> PartReport:
    return next(part for part in check_weights(own(encoder), Settings()) if part.name == "text_encoder")


def test_shards_count_together_and_other_files_do_not(encoder: Path) -> None:
    (encoder / "model.fp16.safetensors").write_bytes(b"of another variant")
    assert report(encoder) == PartReport("text_encoder", 2, 12, (("BF16", 6),), ())


def test_a_shard_that_is_not_there_is_named(encoder: Path) -> None:
    (encoder / SHARD.format(2)).unlink()
    assert report(encoder).faults == (f"{encoder / SHARD.format(2)} is not there; fetch the weights again",)


def test_a_shard_of_other_tensors_than_the_index_says_is_named(encoder: Path) -> None:
    (encoder / SHARD.format(2)).write_bytes(tensors(c=("BF16", (3,), 6)))
    assert report(encoder).faults == (
        f"{encoder / SHARD.format(2)} lacks 1 tensors of its index, b first; fetch it again",
    )


def test_a_broken_index_is_named(encoder: Path) -> None:
    (encoder / "model.safetensors.index.json").write_text("{}")
    (fault,) = report(encoder).faults
    assert fault.startswith(f"{encoder / 'model.safetensors.index.json'} is no index of weights")


@pytest.mark.parametrize("data", [b"PK\x03\x04torch's archive", pickle.dumps({"w": [1, 2]})])
def test_a_pickle_under_another_name_is_named(encoder: Path, data: bytes) -> None:
    (encoder / SHARD.format(1)).write_bytes(data)
    assert report(encoder).faults == (
        f"{encoder / SHARD.format(1)} is a pickle, whatever it is called; take another file",
    )


def test_a_part_with_pickles_alone_is_told_that_they_are_not_read(encoder: Path) -> None:
    for file in encoder.glob("*.safetensors*"):
        file.unlink()
    (encoder / "pytorch_model.bin").write_bytes(b"")
    assert report(encoder).faults == (
        f"{encoder} has no .safetensors file, only pytorch_model.bin, and pickles are not read; fetch the weights again",
    )


def test_a_part_without_its_settings_is_named(encoder: Path) -> None:
    (encoder / "config.json").unlink()
    assert report(encoder).faults == (f"{encoder / 'config.json'} is not there; fetch the weights again",)


def test_a_model_without_an_index_of_its_parts_is_one_fault(encoder: Path) -> None:
    other = own(encoder).model_copy(update={"family": "diffusers"})
    (part,) = check_weights(other, Settings())
    assert part.name == "model"
    assert part.faults[0].startswith(f"model sketch: {encoder.parent / 'model_index.json'} cannot be read")


def test_a_decoder_of_its_own_is_looked_over_in_place_of_the_models(encoder: Path) -> None:
    vae = encoder.parent / "vae"
    other = own(encoder).model_copy(update={"decoder": Source(path=str(vae))})
    assert [part.name for part in check_weights(other, Settings())] == ["text_encoder", "transformer", "decoder"]
