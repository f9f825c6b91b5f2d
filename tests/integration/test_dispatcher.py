"""The real dispatcher actor under a thousand callers, on a Ray that has no room for a renderer of its own.

The callers are coroutines of this process that speak as renderers do. Nothing here is timed: how fast it is, measures
`python -m farm.bench.parking`.
"""

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.cluster import OBJECT_STORE_BYTES, ray  # Ray from there: what it reads at its import is set first
from actors.dispatcher import DispatcherActor
from actors.names import NAMESPACE
from actors.pool import RayPool
from actors.renderer import RendererActor
from farm import __version__
from farm.errors import FarmUnavailableError
from farm.lease import Ask, Completion, GiveBack, Hello, Reply
from farm.ledger import Ledger
from farm.settings import Settings
from farm.storage.local import LocalStore
from tests.chaos import end, title
from tests.integration.test_farm import until
from tests.unit.finished_jobs import commit_shard, make_plan

CALLERS = 1000
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        namespace=NAMESPACE,
    )
    yield
    ray.shutdown()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(LocalStore(tmp_path))


@pytest.fixture
def dispatcher(cluster: None, ledger: Ledger, tmp_path: Path) -> Iterator[Any]:
    actor = DispatcherActor.options(name="dispatcher", namespace=NAMESPACE, lifetime="detached").remote(
        Settings(store=str(tmp_path)), 1, cores=1, gpu=False, all_open=False, farm="test", pid=os.getpid()
    )
    yield actor
    ray.kill(actor)
    pool = RayPool(Settings(store=str(tmp_path)), 1, cores=1, gpu=False)
    for name in pool.find():
        pool.end(name)  # the renderer that it wished for, and Ray had no room for


class Callers:
    """A thousand renderers, as far as the dispatcher can tell."""

    def __init__(self, dispatcher: Any):
        self.dispatcher = dispatcher
        self.names = [f"caller-{number}" for number in range(CALLERS)]
        self.epoch = ""
        self.sequence = 0

    async def meet(self) -> None:
        """Learn the dispatcher's epoch, as one whom it does not know, and introduce everyone."""
        reply: Reply = await self.dispatcher.ask.remote(Ask(self.names[0], "i", "", 0, None))
        assert reply.meet
        self.epoch = reply.epoch
        await asyncio.gather(*(self.dispatcher.meet.remote(Hello(name, "i", "a CPU")) for name in self.names))

    def ask(self) -> dict[str, asyncio.Future[Reply]]:
        """Ask for work, all of them."""
        self.sequence += 1
        return {
            name: asyncio.ensure_future(
                _answer(self.dispatcher.ask.remote(Ask(name, "i", self.epoch, self.sequence, None)))
            )
            for name in self.names
        }


async def _answer(reference: Any) -> Reply:
    reply: Reply = await reference
    return reply


def submitted(ledger: Ledger, job: str) -> None:
    """A job of one shard."""
    ledger.open(job)
    assert ledger.create_plan(make_plan(job=job, rows=2, seeds=2, shard_images=4), 1)


async def until_one(parked: dict[str, asyncio.Future[Reply]]) -> tuple[str, Reply]:
    """The first caller that is answered, and what."""
    done, _ = await asyncio.wait(parked.values(), timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    found = next(name for name, future in parked.items() if future.done())
    return found, parked.pop(found).result()


def test_one_shard_wakes_one_of_a_thousand_and_people_are_answered_meanwhile(dispatcher, ledger):
    async def main() -> None:
        callers = Callers(dispatcher)
        await callers.meet()
        parked = callers.ask()
        assert await dispatcher.progress.remote("nothing") == (None, None)
        assert not any(future.done() for future in parked.values()), "all of them are parked, and people get through"
        submitted(ledger, "first")
        await dispatcher.submit.remote("first")
        name, reply = await until_one(parked)
        assert reply.lease is not None
        progress, _ = await dispatcher.progress.remote("first")
        assert (progress.state, progress.renderers, progress.renderers_busy) == ("running", CALLERS, 1)
        assert not any(future.done() for future in parked.values())
        await dispatcher.give_back.remote(GiveBack(reply.lease, name, "revoked", "asked back"))
        other, again = await until_one(parked)
        assert again.lease is not None
        assert (again.lease.shard, again.lease.attempt) == (0, 2)
        ledger.append_control("first", "cancel", at="2026-01-01T00:00:00+00:00", by="a person")
        await dispatcher.submit.remote("first")
        progress, _ = await dispatcher.progress.remote("first")
        assert progress.state == "cancelled"
        assert other != name
        assert all(reply.lease is None for reply in await asyncio.gather(*parked.values()))

    asyncio.run(main())


def test_a_renderer_of_another_version_is_ended_and_both_versions_are_named(cluster, tmp_path, monkeypatch):
    actor = RendererActor.options(name="renderer-0", namespace=NAMESPACE, lifetime="detached", num_cpus=0)
    handle = actor.remote("renderer-0", Settings(store=str(tmp_path)), 1)
    pool = RayPool(Settings(store=str(tmp_path)), 1, cores=1, gpu=False)
    assert pool.find() == ("renderer-0",)
    monkeypatch.setattr("actors.pool.__version__", "9.9")
    with pytest.raises(
        FarmUnavailableError, match=rf"has version {re.escape(__version__)}, its dispatcher 9\.9; install 9\.9"
    ):
        asyncio.run(pool.work("renderer-0"))
    until(lambda: has_ended(handle))
    with pytest.raises(ValueError, match="renderer-0"):
        ray.get_actor("renderer-0", NAMESPACE)


def has_ended(renderer: Any) -> bool:
    """A killed actor may answer a last time: Ray ends it meanwhile."""
    try:
        ray.get(renderer.retire.remote(), timeout=PATIENCE_S)
    except ray.exceptions.RayActorError:
        return True
    return False


def test_of_a_caller_that_asks_again_only_the_newest_question_waits(dispatcher, ledger):
    async def main() -> None:
        callers = Callers(dispatcher)
        await callers.meet()
        older, newer = callers.ask(), callers.ask()
        replies = await asyncio.wait_for(asyncio.gather(*older.values()), PATIENCE_S)
        assert all(reply.lease is None for reply in replies)
        assert not any(future.done() for future in newer.values())
        submitted(ledger, "second")
        await dispatcher.submit.remote("second")
        _, reply = await until_one(newer)
        assert reply.lease is not None

    asyncio.run(main())


def test_a_dispatcher_killed_with_a_thousand_parked_questions_comes_back_and_asks_who_is_there(dispatcher, ledger):
    async def main() -> None:
        callers = Callers(dispatcher)
        await callers.meet()
        submitted(ledger, "third")
        await dispatcher.submit.remote("third")
        parked = callers.ask()
        holder, reply = await until_one(parked)
        assert reply.lease is not None
        await dispatcher.progress.remote("third")
        killed = [child for child in psutil.Process().children(recursive=True) if title(child).startswith("ray::Disp")]
        end(killed[0].pid)
        replies = await asyncio.wait_for(asyncio.gather(*parked.values()), PATIENCE_S)
        assert all(reply.meet for reply in replies), "Ray asks again for them, and the new dispatcher knows nobody"
        assert {reply.epoch for reply in replies} != {callers.epoch}
        callers.epoch = replies[0].epoch
        assert await dispatcher.progress.remote("third") == (None, None)
        assert await dispatcher.meet.remote(Hello(holder, "i", "a CPU", (reply.lease,))) == ()
        await dispatcher.submit.remote("third")
        progress, _ = await dispatcher.progress.remote("third")
        while progress.state == "waiting":  # its claim is taken anew
            progress, _ = await dispatcher.progress.remote("third")
        assert (progress.state, progress.renderers_busy) == ("running", 1)
        plan = ledger.plan("third")
        commit_shard(ledger, plan, 0)
        await dispatcher.meet.remote(Hello("caller-0", "i", "a CPU"))
        await dispatcher.complete.remote(Completion(reply.lease, holder, 4, 0))
        last: Reply = await dispatcher.ask.remote(Ask("caller-0", "i", callers.epoch, 9, None))
        assert last.lease is not None
        assert last.lease.task == "finalise"

    asyncio.run(main())
