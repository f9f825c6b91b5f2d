"""What looking a model's files over finds: each way a download can be wrong."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest

from farm.cardparts import Source
from farm.modelcard import ModelCard
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
    assert part.faults == (f"{encoder.parent / 'model_index.json'} is not there; fetch the weights again",)


def test_a_decoder_of_its_own_is_looked_over_in_place_of_the_models(encoder: Path) -> None:
    vae = encoder.parent / "vae"
    other = own(encoder).model_copy(update={"decoder": Source(path=str(vae))})
    assert [part.name for part in check_weights(other, Settings())] == ["text_encoder", "transformer", "decoder"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not JSON", "cannot be read: Expecting value"),
        ("[" * 200_000, "cannot be read: nested too deep; fetch"),
        ("[]", "is not a JSON object; fetch"),
    ],
)
def test_settings_that_cannot_be_read_are_named(encoder: Path, text: str, said: str) -> None:
    (encoder / "config.json").write_text(text)
    (fault,) = report(encoder).faults
    assert fault.startswith(f"{encoder / 'config.json'} {said}")


@pytest.mark.parametrize("text", ['{"weight_map": {"w": 5}}', '{"weight_map": {"a": "b", "w": 5}}', "[" * 200_000])
def test_an_index_of_anything_but_file_names_is_named(encoder: Path, text: str) -> None:
    index = encoder / "model.safetensors.index.json"
    index.write_text(text)
    (fault,) = report(encoder).faults
    assert fault.startswith(f"{index} is no index of weights")


def test_a_file_without_tensors_is_named(encoder: Path) -> None:
    (encoder.parent / "vae" / "model.safetensors").write_bytes(tensors())
    vae = next(part for part in check_weights(own(encoder), Settings()) if part.name == "vae")
    assert vae.faults == (f"{encoder.parent / 'vae' / 'model.safetensors'} has no tensors; fetch the weights again",)


@pytest.mark.parametrize("name", ["config.json", SHARD.format(1), "model.safetensors.index.json"])
def test_a_pipe_in_place_of_a_file_is_not_read(encoder: Path, name: str) -> None:
    (encoder / name).unlink()
    os.mkfifo(encoder / name)
    assert any(f"{encoder / name} is no" in fault for fault in report(encoder).faults)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("tokenizer/tokenizer.json", "tokenizer has no tokenizer; fetch the weights again"),
        (
            "scheduler/scheduler_config.json",
            "scheduler/scheduler_config.json is not there; fetch the weights again",
        ),
    ],
)
def test_what_a_family_needs_besides_weights_is_named(encoder: Path, file: str, said: str) -> None:
    (encoder.parent / file).unlink()
    part = next(check_weights(own(encoder), Settings()))
    assert (part.name, part.faults) == ("model", (f"{encoder.parent}/{said}",))


def test_a_newbies_second_tokenizer_is_missed(encoder: Path) -> None:
    part = next(check_weights(own(encoder).model_copy(update={"family": "newbie"}), Settings()))
    assert part.faults == (f"{encoder.parent}/clip_tokenizer has no tokenizer; fetch the weights again",)


def test_a_pipelines_parts_that_its_index_names_are_missed(encoder: Path) -> None:
    index = {name: ["diffusers", "X"] for name in ("transformer", "vae", "text_encoder_2", "text_encoder", "feature")}
    index = {"_class_name": "XPipeline", "safety_checker": [None, None], **index, "a\0": ["x", "y"]}
    (encoder.parent / "model_index.json").write_text(json.dumps(index))
    (encoder.parent / "text_encoder_2").mkdir()
    (encoder.parent / "text_encoder_2" / "config.json").write_text("{}")
    part = next(check_weights(own(encoder).model_copy(update={"family": "diffusers"}), Settings()))
    assert part.faults == (
        f"{encoder.parent}/text_encoder_2 has no .safetensors file; fetch the weights again",
        f"{encoder.parent}/feature, which model_index.json names, is not there or empty; fetch the weights again",
        f"{encoder.parent}/model_index.json names a part 'a\\x00', which no folder is called; fetch the weights again",
    )


def test_code_is_held_against_its_hashes_and_not_run(encoder: Path) -> None:
    index = {"_class_name": ["pipeline", "X"], "transformer": ["diffusers", "X"], "vae": ["my_vae", "X"]}
    (encoder.parent / "model_index.json").write_text(json.dumps(index))
    (encoder.parent / "pipeline.py").write_text("raise SystemExit\n")
    sha256 = hashlib.sha256(b"raise SystemExit\n").hexdigest()
    changes = {"family": "diffusers", "code": {"pipeline.py": sha256, "vae/my_vae.py": sha256}}
    *parts, code = check_weights(own(encoder).model_copy(update=changes), Settings())
    assert [(part.name, part.faults) for part in parts] == [("transformer", ()), ("vae", ())]
    assert code == PartReport(
        "code",
        2,
        17,
        (),
        (
            f"{encoder.parent}/vae/my_vae.py, pinned as code, cannot be read: No such file or directory; fetch the weights "
            "again, or mend the card's code",
        ),
    )
    unpinned = own(encoder).model_copy(update={"family": "diffusers"})
    not_pinned = (
        "that the card does not pin, and it is not run: pin it (`code`) once it is read, or choose another model"
    )
    assert next(check_weights(unpinned, Settings())).faults == (
        f"{encoder.parent}/model_index.json names code, 'pipeline', {not_pinned}",
        f"{encoder.parent}/model_index.json names as its vae code, 'my_vae', {not_pinned}",
    )


@pytest.mark.parametrize("text", ["{}", "[" * 200_000, "[]", ""])
def test_an_index_of_no_parts_is_a_fault(encoder: Path, text: str) -> None:
    (encoder.parent / "model_index.json").write_text(text)
    (part,) = check_weights(own(encoder).model_copy(update={"family": "diffusers"}), Settings())
    assert part.faults[0].startswith(f"{encoder.parent / 'model_index.json'} ")
