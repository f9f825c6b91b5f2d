"""Plan and resume jobs of ten million images: seconds and peak memory.

A plan is arithmetic, so a template costs nothing however many images it makes. What costs is reading the prompts of a
file once: the floor is Parquet's decoding, a sha256 of the texts, and writing the frozen copy; keys add 8 bytes a row,
to find doubled ones. Resuming lists the receipts, one for each shard, and reads none. Each case runs in a process of
its own, from the manifest file to the plan in a folder, imports left out of the time and included in the memory.

`python -m farm.bench.planning [--quick]` prints a table and, last, one line of JSON.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.bench.environment import environment

if TYPE_CHECKING:
    from farm.plan import Plan

IMAGES = 10_000_000
NOW = "2026-01-01T00:00:00Z"
_WORDS = ("a", "red", "blue", "small", "large", "round", "old", "street", "lamp", "under", "rain", "two", "cats", "wet")
_CARD = """\
name: planning
title: A card for planning only
family: sleep
source: {}
licence: none
dtypes: {cpu: [float32]}
batch: {cpu: 8}
defaults: {width: 512, height: 512, num_inference_steps: 20, guidance_scale: 4}
"""
_TEMPLATE = """\
name: planning
model: planning
prompts:
  template: "a {size} {colour} {thing} {place}, {sharp|soft|grainy}"
  vary: {size: [@10], colour: [@50], thing: [@100], place: [@20]}
seeds: {count: 5, from: slot}
sweep: {num_inference_steps: [10, 20]}
"""
_FILE = """\
name: planning
model: planning
prompts: {file: captions.parquet, column: caption, key: id, carry: [source]}
seeds: {count: @seeds, from: key}
"""


def main() -> None:
    """Run the cases and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size")
    parser.add_argument("--case", choices=sorted(_CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=IMAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_CASES[options.case](options.folder, options.images)))
        return
    rows = measure(images=IMAGES // 100 if options.quick else IMAGES)
    print(table(rows))
    print(json.dumps({"environment": environment(), "planning": rows}))


def measure(*, images: int = IMAGES) -> list[dict[str, Any]]:
    """Run every case once."""
    rows = []
    for case, title in _TITLES.items():
        with tempfile.TemporaryDirectory(prefix="farm-planning-") as folder:
            if case.startswith("captions"):
                _run(f"make-{case}", folder, images)
            rows.append({"case": title, **_run(case, folder, images)})
            if case == "template":
                rows.append({"case": "resume: plan read, receipts listed", **_run("resume", folder, images)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | images | seconds | CPU seconds | peak MB |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['images']:,} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {row['peak_mb']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _run(case: str, folder: str, images: int) -> dict[str, object]:
    command = [sys.executable, "-m", "farm.bench.planning", "--case", case, "--folder", folder, "--images", str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"case {case} failed:\n{done.stderr}")
    result: dict[str, object] = json.loads(done.stdout)
    return result


def _plan(folder: Path, manifest: str) -> dict[str, object]:
    from farm.devices import DeviceInfo
    from farm.ledger import Ledger
    from farm.manifest import load_manifest
    from farm.settings import Settings
    from farm.storage.opening import open_store
    from farm.submission import prepare, submit

    (folder / "cards").mkdir()
    (folder / "cards" / "planning.yaml").write_text(_CARD)
    (folder / "manifest.yaml").write_text(manifest)
    settings = Settings(models=folder / "cards", store=str(folder / "store"))
    device = DeviceInfo("cpu", "bench", (), 1)
    start, cpu_start = time.perf_counter(), time.process_time()
    ledger = Ledger(open_store(settings.store, settings))
    request = prepare(load_manifest(folder / "manifest.yaml"), settings, device=device, renderers=1)
    plan = submit(request, ledger, now=NOW).plan
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return _result(plan, seconds, cpu)


def _template(folder: Path, images: int) -> dict[str, object]:
    manifest = _TEMPLATE
    for count in (10, 50, 100, 20):
        values = ", ".join(f"word{number}" for number in range(count if images == IMAGES else max(count // 3, 1)))
        manifest = manifest.replace(f"@{count}]", f"{values}]", 1)
    return _plan(folder, manifest)


def _captions(seeds: int) -> Callable[[Path, int], dict[str, object]]:
    return lambda folder, images: _plan(folder, _FILE.replace("@seeds", str(seeds)))


def _make_captions(seeds: int) -> Callable[[Path, int], dict[str, object]]:
    def make(folder: Path, images: int) -> dict[str, object]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        draw = random.Random(0)
        texts = [" ".join(draw.choices(_WORDS, k=12)) for _ in range(50_000)]
        schema = pa.schema({"id": pa.int64(), "caption": pa.string(), "source": pa.string()})
        rows = images // seeds
        with pq.ParquetWriter(folder / "captions.parquet", schema) as writer:
            for first in range(0, rows, 100_000):
                ids = range(first, min(first + 100_000, rows))
                captions = [f"{texts[row * 7919 % len(texts)]} {row}" for row in ids]
                writer.write_table(pa.table([ids, captions, ["web"] * len(ids)], schema=schema))
        return {}

    return make


def _resume(folder: Path, images: int) -> dict[str, object]:
    from farm.ledger import Ledger
    from farm.settings import Settings
    from farm.storage.opening import open_store

    settings = Settings(store=str(folder / "store"))
    ledger = Ledger(open_store(settings.store, settings))
    plan = ledger.plan("planning")
    receipts = folder / "store" / "jobs" / plan.job / plan.run / "receipts" / "0001"
    receipts.mkdir(parents=True, exist_ok=True)
    done = plan.shards // 2
    for shard in range(done):
        (receipts / f"{shard:08d}.parquet").touch()
    start, cpu_start = time.perf_counter(), time.process_time()
    plan = ledger.plan("planning")
    if int(ledger.done_shards(plan, 1).sum()) != done:
        raise SystemExit("the listing lost receipts")
    return _result(plan, time.perf_counter() - start, time.process_time() - cpu_start)


def _result(plan: "Plan", seconds: float, cpu_seconds: float) -> dict[str, object]:
    return {
        "images": plan.images,
        "shards": plan.shards,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    """Return the process's highest resident memory; a child's ru_maxrss starts at its parent's, VmHWM does not."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


_TITLES = {
    "template": "template x seeds x sweep",
    "captions-1m": "Parquet, a tenth as many captions, keyed",
    "captions-10m": "Parquet, as many captions, keyed",
}
_CASES: dict[str, Callable[[Path, int], dict[str, object]]] = {
    "template": _template,
    "resume": _resume,
    "captions-1m": _captions(10),
    "captions-10m": _captions(1),
    "make-captions-1m": _make_captions(10),
    "make-captions-10m": _make_captions(1),
}

if __name__ == "__main__":
    main()
