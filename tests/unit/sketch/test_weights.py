import json
import subprocess
import sys

from farm.sketch import WEIGHTS

FILES = [path for path in WEIGHTS.rglob("*") if path.is_file()]


def test_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) <= 8_000_000


def test_weights_are_safetensors_in_bfloat16() -> None:
    assert {path.suffix for path in FILES} == {".safetensors", ".json", ".jinja"}
    for path in WEIGHTS.rglob("*.safetensors"):
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"BF16"}, path


def test_folder_is_a_z_image_pipeline() -> None:
    index = json.loads((WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == "ZImagePipeline"
    assert {name: entry[1] for name, entry in index.items() if not name.startswith("_")} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3Model",
        "tokenizer": "PreTrainedTokenizerFast",
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
    }


def test_asking_for_the_folder_imports_no_heavy_library() -> None:
    code = "import sys, farm.sketch; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
