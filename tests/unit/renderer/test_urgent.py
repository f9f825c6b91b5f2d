"""Urgent images of a renderer, idle or with a shard in hand."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from farm.errors import (
    CancelledError,
    NumericsError,
    RendererDiedError,
)
from farm.lease import (
    STAGE_LIMIT_S,
    Beat,
    Renewal,
)
from farm.manifest import Output
from farm.plan import ImageSpec, Plan
from farm.portion import Portion
from farm.provenance import read_picture
from farm.renderer import STUCK_EXIT, Renderer
from farm.watchdog import Watchdog
from tests.unit.finished_jobs import make_totals
from tests.unit.renderer.in_process import InProcess, make_renderer, slower, until


def portion(plan: Plan, token: str = "t", images: int = 1, *, steps: int = 1, **changes: Any) -> Portion:
    """Urgent images of a plan's model."""
    params = plan.params.model_copy(update={"num_inference_steps": steps})
    specs = tuple(ImageSpec(i, 0, None, "urgent", 1000 + i, params, {}) for i in range(images))
    fields = {"owner": "ann", "card": plan.card, "numerics": plan.numerics} | changes
    return Portion(token, specs=specs, output=Output(), **fields)


def draw_meanwhile(renderer: Renderer, ready: Callable[[], object], *portions: Portion) -> list[Any]:
    """Let a renderer work, draw portions all at once as soon as something is true, and return answers or errors."""

    async def main() -> list[Any]:
        work = asyncio.create_task(renderer.work())
        await until(ready)
        ends = await asyncio.wait_for(
            asyncio.gather(*(renderer.draw(each) for each in portions), return_exceptions=True), 20
        )
        renderer.retire()
        await asyncio.wait_for(work, 20)
        return ends

    return asyncio.run(main())


def at_work(renderer: Renderer) -> bool:
    return any(task.progress.stage == "denoise" for task in renderer._tasks.values())


def test_an_idle_renderer_draws_what_is_urgent_and_tells_which_model_it_has(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)
    answers = draw_meanwhile(renderer, lambda: True, portion(plan, "a", 2), portion(plan, "b"))
    assert [len(answer.images) for answer in answers] == [2, 1]
    assert {(answer.renderer, answer.device) for answer in answers} == {("renderer-0", "a CPU")}
    found = read_picture(answers[0].images[1].data)
    assert (found.provenance.prompt, found.provenance.seed, found.provenance.index) == ("urgent", 1001, 1)
    assert renderer._engines.loaded_model == plan.card.name


def test_urgent_images_cut_into_a_shard_which_ends_as_it_would_have(ledger, plan):
    slow = slower(plan, steps=30)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, make_totals(images=16))
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    answers = []

    async def main() -> None:
        work = asyncio.create_task(renderer.work())
        await until(lambda: at_work(renderer))
        for n in range(5):
            answers.append(await asyncio.wait_for(renderer.draw(portion(plan, f"t{n}")), 20))
            assert renderer._tasks
        await until(lambda: link.completed)
        renderer.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())
    samples = renderer._meters.snapshot().samples
    waited = {s.labels[0][1]: s.value for s in samples if s.name == "farm_urgent_wait_seconds_count"}
    assert set(waited) <= {"step", "batch"}
    assert sum(waited.values()) == 5
    assert [row.status for row in ledger.receipt(slow, 1, link.completed[0].shard).rows] == ["ok"] * 4
    assert link.given_back[:-2] == []


def test_a_dropped_portion_ends_within_a_step_and_the_shard_goes_on(ledger, plan):
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)

    async def main() -> None:
        work = asyncio.create_task(renderer.work())
        drawing = asyncio.create_task(renderer.draw(portion(plan, "long", steps=10_000)))
        await until(lambda: renderer._urgent.in_hand)
        renderer.drop("long")
        with pytest.raises(CancelledError, match="the portion was dropped"):
            await asyncio.wait_for(drawing, 20)
        await until(lambda: link.dispatch.progress(plan.job).state == "done")
        renderer.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())
    assert ledger.totals(plan).ok == 16


def test_who_stops_waiting_for_a_portion_drops_it(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)

    async def main() -> None:
        work = asyncio.create_task(renderer.work())
        drawing = asyncio.create_task(renderer.draw(portion(plan, "long", steps=10_000)))
        await until(renderer._cutin.reports)
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing
        await until(lambda: not renderer._cutin.reports())
        answer = await asyncio.wait_for(renderer.draw(portion(plan, "short")), 20)
        assert answer.images[0].error_code is None
        renderer.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())


def test_a_retired_renderer_fails_its_urgent_images_at_once_and_takes_no_more(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)

    async def main() -> list[BaseException]:
        work = asyncio.create_task(renderer.work())
        waiting = [
            asyncio.create_task(renderer.draw(portion(plan, token, steps=10_000, owner=token))) for token in "abc"
        ]
        await until(renderer._cutin.reports)
        renderer.retire()
        ends = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        await asyncio.wait_for(work, 20)
        with pytest.raises(RendererDiedError, match="renderer-0 was asked to end"):
            await renderer.draw(portion(plan, "late"))
        return ends

    assert [type(end) for end in asyncio.run(main())] == [RendererDiedError] * 3


def test_urgent_work_that_hangs_is_seen_by_the_watchdog_and_urgent_work_that_goes_on_is_not(ledger, plan, monkeypatch):
    monkeypatch.setattr("farm.renderer.WATCH_S", 0.01)
    link = InProcess(ledger, plan.job)
    link.away = True
    ended: list[int] = []
    watchdog = Watchdog({**STAGE_LIMIT_S, "denoise": 0.5})
    renderer = make_renderer(ledger, link, watchdog=watchdog, end_process=ended.append)
    draw_meanwhile(renderer, lambda: True, portion(plan, steps=100))
    assert ended == []

    hung, let_go = make_renderer(ledger, link, watchdog=watchdog, end_process=ended.append), threading.Event()

    def hang(*_: Any, on_step: Callable[[int, int], None], **__: Any) -> None:
        on_step(1, 2)
        let_go.wait(20)
        raise RuntimeError("let go")

    monkeypatch.setattr("farm.models.sleep.SleepFamily.denoise", hang)

    async def main() -> None:
        work = asyncio.create_task(hung.work())
        drawing = asyncio.create_task(hung.draw(portion(plan)))
        await until(lambda: ended)
        let_go.set()
        assert (await asyncio.wait_for(drawing, 20)).images[0].error_code == "render"
        hung.retire()
        await asyncio.wait_for(work, 20)

    asyncio.run(main())
    assert ended == [STUCK_EXIT]


def test_a_portion_planned_for_other_versions_is_refused_with_both_named(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    old = plan.numerics.model_copy(update={"versions": {"numpy": "0.1"}})
    end = draw_meanwhile(make_renderer(ledger, link), lambda: True, portion(plan, numerics=old))[0]
    assert isinstance(end, NumericsError)
    assert "numpy 0.1" in end.message


def test_a_beat_says_what_is_loaded_and_how_many_urgent_images_there_are(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)
    draw_meanwhile(renderer, lambda: True, portion(plan))
    link.away = False
    asyncio.run(renderer._renew())
    standing = link.beats[-1].standing
    assert (standing.loaded_model, standing.loading, standing.urgent) == (plan.card.name, False, 0)
    assert standing.load_s > 0


def test_steps_and_pictures_of_urgent_images_show_in_the_beats(ledger, plan):
    link = InProcess(ledger, plan.job)
    link.away = True
    renderer = make_renderer(ledger, link)
    draw_meanwhile(renderer, lambda: True, portion(plan, "a", steps=3))
    before = renderer._urgent.ticks
    link.away = False
    asyncio.run(renderer._renew())
    assert link.beats[-1].standing.urgent_ticks == before >= 1 + 3 + 1  # load, steps, picture


def test_an_urgent_image_in_a_shards_place_is_announced_and_does_not_wait_for_an_answer(ledger, plan):
    slow = slower(plan, steps=200)
    assert ledger.create_plan(slow, 2)
    ledger.put_totals(plan, 1, make_totals(images=16))
    link = InProcess(ledger, plan.job)
    renderer = make_renderer(ledger, link)
    renderer._beat_s = 3600
    heard: list[Beat] = []

    async def silent(beat: Beat) -> Renewal:
        heard.append(beat)
        await asyncio.sleep(3600)
        raise AssertionError

    link.renew = silent

    async def main() -> float:
        work = asyncio.create_task(renderer.work())
        await until(lambda: at_work(renderer))
        started = time.monotonic()
        for n in range(2):
            answer = await asyncio.wait_for(renderer.draw(portion(plan, f"t{n}", steps=10)), 20)
            assert answer.images[0].error_code is None
        took = time.monotonic() - started
        renderer.retire()
        await asyncio.wait_for(work, 20)
        return took

    assert asyncio.run(main()) < 4
    assert [[report.aside for report in beat.reports if report.in_hand] for beat in heard] == [[True]]
