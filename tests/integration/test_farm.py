"""The whole farm as a person runs it: `farm render` on real Ray actors, on models that sleep or sketch.

Each command is a process of its own; what is killed is found below it, by process id.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from farm.devices import local_device
from farm.ledger import Ledger
from farm.manifest import load_manifest
from farm.plan import ImageSpec, Plan
from farm.prompts import PromptReader
from farm.receipt import ImageRow, Receipt
from farm.settings import load_settings
from farm.storage.opening import open_store
from farm.submission import prepare, submit
from tests.chaos import end, title

FARM = Path(sys.executable).parent / "farm"
SLEEP_CARD = """\
name: sleep
title: Sleeps
family: sleep
source: {path: .}
licence: none
dtypes: {cpu: [float32]}
batch: {cpu: 2}
defaults: {width: 64, height: 64, num_inference_steps: 5, guidance_scale: 0}
max_steps: 1000
"""


class Terminal:
    """A person's terminal: a store, a folder with manifests, and the processes that they started."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = folder / "store"
        self.env = os.environ | {
            "FARM_STORE": str(self.store),
            "FARM_MODELS": str(folder / "models"),
            "FARM_RUNTIME_DIR": str(folder / "runtime"),
        }
        (folder / "models").mkdir()
        (folder / "models" / "sleep.yaml").write_text(SLEEP_CARD)
        self._started: list[psutil.Popen] = []

    def manifest(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(f"name: {name}\n{text}")
        return path

    def start(self, *arguments: object, runtime: str = "runtime") -> psutil.Popen:
        """Start a command; one with another `runtime` folder sees no farm of this one's."""
        command = [str(FARM), *map(str, arguments)]
        env = self.env | {"FARM_RUNTIME_DIR": str(self.folder / runtime)}
        pipe = subprocess.PIPE
        process = psutil.Popen(command, env=env, cwd=self.folder, stdout=pipe, stderr=pipe, text=True)
        self._started.append(process)
        return process

    def run(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        """Run a command to its end; returns stdout and stderr."""
        out, err = self.start(*arguments).communicate(timeout=240)
        assert self._started[-1].returncode == code, f"exit {self._started[-1].returncode}\n{out}\n{err}"
        return out, err

    def rows(self, job: str) -> list[ImageRow]:
        ledger = self.ledger()
        return [row for plan in ledger.plans(job) for row in ledger.rows(plan)]

    def ledger(self) -> Ledger:
        return Ledger(open_store(str(self.store), load_settings()))

    def receipts(self, job: str) -> int:
        return len(list(self.store.glob(f"jobs/{job}/*/receipts/*/*")))

    def close(self) -> None:
        for process in self._started:
            family = [process, *children(process)]
            for member in family:
                if member.is_running():
                    end(member.pid)
            process.communicate()


def children(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def until(true: Callable[[], object], *, seconds: float = 90.0) -> None:
    stop = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < stop, "it did not come to that"
        time.sleep(0.05)


def find(process: psutil.Popen, name: str) -> list[psutil.Process]:
    return [child for child in children(process) if title(child).startswith(name)]


def ray_logs(process: psutil.Popen) -> Path:
    """The folder of the logs of the Ray that a command started."""
    words = " ".join(find(process, "raylet")[0].cmdline())
    found = re.search(r"(/\S*?/session_[^/]+)/", words)
    assert found
    return Path(found[1]) / "logs"


def said(logs: Path) -> str:
    """All that the actors of a Ray wrote into their logs."""
    return "".join(path.read_text(errors="replace") for path in logs.glob("worker-*.err"))


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


SLEEPY = "model: sleep\nprompts: [a, b, c]\nseeds: {{count: {count}, from: slot}}\nparams: {{num_inference_steps: {steps}}}\n"


def test_a_manifest_becomes_pictures_receipts_a_dataset_and_a_sheet(terminal):
    manifest = terminal.manifest(
        "first", "model: sketch\nprompts: [a red circle, a blue star]\nseeds: {count: 4, from: slot}\n"
    )
    out, err = terminal.run("render", manifest)
    rows = terminal.rows("first")
    assert [row.index for row in rows] == list(range(8))
    assert {row.status for row in rows} == {"ok"}
    assert all((terminal.store / row.object).is_file() for row in rows)
    assert "8 of 8 images" in out
    assert "sheet.png" in out
    sheet = next(terminal.store.glob("jobs/first/*/sheet.png"))
    assert sheet.stat().st_size > 1000
    assert list(terminal.store.glob("jobs/first/*/dataset/part-*.parquet"))
    terminal.run("verify", "first")
    out, _ = terminal.run("reproduce", terminal.store / rows[0].object, "--json")
    assert json.loads(out)["max_difference"] <= 1, "its batch may have changed the lowest bit, and no more"
    _, err = terminal.run("render", manifest)
    assert "nothing is left to render" in err


def test_a_killed_renderer_costs_time_and_nothing_else(terminal):
    manifest = terminal.manifest("killed", SLEEPY.format(count=20, steps=20))
    farm = terminal.start("render", manifest, "--renderers", 2)
    until(lambda: terminal.receipts("killed") >= 2)
    end(find(farm, "ray::Renderer")[0].pid)
    _, err = farm.communicate(timeout=200)
    assert farm.returncode == 0, err
    rows = terminal.rows("killed")
    assert [row.index for row in rows] == list(range(60))
    assert {row.status for row in rows} == {"ok"}


def test_a_stopped_renderer_is_replaced_and_a_receipt_that_turns_up_late_counts(terminal):
    manifest = terminal.manifest("frozen", SLEEPY.format(count=10, steps=20))
    farm = terminal.start("render", manifest, "--renderers", 2)
    until(lambda: terminal.receipts("frozen") >= 2)
    logs = ray_logs(farm)
    first = {process.pid for process in find(farm, "ray::Renderer")}
    victim = find(farm, "ray::Renderer")[0]
    victim.suspend()
    ledger = terminal.ledger()
    plan = ledger.plan("frozen")

    def missing() -> list[int]:
        return [int(shard) for shard in np.flatnonzero(~ledger.done_shards(plan, 1))]

    until(lambda: len(missing()) <= 2)
    late = next(shard for shard in missing() if ledger.commit(plan, late_receipt(ledger, plan, shard)))
    until(lambda: {process.pid for process in find(farm, "ray::Renderer")} - first)
    _, err = farm.communicate(timeout=200)
    assert farm.returncode == 5, err
    assert not victim.is_running()
    failed = {row.index for row in terminal.rows("frozen") if row.status == "failed"}
    assert failed == set(plan.shard_range(late))
    assert len(terminal.rows("frozen")) == 30
    assert "why='silent'" in said(logs)


def test_a_killed_dispatcher_comes_back_and_its_renderers_keep_their_shards(terminal):
    manifest = terminal.manifest("headless", SLEEPY.format(count=20, steps=20))
    farm = terminal.start("render", manifest, "--renderers", 2)
    until(lambda: terminal.receipts("headless") >= 2)
    renderers = {process.pid for process in find(farm, "ray::Renderer")}
    logs = ray_logs(farm)
    end(find(farm, "ray::Dispatcher")[0].pid)
    before = terminal.receipts("headless")
    until(lambda: terminal.receipts("headless") >= before + 3)
    assert {process.pid for process in find(farm, "ray::Renderer")} == renderers
    _, err = farm.communicate(timeout=200)
    assert farm.returncode == 0, err
    assert len(terminal.rows("headless")) == 60
    assert "finalised" in said(logs)
    assert "lease given back" not in said(logs)


def test_a_command_ended_with_sigkill_and_typed_again_waits_for_no_claim(terminal):
    manifest = terminal.manifest("slain", SLEEPY.format(count=10, steps=20))
    farm = terminal.start("render", manifest)
    until(lambda: terminal.receipts("slain") >= 2)
    assert (terminal.store / "claims" / "slain").is_file()
    end(farm.pid)
    farm.wait()
    again = terminal.start("render", manifest)
    until(lambda: find(again, "raylet"))
    logs = ray_logs(again)
    _, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert len(terminal.rows("slain")) == 30
    assert "held=True" in said(logs)
    assert "held=False" not in said(logs)
    assert not (terminal.store / "claims").exists(), "it lets go of the job when that is done"


def test_two_farms_on_one_store_render_a_job_once(terminal):
    manifest = terminal.manifest("shared", SLEEPY.format(count=60, steps=20))
    first = terminal.start("render", manifest)
    until(lambda: terminal.receipts("shared") >= 1)
    second = terminal.start("render", manifest, runtime="elsewhere")
    _, first_err = first.communicate(timeout=200)
    _, second_err = second.communicate(timeout=200)
    assert (first.returncode, second.returncode) == (0, 0), first_err + second_err
    assert "another farm" in second_err
    rows = terminal.rows("shared")
    assert len(rows) == 180
    pictures = {str(path.relative_to(terminal.store)) for path in terminal.store.glob("jobs/shared/*/images/*/*")}
    assert pictures == {row.object for row in rows}, "no picture was rendered twice"


def test_ctrl_c_leaves_a_job_that_the_same_command_goes_on_with_and_no_process(terminal):
    manifest = terminal.manifest("stopped", SLEEPY.format(count=20, steps=20))
    farm = terminal.start("render", manifest)
    until(lambda: terminal.receipts("stopped") >= 2)
    family = children(farm)
    farm.send_signal(signal.SIGINT)
    _, err = farm.communicate(timeout=60)
    assert farm.returncode == 130
    assert f"farm render {manifest}" in err
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    stored = {path.name: path.stat().st_mtime for path in terminal.store.glob("jobs/stopped/*/receipts/*/*")}
    terminal.run("render", manifest, "--renderers", 2)
    kept = {path.name: path.stat().st_mtime for path in terminal.store.glob("jobs/stopped/*/receipts/*/*")}
    assert stored.items() <= kept.items()
    assert len(terminal.rows("stopped")) == 60


def test_a_second_command_attaches_and_the_first_stays_until_both_are_done(terminal):
    first = terminal.start("render", terminal.manifest("one", SLEEPY.format(count=12, steps=20)))
    until(lambda: terminal.receipts("one") >= 1)
    second = terminal.start("render", terminal.manifest("two", SLEEPY.format(count=24, steps=20)))
    _, first_err = first.communicate(timeout=200)
    _, second_err = second.communicate(timeout=200)
    assert (first.returncode, second.returncode) == (0, 0), first_err + second_err
    assert len(terminal.rows("one")) == 36
    assert len(terminal.rows("two")) == 72
    assert find(second, "raylet") == []


def test_cancel_stops_a_running_job_and_render_goes_on_with_it(terminal):
    manifest = terminal.manifest("dropped", SLEEPY.format(count=20, steps=40))
    farm = terminal.start("render", manifest)
    until(lambda: terminal.receipts("dropped") >= 1)
    terminal.run("cancel", "dropped")
    _, err = farm.communicate(timeout=60)
    assert farm.returncode == 8, err
    assert terminal.receipts("dropped") < 10
    terminal.run("render", manifest, "--renderers", 2)
    assert len(terminal.rows("dropped")) == 60


def test_a_store_that_becomes_unwritable_stops_the_job_with_its_error_and_a_later_render_goes_on(terminal):
    manifest = terminal.manifest("walled", SLEEPY.format(count=20, steps=20))
    farm = terminal.start("render", manifest)
    until(lambda: terminal.receipts("walled") >= 2)
    images = next(terminal.store.glob("jobs/walled/*/images"))
    images.rename(images.with_name("away"))
    images.write_text("a file where a folder was")
    _, err = farm.communicate(timeout=100)
    assert farm.returncode == 3, err
    assert "images" in err.splitlines()[-1]
    images.unlink()
    images.with_name("away").rename(images)
    terminal.run("render", manifest)
    terminal.run("verify", "walled")
    assert len(terminal.rows("walled")) == 60


def test_retry_renders_the_failed_images_again_as_a_new_pass(terminal):
    manifest = terminal.manifest("patchy", "model: sleep\nprompts: [a, b]\nseeds: {count: 4, from: slot}\n")
    settings = load_settings(models=terminal.folder / "models", store=str(terminal.store))
    ledger = terminal.ledger()
    request = prepare(load_manifest(manifest), settings, device=local_device(), renderers=1)
    plan = submit(request, ledger, now="2026-01-01T00:00:00Z").plan
    assert (plan.shards, plan.shard_images) == (4, 2)
    assert ledger.commit(plan, late_receipt(ledger, plan, 0))
    out, _ = terminal.run("render", manifest, code=5)
    assert "6 of 8 images" in out
    assert "nan_picture" in out
    terminal.run("retry", "patchy")
    assert {row.status for row in terminal.rows("patchy")} == {"ok"}
    assert [row.pass_number for row in terminal.rows("patchy")] == [2, 2, 1, 1, 1, 1, 1, 1]
    terminal.run("verify", "patchy")


def late_receipt(ledger: Ledger, plan: Plan, shard: int) -> Receipt:
    """What a renderer that nobody waits for any more may still store: here that its images failed."""
    specs = PromptReader(plan, ledger).specs(plan.shard_range(shard))
    start, rows = plan.shard_range(shard).start, tuple(failed_row(spec) for spec in specs)
    return Receipt(
        plan.job,
        plan.run,
        1,
        shard,
        start,
        start + len(rows),
        1,
        "gone",
        "cpu",
        {},
        "2026-01-01T00:00:00+00:00",
        {},
        rows,
    )


def failed_row(spec: ImageSpec) -> ImageRow:
    params = spec.params
    return ImageRow(
        index=spec.index,
        key=spec.key,
        prompt=spec.prompt,
        negative_prompt=params.negative_prompt,
        width=params.width,
        height=params.height,
        num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale,
        seed=spec.seed,
        status="failed",
        object=None,
        thumbnail=None,
        size_bytes=None,
        sha256=None,
        phash=None,
        flag=None,
        error_code="nan_picture",
        error_message="came out as no finite numbers",
        pass_number=1,
        attempt=1,
        alone=False,
        seconds=0.0,
        renderer="gone",
        device="cpu",
        carry={},
    )


def test_without_rays_control_store_the_command_ends_in_our_words_and_goes_on_when_typed_again(terminal):
    manifest = terminal.manifest("rayless", SLEEPY.format(count=20, steps=20))
    farm = terminal.start("render", manifest)
    until(lambda: terminal.receipts("rayless") >= 2)
    end(find(farm, "gcs_server")[0].pid)
    _, err = farm.communicate(timeout=90)
    assert farm.returncode == 6, err
    assert "goes on" in err.splitlines()[-1]
    terminal.run("render", manifest)
    assert len(terminal.rows("rayless")) == 60
