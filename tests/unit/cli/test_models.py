import hashlib
import json
import struct
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Place

CARD = """\
name: own
title: Own
family: z-image
source: {path: weights}
licence: NC-1.0
licence_warning: for study alone
dtypes: {cpu: [float32]}
batch: {cpu: 4}
defaults: {width: 64, height: 64, num_inference_steps: 8, guidance_scale: 2}
denoiser: {path: ., file: q.safetensors, format: safetensors}
adapters: [{name: quick, path: ., file: lora.safetensors, weight: 0.5}]
scheduler: {name: flow-euler, options: {shift: 3}}
presets: {bold: {guidance_scale: 9, warning: its authors give 2}}
negative_prompts: {plain: blurry, blank: " "}
"""


def tensors(**shapes: tuple[str, tuple[int, ...], int]) -> bytes:
    """A safetensors file: name -> dtype, shape, bytes."""
    at, header = 0, {}
    for name, (dtype, shape, size) in shapes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def write_model(folder: Path) -> None:
    for part in ("text_encoder", "vae", "transformer"):
        (folder / "weights" / part).mkdir(parents=True)
        (folder / "weights" / part / "config.json").write_text("{}")
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        (folder / "weights" / name).parent.mkdir()
        (folder / "weights" / name).write_text("{}")
    (folder / "weights" / "text_encoder" / "model.safetensors").write_bytes(tensors(w=("BF16", (10, 5), 100)))
    (folder / "weights" / "vae" / "model.safetensors").write_bytes(tensors(w=("F32", (2, 5), 40), b=("F16", (4,), 8)))
    (folder / "q.safetensors").write_bytes(tensors(w=("F8_E4M3", (30, 100), 3000)))
    (folder / "lora.safetensors").write_bytes(tensors(w=("BF16", (5,), 10)))


@pytest.fixture
def own(farm: Place) -> Place:
    """A farm with a card whose model is in four places beside it."""
    (farm.folder / "cards" / "own.yaml").write_text(CARD)
    write_model(farm.folder / "cards")
    return farm


def test_models_lists_cards_and_whether_their_weights_are_here(farm: Place) -> None:
    lines = farm("models").out.splitlines()
    assert lines[0].split() == ["name", "title", "family", "size", "steps", "licence", "weights"]
    shapes = next(line for line in lines if line.startswith("shapes"))
    assert shapes.split() == ["shapes", "Shapes", "sleep", "64×64", "4", "Apache-2.0", "here"]
    assert farm("models", "list").out.splitlines() == lines


def test_one_model_in_full(farm: Place) -> None:
    ended = farm("models", "shapes")
    assert "  defaults   64×64, 4 steps, guidance 2.5\n" in ended.out
    assert farm("models", "show", "shapes").out == ended.out
    assert json.loads(farm("models", "shapes", "--json").out)["weights"] == "here"
    assert json.loads(farm("models", "--json", "shapes").out)["name"] == "shapes"


def test_what_a_card_lays_over_its_model_and_warns_of_is_shown(own: Place) -> None:
    lines = [" ".join(line.split()) for line in own("models", "own").out.splitlines()]
    cards = own.folder / "cards"
    for line in (
        f"source {cards / 'weights'} (here)",
        f"denoiser {cards}, q.safetensors",
        f"adapter quick, weight 0.5: {cards}, lora.safetensors",
        "scheduler flow-euler, shift 3",
        "warning NC-1.0: for study alone",
        "preset bold: guidance_scale 9.0",
        "warning bold: its authors give 2",
        "negative @plain: blurry",
        "negative @blank: a blank",
    ):
        assert line in lines


def test_an_unknown_model_names_the_nearest(farm: Place) -> None:
    for words in (("models", "shape"), ("models", "pull", "shape"), ("models", "check", "shape")):
        ended = farm(*words)
        assert ended.code == 2
        assert "did you mean shapes?" in ended.error


@pytest.mark.parametrize("name", ["list", "show", "pull", "check"])
def test_every_subcommand_takes_the_shared_flags(farm: Place, name: str) -> None:
    ended = farm("models", name, "--help")
    assert ended.code == 0
    for flag in ("--store", "--models", "--json", "--verbose"):
        assert flag in ended.out


def test_pull_says_where_each_part_lies(own: Place) -> None:
    cards = own.folder / "cards"
    assert own("models", "pull", "own").out.splitlines() == [
        f"model      {cards / 'weights'}",
        f"denoiser   {cards}",
        f"adapter quick {cards}",
    ]
    assert json.loads(own("models", "pull", "own", "--json").out)["folders"]["model"] == str(cards / "weights")


def test_pull_of_a_bucket_tells_the_bytes_and_check_finds_it(own: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from farm import weights
    from farm.storage.local import LocalStore

    cards = own.folder / "cards"
    monkeypatch.setattr(weights, "open_store", lambda url, settings: LocalStore(cards / "weights"))
    monkeypatch.setenv("FARM_WEIGHTS", str(own.folder / "copies"))
    (cards / "own.yaml").write_text(CARD.replace("{path: weights}", "{s3: s3://farm/own}"))
    absent = own("models", "check", "own")
    assert absent.code == 2
    assert absent.error.endswith("its weights are not all on this machine; fetch them with `farm models pull own`")
    assert "own: not here; farm models pull own fetches it" in own("models", "check").out
    ended = own("models", "pull", "own")
    assert ended.code == 0
    assert ended.err.splitlines()[-1].startswith("own, model: ")
    assert own("models", "check", "own").code == 0


def test_check_says_what_each_part_weighs(own: Place) -> None:
    ended = own("models", "check", "own")
    assert ended.code == 0
    assert [" ".join(line.split()) for line in ended.out.splitlines()] == [
        "own",
        "text_encoder 100 B 1 file 50 BF16",
        "vae 48 B 1 file 10 F32, 4 F16",
        "denoiser 3.0 kB 1 file 3.0 k F8_E4M3",
        "adapter quick 10 B 1 file 5 BF16",
    ]
    (model,) = json.loads(own("models", "check", "own", "--json").out)["models"]
    assert [part["size_bytes"] for part in model["parts"]] == [100, 48, 3000, 10]


def test_check_ends_with_7_where_a_file_is_wrong(own: Place) -> None:
    vae = own.folder / "cards" / "weights" / "vae" / "model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1])
    ended = own("models", "check", "own")
    assert ended.code == 7
    assert f"  FAULT {vae} is cut off or not a safetensors file; fetch the weights again" in ended.out.splitlines()
    assert ended.err == "1 fault; pull the model again, or mend its card\n"
    assert json.loads(own("models", "check", "own", "--json").out)["sound"] is False


def test_code_that_a_card_runs_is_told_with_its_digest_and_permission(
    own: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = own.folder / "cards" / "weights"
    (weights / "pipeline.py").write_text("raise SystemExit\n")
    sha256 = hashlib.sha256(b"raise SystemExit\n").hexdigest()
    (weights / "model_index.json").write_text(
        json.dumps({"_class_name": ["pipeline", "X"], "transformer": ["pipeline", "Y"], "vae": ["diffusers", "Z"]})
    )
    (weights / "transformer" / "model.safetensors").write_bytes(tensors(w=("BF16", (5,), 10)))
    plain = CARD[: CARD.index("denoiser:")].replace("z-image", "diffusers")
    (own.folder / "cards" / "own.yaml").write_text(f"{plain}code: {{pipeline.py: {sha256}}}\n")
    digest = hashlib.sha256(f'{{"pipeline.py":"{sha256}"}}'.encode()).hexdigest()
    forbidden = f"""not allowed here; FARM_REMOTE_CODE='["{digest}"]' allows it, once it is read"""
    for command, file in (
        ("show", "code       pipeline.py\n  digest     "),
        ("check", "code                 17 B  1 file  "),
    ):
        monkeypatch.delenv("FARM_REMOTE_CODE", raising=False)
        assert f"  {file}{digest}, {forbidden}\n" in own("models", command, "own").out
        monkeypatch.setenv("FARM_REMOTE_CODE", f'["{digest}"]')
        ended = own("models", command, "own")
        assert ended.code == 0
        assert f"  {file}{digest}, allowed here\n" in ended.out
        found = json.loads(own("models", command, "own", "--json").out)
        assert {"code_digest": digest, "code_allowed": True}.items() <= found.get("models", [found])[0].items()
    (weights / "pipeline.py").write_text("print()\n")
    ended = own("models", "check", "own")
    assert ended.code == 7
    assert f"  FAULT {weights / 'pipeline.py'} is not the code that the card pins (sha256 " in ended.out


@pytest.mark.parametrize("words", [("models",), ("models", "list"), ("models", "check")])
def test_a_bad_card_hides_no_other(own: Place, words: tuple[str, ...]) -> None:
    (own.folder / "cards" / "bad.yaml").write_text("name: [")
    ended = own(*words)
    assert ended.code == (7 if "check" in words else 2)
    assert f"FAULT {own.folder / 'cards' / 'bad.yaml'}:1: not YAML" in ended.out
    assert any(line.startswith("own") for line in ended.out.splitlines())
    answer = own(*words, "--json")
    assert answer.code == ended.code
    found = json.loads(answer.out)
    assert "own" in [one["name"] for one in found["models"]]
    if "check" in words:
        (bad,) = [one for one in found["models"] if one["name"] == "bad"]
        assert found["sound"] is False
        assert bad["weights"] == "unknown"
        assert bad["parts"][0]["faults"][0].startswith(f"{own.folder / 'cards' / 'bad.yaml'}:1: not YAML")
    else:
        assert [one["name"] for one in found["faults"]] == ["bad"]


def test_check_of_damaged_weights_is_a_fault_each(own: Place) -> None:
    folder = own.folder / "cards" / "weights"
    damaged = tensors(w=("\x1b[31m", (1,), 2))
    (folder / "vae" / "model.safetensors").write_bytes(damaged)
    (folder / "text_encoder" / "model.safetensors.index.json").write_text('{"weight_map": {"w": 5}}')
    (folder / "text_encoder" / "config.json").write_text("[" * 200_000)
    ended = own("models", "check", "own")
    assert ended.code == 7
    assert "\x1b" not in ended.out
    assert ended.out.count("  FAULT ") == 3
