"""Code that comes with weights: run where the card pins it and the machine allows it, from the bytes that were checked."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from farm.errors import ModelCardError
from farm.modelcard import ModelCard
from farm.models.pipeline import PipelineFamily
from farm.pinnedcode import digest_of
from tests.drawing import card, numerics, spec
from tests.tiny_pipelines import write_tiny_lumina
from tests.unit.models.test_pipeline import rendered

PIPELINE = """\
from diffusers import Lumina2Pipeline

from .transformer.my_transformer import MyTransformer


class MyPipeline(Lumina2Pipeline):
    pass
"""
TRANSFORMER = """\
from diffusers import Lumina2Transformer2DModel

from . import blocks


class MyTransformer(Lumina2Transformer2DModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return (out[0] * blocks.SCALE, *out[1:])
"""
FILES = {
    "pipeline.py": PIPELINE,
    "transformer/my_transformer.py": TRANSFORMER,
    "transformer/blocks.py": "SCALE = 1.0\n",
}
INDEX = {"_class_name": ["pipeline", "MyPipeline"], "transformer": ["my_transformer", "MyTransformer"]}

Write = Callable[..., ModelCard]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lumina(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def write(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a model with these files of code, changes of those above, and these entries of its index; returns a card that pins
    them all and is allowed."""
    monkeypatch.delenv("FARM_REMOTE_CODE", raising=False)

    def written(name: str = "coded", files: dict[str, str] | None = None, **index: object) -> ModelCard:
        folder = tmp_path / name
        shutil.copytree(stock, folder)
        code = FILES | (files or {})
        for file, text in code.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text)
        said = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(said | INDEX | index))
        pins = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in code.items()}
        made = card(folder, family="diffusers", code=pins)
        allow(made, monkeypatch)
        return made

    return written


def allow(made: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = [*json.loads(os.environ.get("FARM_REMOTE_CODE", "[]")), digest_of(made)]
    monkeypatch.setenv("FARM_REMOTE_CODE", json.dumps(allowed))


def loaded(made: ModelCard) -> PipelineFamily:
    family = PipelineFamily(made, numerics(), device="cpu", vram_gib=16.0)
    family.load()
    return family


def refusal(made: ModelCard) -> str:
    with pytest.raises(ModelCardError) as caught:
        loaded(made)
    return caught.value.message


def drawn(made: ModelCard) -> Any:
    return rendered(loaded(made), [spec(0, guidance_scale=4.0)])[0].pixels


def folder_of(made: ModelCard) -> Path:
    return Path(str(made.source.path))


def test_code_that_is_pinned_and_allowed_draws_what_the_stock_pipeline_does(stock: Path, write: Write) -> None:
    plain = drawn(card(stock, family="diffusers"))
    family = loaded(write())
    assert [type(part).__name__ for part in (family._pipeline, family._pipeline.transformer)] == [
        "MyPipeline",
        "MyTransformer",
    ]
    assert np.array_equal(rendered(family, [spec(0, guidance_scale=4.0)])[0].pixels, plain)


def test_what_the_code_says_is_what_is_drawn(stock: Path, write: Write) -> None:
    assert not np.array_equal(drawn(write(files={"transformer/blocks.py": "SCALE = 0.5\n"})), drawn(write("other")))


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": "Lumina2Pipeline"},
        {"transformer": ["diffusers", "Lumina2Transformer2DModel"]},
        {"transformer": ["pipeline", "MyTransformer"]},
        {"scheduler": ["pipeline", "MyScheduler"], "vae": ["pipeline", "MyVae"]},
        {"tokenizer": ["transformers", "PreTrainedTokenizerFast"], "text_encoder": ["pipeline", "MyEncoder"]},
    ],
    ids=["a stock pipeline", "a stock part", "a part in the pipeline's file", "scheduler and vae", "text encoder"],
)
def test_stock_classes_and_those_of_the_code_go_together(stock: Path, write: Write, index: dict[str, object]) -> None:
    more = """
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import Gemma2Model

class MyTransformer(MyTransformer): pass
class MyScheduler(FlowMatchEulerDiscreteScheduler): pass
class MyVae(AutoencoderKL): pass
class MyEncoder(Gemma2Model): pass
"""
    made = write(files={"pipeline.py": PIPELINE + more}, **index)
    assert np.array_equal(drawn(made), drawn(card(stock, family="diffusers")))


def test_parts_that_the_farm_does_not_know_and_plain_settings_go_to_the_pipeline(write: Write) -> None:
    text = """
import torch
from diffusers import ConfigMixin, Lumina2Pipeline, ModelMixin
from diffusers.configuration_utils import register_to_config

class MyScale(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, size=1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size))

class MyPipeline(Lumina2Pipeline):
    def __init__(self, transformer, scheduler, vae, text_encoder, tokenizer, scale, names=(), times=1.0):
        super().__init__(transformer, scheduler, vae, text_encoder, tokenizer)
        self.register_modules(scale=scale)
        self.register_to_config(names=names, times=times)
"""
    made = write(files={"pipeline.py": text}, scale=["pipeline", "MyScale"], times=2.5, names=["a", "b", "c"])
    folder = folder_of(made) / "scale"
    folder.mkdir()
    (folder / "config.json").write_text('{"size": 2}')
    save_file({"weight": torch.tensor([3.0, 4.0])}, folder / "diffusion_pytorch_model.safetensors")
    pipeline = loaded(made)._pipeline
    assert pipeline.scale.weight.tolist() == [3.0, 4.0]
    assert (pipeline.config.times, pipeline.config.names) == (2.5, ["a", "b", "c"])
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weight": torch.tensor([3.0, 4.0])}, folder / "diffusion_pytorch_model.bin")
    assert "no file named diffusion_pytorch_model.safetensors" in refusal(made)


def test_code_that_is_not_pinned_is_not_run(write: Write) -> None:
    made = write()
    assert refusal(made.model_copy(update={"code": {}})).endswith(
        "model_index.json names the pipeline ['pipeline', 'MyPipeline'], which diffusers "
        f"{sys.modules['diffusers'].__version__} has not; code that comes with weights is not run unless the card pins it "
        "(`code`) and this machine allows it (FARM_REMOTE_CODE): pin it, choose another model, or a newer diffusers"
    )


def test_code_that_is_not_allowed_is_not_even_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write()
    monkeypatch.setenv("FARM_REMOTE_CODE", json.dumps(["0" * 64]))
    (folder_of(made) / "pipeline.py").unlink()
    assert refusal(made) == (
        "model sketch: it runs code that comes with its weights (pipeline.py, transformer/blocks.py, "
        "transformer/my_transformer.py), which this machine does not allow; read that code, and to trust it set "
        f"""FARM_REMOTE_CODE='["{"0" * 64}", "{digest_of(made)}"]' where it is rendered, or choose another model"""
    )


def test_a_permission_is_for_all_files_together(write: Write) -> None:
    made = write()
    fewer = made.model_copy(update={"code": {"pipeline.py": made.code["pipeline.py"]}})
    assert "which this machine does not allow" in refusal(fewer)


def test_a_file_that_changed_since_is_refused_and_not_run(write: Write, tmp_path: Path) -> None:
    made, mark = write(), tmp_path / "mark"
    file = folder_of(made) / "transformer" / "blocks.py"
    file.write_text(f"open({str(mark)!r}, 'w')\n")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert refusal(made) == (
        f"model sketch: {file} is not the code that the card pins (sha256 {found[:12]}…, pinned "
        f"{made.code['transformer/blocks.py'][:12]}…), and is not run; fetch the weights again, or read it and mend the card's "
        "code"
    )
    assert not mark.exists()


def test_what_runs_are_the_bytes_that_were_checked(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, mark = write(), tmp_path / "mark"
    from farm.models import remotecode

    read = remotecode.read_code

    def read_and_swap(card: ModelCard, folder: Path) -> dict[str, bytes]:
        files = read(card, folder)
        for name in files:
            (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
        return files

    monkeypatch.setattr(remotecode, "read_code", read_and_swap)
    loaded(made)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "from .evil import x",
            "transformer/my_transformer.py:1 fails: ModuleNotFoundError: transformer/evil.py is not among",
        ),
        ("from . import evil", "transformer/my_transformer.py:1 fails: ImportError: cannot import name 'evil'"),
        ("import evil", "transformer/my_transformer.py:1 fails: ModuleNotFoundError: No module named 'evil'"),
        ("from ..vae import evil", "transformer/my_transformer.py:1 fails: ModuleNotFoundError: vae.py is not among"),
        (
            "1 / 0",
            "transformer/my_transformer.py:1 fails: ZeroDivisionError: division by zero; see to what it needs, or",
        ),
        ("raise SystemExit(3)", "transformer/my_transformer.py:1 fails: SystemExit: 3; see to what"),
        ("import sys; sys.exit()", "transformer/my_transformer.py:1 fails: SystemExit: ; see"),
        ("a b", "transformer/my_transformer.py:1 fails: SyntaxError: invalid syntax"),
        ("x = '\0'", "transformer/my_transformer.py fails: "),
        ("open(__file__)", "transformer/my_transformer.py:1 fails: NameError: name '__file__' is not defined"),
    ],
)
def test_whatever_the_code_raises_as_it_is_imported_names_file_and_line(
    write: Write, tmp_path: Path, line: str, said: str
) -> None:
    mark = tmp_path / "mark"
    made = write(files={"transformer/my_transformer.py": f"{line}\n{TRANSFORMER}"}, _class_name="Lumina2Pipeline")
    for folder in ("transformer", "vae", "."):
        (folder_of(made) / folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nx = 1\n")
    assert f"{folder_of(made)}/{said}" in refusal(made)
    assert not mark.exists()


def test_a_deeper_error_names_the_file_that_raised_it(write: Write) -> None:
    said = refusal(write(files={"transformer/blocks.py": "\n\nraise RuntimeError('no\\nluck')\n"}))
    assert (
        "/transformer/blocks.py:3 fails: RuntimeError: no luck; see to what it needs, or choose another model" in said
    )


@pytest.mark.parametrize(
    "body", ["raise SystemExit", "assert not kwargs", "import nothing_at_all"], ids=["SystemExit", "assert", "import"]
)
def test_whatever_the_code_raises_as_it_is_made_is_a_model_card_error(write: Write, body: str) -> None:
    text = PIPELINE.replace("pass", f"def register_modules(self, **kwargs):\n        {body}")
    assert "/pipeline.py:8 fails: " in refusal(write(files={"pipeline.py": text}))


def test_a_keyboard_interrupt_stays_one(write: Write) -> None:
    made = write(files={"pipeline.py": "raise KeyboardInterrupt\n"})
    with pytest.raises(KeyboardInterrupt):
        loaded(made)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            {"_class_name": ["pipeline", "Lumina2Pipeline"]},
            "/pipeline.py defines no DiffusionPipeline called Lumina2Pipeline",
        ),
        (
            {"_class_name": ["pipeline", "MyTransformer"]},
            "/pipeline.py defines no DiffusionPipeline called MyTransformer",
        ),
        (
            {"transformer": ["my_transformer", "blocks"]},
            "/my_transformer.py defines no ModelMixin or PreTrainedModel called blocks, which model_index.json names",
        ),
        ({"scheduler": ["pipeline", "MyPipeline"]}, "/pipeline.py defines no SchedulerMixin called MyPipeline"),
        ({"vae": ["vae", "MyVae"]}, "names MyVae of vae as its vae; code that comes with weights is not run unless"),
        ({"_class_name": ["evil", "MyPipeline"]}, "names the pipeline ['evil', 'MyPipeline'], which diffusers"),
        ({"transformer": ["diffusers", "MyTransformer"]}, "MyPipeline has no transformer or unet with a vae"),
    ],
)
def test_only_classes_that_the_pinned_code_defines_itself_are_taken(
    write: Write, index: dict[str, object], said: str
) -> None:
    assert said in refusal(write(**index))


def test_code_in_a_file_called_like_a_library_is_never_taken_for_it(write: Write, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    made = write(
        files={"transformer/diffusers.py": f"open({str(mark)!r}, 'w')\n"},
        transformer=["diffusers", "Lumina2Transformer2DModel"],
    )
    for name in ("None.py", "scheduler/diffusers.py", "tokenizer/transformers.py"):
        (folder_of(made) / name).write_text(f"open({str(mark)!r}, 'w')\n")
    assert "needs classes that are neither diffusers' nor transformers'" in refusal(made)
    assert not mark.exists()


def test_code_called_like_installed_packages_replaces_none(write: Write) -> None:
    installed = sys.modules["json"], sys.modules["torch"]
    files = {
        "json.py": "import json\nhere = json.loads('[1]')\n",
        "transformer/torch.py": "import torch\nx = torch.ones(1)\n",
    }
    text = TRANSFORMER.replace("from . import blocks", "from . import blocks, torch\nfrom .. import json")
    loaded(write(files={**files, "transformer/my_transformer.py": text}))
    assert (sys.modules["json"], sys.modules["torch"]) == installed


def test_a_folders_own_init_is_code_like_any_other(write: Write) -> None:
    files = {"__init__.py": "BASE = 1.0\n", "transformer/__init__.py": "from .. import BASE\n"}
    family = loaded(write(files={**files, "transformer/blocks.py": "from . import BASE as SCALE\n"}))
    assert type(family._pipeline.transformer).__module__.endswith(".transformer.my_transformer")


def test_cards_with_equal_file_names_lie_side_by_side(write: Write, stock: Path) -> None:
    one, other = write("one"), write("other", files={"transformer/blocks.py": "SCALE = 0.5\n"})
    first, second = loaded(one), loaded(other)
    kinds = [type(family._pipeline.transformer) for family in (first, second)]
    assert kinds[0] is not kinds[1]
    assert {kind.__module__ for kind in kinds} == {
        f"farm_remote_{digest_of(made)}.transformer.my_transformer" for made in (one, other)
    }
    again = rendered(first, [spec(0, guidance_scale=4.0)])[0].pixels
    assert np.array_equal(again, drawn(card(stock, family="diffusers")))
    assert not np.array_equal(again, rendered(second, [spec(0, guidance_scale=4.0)])[0].pixels)


def test_code_is_imported_once_in_a_process(write: Write, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    text = f"{PIPELINE}\nwith open({str(mark)!r}, 'a') as file:\n    file.write('x')\n"
    made = write(files={"pipeline.py": text})
    kinds = {type(loaded(one)._pipeline.transformer) for one in (made, made.model_copy(update={"title": "Another"}))}
    assert (len(kinds), mark.read_text()) == (1, "x")


def test_nobody_is_asked_whether_unpinned_code_may_run(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    stock = {"_class_name": "Lumina2Pipeline", "transformer": ["diffusers", "Lumina2Transformer2DModel"]}
    made = write(**stock, tokenizer=["transformers", "BarkProcessor"])
    folder = folder_of(made) / "tokenizer"
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda text: "y")
    plain = made.model_copy(update={"code": {}})
    assert f"model sketch: {folder.parent}/model_index.json " in refusal(plain)
    assert not mark.exists()


@pytest.mark.parametrize(
    "kernel", ["evil/kernel", "flash_attention_2", {"text_config": "kernels-community/flash-attn3"}]
)
def test_an_attention_kernel_that_a_parts_settings_name_is_refused(write: Write, kernel: object) -> None:
    made = write(files={})
    settings = folder_of(made) / "text_encoder" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"attn_implementation": kernel}))
    said = refusal(made)
    assert said.startswith(f"model sketch: {settings} names the attention kernel ")
    assert said.endswith("and only eager and sdpa are used; take it out there")


def test_settings_that_transformers_refuses_are_no_fault_of_the_code(write: Write) -> None:
    made = write(files={})
    settings = folder_of(made) / "text_encoder" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"vocab_size": "many"}))
    said = refusal(made)
    assert said.startswith(f"model sketch: {settings.parent} cannot be loaded: ")
    assert "the code in" not in said
