"""A device's places, engines and urgent queue without a renderer, and shards that are cut into."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from farm.cores import Cores
from farm.cutin import CutIn
from farm.drawing import ShardProgress
from farm.engine import Engine
from farm.engines import Engines
from farm.manifest import Output
from farm.meters import Meters
from farm.plan import ImageSpec, Plan
from farm.portion import Portion
from farm.receipt import Receipt
from farm.shard import ShardRunner
from farm.urgent import Share, UrgentQueue
from tests.drawing import card, ledger, numerics, on_device, spec

PROMPTS = ["a red circle", "a blue star on the white background", "a green square", "two black stars"]


class Device:
    """A device's places, engines and urgent queue, joined as a renderer joins them. `lost`: its process was to end."""

    def __init__(self, *, cores: int = 1, share: Share | None = None):
        changed = threading.Condition()
        self.meters = Meters("r", "i")
        self.queue = UrgentQueue(changed, share=share)
        self.cores = Cores(cores, changed=changed, urgent=self.queue.may_cut_in)
        self.engines = Engines("cpu", 16.0, meters=self.meters, host_gib=0.0)  # one model at a time, as on a GPU
        self.lost = threading.Event()
        self.cutin = CutIn(
            renderer="r",
            device="a CPU",
            cores=self.cores,
            queue=self.queue,
            engines=self.engines,
            meters=self.meters,
            on_lost=self.lost.set,
        )

    def draw(self, portion: Portion) -> Any:
        return self.queue.put(portion, now=time.monotonic())

    def counted(self, name: str) -> float:
        return sum(sample.value for sample in self.meters.snapshot().samples if sample.name == name)

    def waits(self, kind: str) -> float:
        return sum(
            sample.value
            for sample in self.meters.snapshot().samples
            if sample.name == "farm_urgent_wait_seconds_count" and ("kind", kind) in sample.labels
        )


TROUBLE: dict[int, Callable[[Sequence[ImageSpec]], None]] = {0: lambda specs: None}


def trouble(specs: Sequence[ImageSpec]) -> None:
    TROUBLE[0](specs)


def portion(token: str = "t", images: int = 1, *, owner: str = "ann", **changes: Any) -> Portion:
    made = changes.pop("card", card())
    prompts = changes.pop("prompts", [f"urgent {i}" for i in range(images)])
    output = changes.pop("output", Output())
    specs = tuple(spec(i, prompt, **changes) for i, prompt in enumerate(prompts))
    return Portion(token, owner, made, numerics(), specs, output)


def run_shard(folder: Path, planned: Plan, engine: Engine, *, device: Device | None = None, **options: Any) -> Receipt:
    arguments: dict[str, Any] = {
        "pass_number": 1,
        "shard": 0,
        "attempt": 1,
        "engine": lambda _: engine,
        "on_device": on_device(),
        "aside": device.cutin if device else None,
    }
    return ShardRunner(ledger(folder), planned, renderer="r", device="cpu").run(**arguments | options)


def at_denoise(step: int, do: Callable[[], object]) -> Callable[[ShardProgress], None]:
    """An `on_progress` that does something once, when a shard has been told so often of a denoising step."""
    seen = []

    def on_progress(progress: ShardProgress) -> None:
        if progress.stage == "denoise" and progress.in_hand:
            seen.append(progress)
            if len(seen) == step:
                do()

    return on_progress


def loaded(**changes: Any) -> Engine:
    engine = Engine(card(), numerics(**changes), "cpu", 16.0)
    engine.load()
    return engine
