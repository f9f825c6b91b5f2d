"""What a client's installation has is enough for its commands: nothing that renders is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("boto3", "botocore", "diffusers", "fastapi", "filelock", "imagehash", "numpy", "prometheus_client", "psutil")
HEAVY += ("pyarrow", "pynvml", "ray", "safetensors", "scipy", "starlette", "torch", "transformers")
BLOCKED = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
from farm.cli.app import run
run()
"""


def light(*arguments: str, folder: Path, typed: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command where nothing that renders can be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *arguments],
        cwd=folder,
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder)} | variables,
    )


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), *((word, "--help") for word in ("submit", "status", "prompt", "retry"))]
)
def test_help_needs_nothing_that_renders(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ended = light(*arguments, folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("status", "shapes", "-w"),
        ("submit", "job.yaml"),
        ("pause", "shapes"),
        ("resume", "shapes"),
        ("cancel", "shapes"),
        ("approve", "shapes"),
        ("change", "shapes", "--priority", "80"),
        ("retry", "shapes"),
        ("models",),
        ("prompt",),
    ],
)
def test_commands_reach_for_the_endpoint_without_what_renders(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: shapes\nmodel: sketch\nprompts: [a red circle]\n")
    ended = light(*arguments, folder=tmp_path, FARM_URL="http://127.0.0.1:no")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: address http://127.0.0.1:no is no URL")


def test_the_package_gives_its_clients_without_what_renders(tmp_path: Path) -> None:
    code = BLOCKED.replace("from farm.cli.app import run\nrun()", "import farm\nprint(farm.Client, farm.AsyncClient)")
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "<class 'farm.client.blocking.Client'> <class 'farm.client.asynchronous.AsyncClient'>\n"


def test_a_command_that_renders_says_what_is_missing(tmp_path: Path) -> None:
    ended = light("du", folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: this needs numpy, which a client's installation leaves out; install the whole farm with pip install "
        "'diffusion-farm[farm]', or name a farm's endpoint with FARM_URL\n"
    )
