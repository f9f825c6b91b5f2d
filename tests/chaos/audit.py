"""The job that every round renders, and what must be true of it in the end."""

import json
import os
import subprocess
from pathlib import Path
from unittest import mock

from farm.ledger import Ledger
from farm.plan import Plan
from farm.receipt import ImageRow
from farm.settings import load_settings
from farm.storage.opening import open_store
from tests.chaos.command import FARM
from tests.chaos.processes import ChaosError

JOB = "chaos"
PROMPTS = 48
MANIFEST = """\
name: chaos
model: sketch
prompts:
  template: a {{color}} {{shape}} on a {{back}} background
  vary:
    color: [red, green, yellow, pink]
    shape: [circle, square, star, heart]
    back: [white, blue, black]
seeds: {{count: {seeds}, from: slot}}
params: {{num_inference_steps: {steps}}}
"""

Dataset = tuple[Plan, list[ImageRow]]


def write_manifest(folder: Path, *, images: int, steps: int) -> Path:
    """Write the manifest of about so many images."""
    path = folder / "chaos.yaml"
    path.write_text(MANIFEST.format(seeds=max(1, images // PROMPTS), steps=steps))
    return path


def render_undisturbed(manifest: Path, store: Path, env: dict[str, str], *, renderers: int) -> None:
    """Render into a folder, left alone; one that was rendered there before is taken as it is. Raises ChaosError."""
    done = subprocess.run(
        [FARM, "render", manifest, "--renderers", str(renderers)],
        env=env | {"FARM_STORE": str(store)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ChaosError(f"the undisturbed run ended with {done.returncode}:\n{done.stderr}")


def stored(store_url: str, env: dict[str, str]) -> Dataset:
    """The job's plan and its dataset's rows."""
    with mock.patch.dict(os.environ, env):
        ledger = Ledger(open_store(store_url, load_settings(store=store_url)))
        plan = ledger.plan(JOB)
        return plan, list(ledger.rows(plan))


def compare(undisturbed: Dataset, disturbed: Dataset) -> None:
    """Raise ChaosError with what differs between an undisturbed job and one that was not left alone."""
    (calm_plan, calm), (plan, wild) = undisturbed, disturbed
    if calm_plan.digest != plan.digest:
        before, after = calm_plan.model_dump(), plan.model_dump()
        changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
        raise ChaosError(f"the two jobs were planned differently: {changed}")
    if [row.index for row in wild] != list(range(plan.images)):
        raise ChaosError(f"{plan.images} images were planned; the dataset has {[row.index for row in wild]}")
    failed = [(row.index, row.error_code) for row in wild if row.status != "ok"]
    if failed:
        raise ChaosError(f"images failed: {failed}")
    different = [a.index for a, b in zip(calm, wild, strict=True) if a.sha256 != b.sha256 and not b.alone]
    if different:
        raise ChaosError(f"pictures differ from the undisturbed run: {different}")


def verify(env: dict[str, str]) -> int:
    """`farm verify`; returns how many objects no row names. Raises ChaosError."""
    done = _farm("verify", JOB, "--json", env=env)
    if done.returncode:
        raise ChaosError(f"farm verify ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return sum(run["orphans"] or 0 for run in json.loads(done.stdout)["runs"])


def collect(env: dict[str, str]) -> bool:
    """`farm gc`, where there is such a command. Raises ChaosError."""
    if _farm("gc", "--help", env=env).returncode:
        return False
    done = _farm("gc", env=env)
    if done.returncode:
        raise ChaosError(f"farm gc ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return True


def _farm(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FARM, *arguments], env=env, capture_output=True, text=True, check=False)
