"""Measure the three large models on a GPU held to 16 GiB: memory, seconds, idle time, a peer beside them, and equal bytes.

    python -m farm.bench.gpu [--model NAME] [--images N] [--folder DIR] [--parts measure,peer,fidelity,budgets,gains]
        [--drop] [--tiny]

No Ray, no network: the engine alone, over random weights at full size (`farm.bench.giants`), so that memory and speed are real
and pictures mean nothing. Torch's allocator is held to a budget less 1 GiB for the CUDA context, 15 GiB of 16, for the farm and
its peer alike: what needs more fails here as there. What this proves is memory and ratios; a card that has 16 GB is slower.

The physics. A picture takes `steps x step`, which is arithmetic: that is the floor, and the denoiser's share of a shard says how
near it is. Above it stand encoding, decoding, and weights that come and go as quickly as the bus takes them. A shard moves them
once; a loop with `enable_model_cpu_offload()` moves all of them for every picture and copies them back, so the ratio to it is
1 + moves / (steps x step): large at few steps and small sizes, near 1 at many. Between two batches a GPU waits for the host:
events recorded at a batch's end and at the next one's beginning measure that, and pictures of two steps are profiled for the
gaps inside, which they overstate where a picture has more steps.
"""

import argparse
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from farm.bench.environment import environment
from farm.bench.giants import Giant, prompts, whole_folder, write_giant
from farm.bench.gpufidelity import Fidelity, draw, line_of, specs_of
from farm.bench.gpufigures import (
    CONTEXT_GIB,
    Case,
    Check,
    Row,
    checks_table,
    idle_share,
    memory_table,
    peer_table,
    ratios,
)
from farm.bench.gpugains import Gain, gains_of, gains_table
from farm.bench.gpushard import draw_shard
from farm.bench.offloading import open_peer
from farm.engine import Engine
from farm.errors import FarmError
from farm.modelcard import ModelCard, find_card
from farm.models.device import Device
from farm.models.family import open_family
from farm.placement import Placement
from farm.plan import ImageSpec, Numerics
from farm.settings import load_settings
from farm.versions import PACKAGES

GIB = 2**30
BUDGET_GIB = 16.0
OTHER_BUDGETS_GIB = (8.0, 12.0, 24.0, 64.0)
"""What else a pool has, and one that takes everything whole: each shows another placement."""
LIMIT_OUTSIDE, LIMIT_IDLE, FEWER_STEPS_RATIO = 0.03, 0.02, 1.5
PROFILED_STEPS = 2
ALL_PARTS = ("measure", "peer", "fidelity", "budgets", "gains")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, what it draws here, and how many pictures make its shard."""

    model: str
    cases: tuple[Case, ...]
    images: int

    @property
    def gains_case(self) -> Case:
        """What quicker ways are tried on: steps enough for blocks to be left out of some."""
        return self.cases[1] if len(self.cases) > 1 else self.cases[0]


SUBJECTS = (
    Subject("z-image-turbo", (Case(512, 512, 9), Case(1024, 1024, 8), Case(1024, 1024, 9)), 16),
    Subject("newbie-image-exp0.1", (Case(1024, 1024, 8), Case(1024, 1024, 28)), 8),
    Subject("qwen-image-2512", (Case(1024, 1024, 8), Case(1024, 1024, 20), Case(1328, 1328, 20)), 3),
)
TINY_CASES = (Case(64, 64, 2), Case(96, 64, 3))
TINY_IMAGES = 2


class Bench:
    """The benchmark of one model."""

    def __init__(self, subject: Subject, giant: Giant, numerics: Numerics, device: str, say: Say):
        self.subject = subject
        self.rows: list[Row] = []
        self.peers: list[Row] = []
        self.gains: list[Gain] = []
        self._giant = giant
        self._card = giant.card
        self._numerics = numerics
        self._device = device
        self._on_gpu = device != "cpu"
        self._say = say
        self._prompts = 0
        self._fidelity = Fidelity(giant.card, subject.cases[0], device, numerics.dtype)

    @property
    def checks(self) -> list[Check]:
        """What was compared."""
        return self._fidelity.checks

    def run(self, parts: Sequence[str]) -> None:
        """Measure what was asked for; what fails for want of memory is a row that says so."""
        if "measure" in parts or "fidelity" in parts:
            self._at_budget(parts)
        if "peer" in parts:
            self._beside()
        if "budgets" in parts or "fidelity" in parts:
            self._other_budgets(parts)
        if "gains" in parts:
            self.gains += gains_of(
                self._giant,
                self._numerics,
                self.subject.gains_case,
                device=self._device,
                vram_gib=BUDGET_GIB,
                images=self.subject.images,
                say=self._say,
            )

    def _at_budget(self, parts: Sequence[str]) -> None:
        subject = self.subject
        engine = self._engine(BUDGET_GIB)
        load_s: float | None
        try:
            load_s = self._load(engine)
        except FarmError as exc:
            self.rows.extend(self._row(case, BUDGET_GIB, failed=exc.message) for case in subject.cases)
            load_s = None
        if load_s is None:
            self._drop(engine)
            return
        if "measure" in parts:
            for place, case in enumerate(subject.cases):
                self._say(f"{subject.model}, {case}")
                self.rows.append(self._measured(engine, case, BUDGET_GIB, load_s, inside=place == 0))
            self.rows.append(self._measured(engine, subject.cases[0], BUDGET_GIB, load_s, batch=4))
        if "fidelity" in parts:
            self._say(f"{subject.model}, fidelity")
            self._fidelity.begin(engine)
        self._drop(engine)

    def _beside(self) -> None:
        for_memory = Device(self._device, vram_gib=BUDGET_GIB)
        for_memory.hold_to_budget()
        self._begin_peak()
        began = time.perf_counter()
        peer, failed = None, None
        try:
            self._say(f"{self.subject.model}, the peer")
            peer = open_peer(self._card, self._numerics, device=self._device, vram_gib=BUDGET_GIB)
        except (FarmError, RuntimeError, ValueError, ImportError) as exc:
            failed = line_of(exc)
        load_s = time.perf_counter() - began
        for case in self.subject.cases:
            row = self._row(case, BUDGET_GIB, load_s=load_s, placement="offloaded by module", batch=1)
            specs = self._specs(case, self.subject.images + 1)
            if peer is not None:
                failed = None
                try:
                    peer.draw(specs[0])  # warms up
                    self._begin_peak()
                    began = time.perf_counter()
                    for spec in specs[1:]:
                        peer.draw(spec)
                    for_memory.synchronize()
                    each = (time.perf_counter() - began) / len(specs[1:])
                    row = replace(row, seconds_per_image=each, peak_gib=self._peak_gib())
                except (FarmError, RuntimeError, ValueError) as exc:
                    failed = line_of(exc)
                for_memory.recover()
            self.peers.append(replace(row, failed=failed) if failed else row)
        peer = None
        for_memory.recover()

    def _other_budgets(self, parts: Sequence[str]) -> None:
        case = self.subject.cases[0]
        for budget in OTHER_BUDGETS_GIB if "budgets" in parts else OTHER_BUDGETS_GIB[-1:]:
            self._say(f"{self.subject.model}, a budget of {budget:g} GiB")
            engine = self._engine(budget)
            try:
                load_s = self._load(engine)
                if "budgets" in parts:
                    self.rows.append(self._measured(engine, case, budget, load_s))
                name = f"{self._placement.layout} ({budget:g} GiB) as at {BUDGET_GIB:g} GiB"
                self._fidelity.placed_otherwise(engine, name)
                if budget == OTHER_BUDGETS_GIB[-1] and "fidelity" in parts:
                    self._fidelity.quantised(engine, self._family)
            except FarmError as exc:
                self.rows.append(self._row(case, budget, failed=exc.message))
            self._drop(engine)

    def _measured(
        self, engine: Engine, case: Case, budget: float, load_s: float, *, batch: int = 1, inside: bool = False
    ) -> Row:
        placement = self._placement
        row = self._row(
            case, budget, load_s=load_s, batch=batch, placement=placement.layout, explained=placement.explained
        )
        images = max(self.subject.images, 2 * batch)
        try:
            specs = self._specs(case, images + batch)
            drawn = draw_shard(engine, specs[:batch], batch, self._on_gpu)  # warms up, with prompts of its own
            engine.recover()
            drawn = draw_shard(engine, specs[batch:], batch, self._on_gpu)
            idle_inside = self._profiled(engine, specs[-1]) if inside else None
        except FarmError as exc:
            row = replace(row, failed=exc.message)
            drawn = None
        if drawn is None:
            engine.recover()
            self._begin_peak()
            return row
        seconds, denoise_s, idle_s = drawn
        row = replace(
            row,
            images=images,
            seconds_per_image=seconds / images,
            outside=1 - denoise_s / seconds,
            idle_between=None if idle_s is None else idle_s / seconds,
            idle_inside=idle_inside,
            peak_gib=self._peak_gib(),
        )
        engine.recover()
        self._begin_peak()
        return row

    def _profiled(self, engine: Engine, spec: ImageSpec) -> float | None:
        """The share of two pictures, one after the other, in which no kernel and no copy runs, from the first to the last."""
        if not self._on_gpu:
            return None
        short = [replace(spec, params=spec.params.model_copy(update={"num_inference_steps": PROFILED_STEPS}))] * 2
        draw(engine, short)  # the prompt is encoded, the shapes are known
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            draw(engine, short)
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        return idle_share(spans)

    def _load(self, engine: Engine) -> float:
        self._begin_peak()
        return engine.load()

    def _engine(self, budget: float) -> Engine:
        self._family = open_family(self._card, self._numerics, device=self._device, vram_gib=budget)
        return Engine(self._card, self._numerics, self._device, budget, family=self._family)

    def _drop(self, engine: Engine) -> None:
        engine.unload()
        Device(self._device, vram_gib=BUDGET_GIB).recover()

    @property
    def _placement(self) -> Placement:
        placement: Placement = getattr(self._family, "placement")  # noqa: B009 - all families of torch have one
        return placement

    def _row(self, case: Case, budget: float, *, batch: int = 1, **found: Any) -> Row:
        return Row(self.subject.model, case, budget, batch, self.subject.images, **found)

    def _specs(self, case: Case, count: int) -> list[ImageSpec]:
        """Pictures whose prompts nobody has encoded before."""
        self._prompts += count
        return specs_of(self._card, prompts(count, first=self._prompts - count), case)

    def _begin_peak(self) -> None:
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def _peak_gib(self) -> float | None:
        return torch.cuda.max_memory_reserved(self._device) / GIB if self._on_gpu else None


def measure(
    subject: Subject, folder: Path, *, images: int | None, parts: Sequence[str], tiny: bool, say: Say
) -> tuple[Bench, Giant]:
    """Write a model where it is not there yet and measure it."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if tiny:
        subject = replace(subject, cases=TINY_CASES, images=TINY_IMAGES)
    subject = replace(subject, images=images or subject.images)
    giant = write_giant(find_card(subject.model, load_settings()), folder, tiny=tiny, device=device, say=say)
    giant = replace(giant, card=_installed(giant.card))
    bench = Bench(subject, giant, _numerics(tiny, device), device, say)
    bench.run(parts)
    return bench, giant


def _installed(card: ModelCard) -> ModelCard:
    """Where bitsandbytes is missing nothing is quantised as it loads, for the farm and its peer alike."""
    there = importlib.util.find_spec("bitsandbytes") is not None
    return card if there else card.model_copy(update={"quantise": {}})


def _numerics(tiny: bool, device: str) -> Numerics:
    return Numerics(
        device="cpu" if device == "cpu" else "cuda",
        dtype="float32" if tiny else "bfloat16",
        batch=1,
        threads=1,
        versions={package: version(package) for package in PACKAGES},
    )


def about() -> dict[str, str | int]:
    """What stands beside the figures: the machine, its GPU, driver and versions."""
    found = environment() | {
        package: version(package) if importlib.util.find_spec(package) else "none"
        for package in ("transformers", "accelerate", "bitsandbytes", "gguf")
    }
    if torch.cuda.is_available():
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gpu_gib": round(gpu.total_memory / GIB), "cuda": str(torch.version.cuda)}
        found["driver"] = str(driver)
    else:
        found["gpu"] = "none"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    names = [subject.model for subject in SUBJECTS]
    parser = argparse.ArgumentParser(description="Measure the large models on a GPU held to 16 GiB.")
    parser.add_argument("--model", choices=names, action="append", help="only this one; may be given again")
    parser.add_argument("--images", type=int, help="pictures of a shard")
    parser.add_argument("--folder", type=Path, help="where the random weights are written and kept")
    parser.add_argument("--parts", default=",".join(ALL_PARTS), help=f"some of {', '.join(ALL_PARTS)}")
    parser.add_argument("--drop", action="store_true", help="delete each model's weights once it is measured")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that all of this works")
    given = parser.parse_args(argv)
    parts = given.parts.split(",")
    if unknown := sorted(set(parts) - set(ALL_PARTS)):
        parser.error(f"--parts knows {', '.join(ALL_PARTS)}, not {unknown[0]}")
    if given.images is not None and given.images < 1:
        parser.error(f"--images must be 1 or more, got {given.images}")
    if given.folder is not None and given.folder.exists() and not given.folder.is_dir():
        parser.error(f"--folder {given.folder} is no folder")
    if not given.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny runs the same code on a CPU")
    folder = given.folder or Path(tempfile.gettempdir()) / "farm-giants"
    setting = about()
    print(f"{setting['date']}: {setting['gpu']}, " + ", ".join(f"{name} {said}" for name, said in setting.items()))
    if given.tiny:
        print("\nTiny models: the code is the same, the figures of memory and time mean nothing.")
    if setting["bitsandbytes"] == "none":
        print("\nbitsandbytes is not installed: text encoders are in bfloat16 where the cards say nf4, for both sides.")
    done: list[tuple[Bench, Giant]] = []
    for subject in SUBJECTS:
        if subject.model in (given.model or names):
            bench, giant = measure(
                subject,
                folder,
                images=given.images,
                parts=parts,
                tiny=given.tiny,
                say=lambda text: print("…", text, flush=True),
            )
            print(tables(bench), flush=True)
            done.append((bench, giant))
            if given.drop:
                where = Path(str(giant.card.source.path))
                for folder_of_it in (where, whole_folder(where)):
                    shutil.rmtree(folder_of_it, ignore_errors=True)
    found = {
        "rows": [asdict(row) | {"within": row.within} for bench, _ in done for row in bench.rows],
        "peers": [
            asdict(peer) | {"ratio": ratio} for bench, _ in done for _, peer, ratio in ratios(bench.rows, bench.peers)
        ],
        "gains": [asdict(gain) for bench, _ in done for gain in bench.gains],
        "checks": [asdict(check) for bench, _ in done for check in bench.checks],
        "denoisers": {bench.subject.model: giant.denoiser for bench, giant in done},
    }
    print(json.dumps({"environment": setting, "tiny": given.tiny, "budget_gib": BUDGET_GIB, **found}))


def tables(bench: Bench) -> str:
    """Return a model's section of the report, in Markdown."""
    newbie = " Diffusers has no pipeline for NewBie: its peer is the farm's own transformer, whole modules moved in a plain loop."
    sections = [f"\n## {bench.subject.model}"]
    if bench.rows:
        sections += [
            memory_table(bench.rows),
            f"Wanted at {BUDGET_GIB:g} GiB: at most {BUDGET_GIB - CONTEXT_GIB:g} reserved, at most {LIMIT_OUTSIDE:.0%} outside "
            f"the denoiser, at most {LIMIT_IDLE:.0%} idle. Other budgets show other placements.",
        ]
    if bench.peers:
        sections += [
            f"Beside a loop with enable_model_cpu_offload, held to {BUDGET_GIB:g} GiB too:",
            peer_table(list(ratios(bench.rows, bench.peers))),
            f"Wanted: {FEWER_STEPS_RATIO:g}× at 8 steps where a model does not fit whole, and above 1 everywhere."
            f"{newbie if bench.subject.model.startswith('newbie') else ''}",
        ]
    if bench.checks:
        sections.append(checks_table(bench.checks))
    if bench.gains:
        sections += ["Other ways to the same pictures, each beside the card's own:", gains_table(bench.gains)]
    return "\n\n".join(sections)


if __name__ == "__main__":
    main()
