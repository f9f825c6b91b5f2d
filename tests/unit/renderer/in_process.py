"""A renderer beside a dispatcher in one process: the real rules, store, engine and receipts; only Ray is left out."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from farm.dispatch import Dispatch
from farm.errors import (
    FarmUnavailableError,
)
from farm.lease import (
    Ask,
    Beat,
    Check,
    Completion,
    Drop,
    GiveBack,
    Hello,
    Lease,
    Read,
    Renewal,
    Reply,
    Revoke,
)
from farm.ledger import Ledger
from farm.plan import Plan
from farm.rebuild import completion_of, read_job
from farm.renderer import Renderer
from farm.tally import Snapshot


class InProcess:
    """A link to a dispatcher in this process that can go away, and come back having forgotten everything."""

    def __init__(self, ledger: Ledger, job: str):
        self._ledger = ledger
        self._job = job
        self.away = False
        self.restarts = 0
        self.asked: list[Ask] = []
        self.given_back: list[GiveBack] = []
        self.completed: list[Lease] = []
        self.beats: list[Beat] = []
        self.snapshots: list[Snapshot] = []
        self.every_s: float | None = None
        self.renderers: dict[str, Renderer] = {}
        self.restart()

    def restart(self) -> None:
        self.restarts += 1
        self.dispatch = Dispatch(epoch=f"epoch-{self.restarts}")
        self.dispatch.take_up(read_job(self._ledger, self._job), now=self.now)

    @property
    def now(self) -> float:
        return time.monotonic()

    def _answer(self) -> None:
        if self.away:
            raise FarmUnavailableError("away")

    def act(self) -> None:
        """Do what the rules ask for."""
        for effect in self.dispatch.effects():
            match effect:
                case Drop(renderer, token):
                    self.renderers[renderer].drop(token)
                case Revoke(renderer, token):
                    self.renderers[renderer].revoke(token)
                case Check():
                    self.dispatch.checked(effect, completion_of(self._ledger, effect), now=self.now)
                case Read(job):
                    self.dispatch.take_up(read_job(self._ledger, job), now=self.now)

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        self._answer()
        return self.dispatch.meet(hello, now=self.now)

    async def ask(self, question: Ask) -> Reply:
        self._answer()
        self.asked.append(question)
        reply = self.dispatch.ask(question, now=self.now)
        self.act()
        if reply.lease is None:
            await asyncio.sleep(0.01)
        return reply

    async def renew(self, beat: Beat) -> Renewal:
        self._answer()
        self.beats.append(beat)
        renewal = self.dispatch.renew(beat, now=self.now)
        self.act()
        return renewal if self.every_s is None else replace(renewal, every_s=self.every_s)

    async def complete(self, completion: Completion) -> None:
        self._answer()
        self.completed.append(completion.lease)
        self.dispatch.complete(completion, now=self.now)
        self.act()

    async def give_back(self, end: GiveBack) -> None:
        self._answer()
        self.given_back.append(end)
        self.dispatch.give_back(end, now=self.now)
        self.act()

    async def report(self, snapshot: Snapshot) -> None:
        self._answer()
        self.snapshots.append(snapshot)


def make_renderer(
    ledger: Ledger, link: InProcess, name: str = "renderer-0", *, cores: int = 1, **options: Any
) -> Renderer:
    renderer = Renderer(
        name=name,
        incarnation="i",
        device="cpu",
        device_name="a CPU",
        cores=cores,
        vram_gib=16,
        ledger=ledger,
        link=link,
        **options,
    )
    link.renderers[name] = renderer
    return renderer


def slower(plan: Plan, *, steps: int) -> Plan:
    """Another run of the job, with steps of 10 ms an image."""
    params = plan.params.model_copy(update={"num_inference_steps": steps})
    return plan.model_copy(update={"params": params, "run": "11111111"})


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110  (what it waits for has no event)
            await asyncio.sleep(0.005)


def run_until(true: Callable[[], object], *renderers: Renderer, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Let renderers work until something is true, then retire them."""

    async def main() -> None:
        works = [asyncio.create_task(renderer.work()) for renderer in renderers]
        meanwhile()
        await until(true)
        for renderer in renderers:
            renderer.retire()
        await asyncio.wait_for(asyncio.gather(*works), 20)

    asyncio.run(main())
