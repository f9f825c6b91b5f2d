"""Parked questions on virtual time: who is asked, how often, and who is answered."""

import asyncio

from farm.lease import Ask, Lease, Reply
from farm.parking import IN_VAIN_PAUSE_S, Parking
from tests.unit.virtual import run, settle

NOTHING = Reply("e")


class Work:
    """So many shards, and a count of the offers made."""

    def __init__(self) -> None:
        self.shards = 0
        self.offered: list[str] = []
        self.unfit: set[str] = set()

    def offer(self, question: Ask) -> Reply:
        self.offered.append(question.renderer)
        if not self.shards or question.renderer in self.unfit:
            return NOTHING
        self.shards -= 1
        return Reply("e", lease(f"t{len(self.offered)}"))

    def parking(self) -> Parking:
        return Parking(offer=self.offer, has_work=lambda: self.shards > 0)


def lease(token: str) -> Lease:
    return Lease(token, "render", "job", "run", 1, 0, 4, 1)


def question(renderer: str, sequence: int = 0) -> Ask:
    return Ask(renderer, "i", "e", sequence, None)


def park(parking: Parking, renderer: str, *, sequence: int = 0, seconds: float = 10.0) -> asyncio.Task[Reply]:
    return asyncio.create_task(parking.wait(question(renderer, sequence), NOTHING, seconds=seconds))


def test_a_new_shard_wakes_exactly_one_of_a_thousand_and_costs_one_offer():
    async def main() -> None:
        work = Work()
        parking = work.parking()
        parked = [park(parking, f"r{n}") for n in range(1000)]
        await settle()
        assert len(parking) == 1000
        work.shards = 1
        for _ in range(100):
            parking.wake()
        await settle()
        assert work.offered == ["r0"]
        assert [task.done() for task in parked].count(True) == 1
        assert parked[0].result().lease is not None
        assert len(parking) == 999

    run(main())


def test_wakes_without_work_ask_nobody():
    async def main() -> None:
        work = Work()
        parking = work.parking()
        park(parking, "r0")
        await settle()
        parking.wake()
        await asyncio.sleep(5)
        assert work.offered == []

    run(main())


def test_the_oldest_question_is_answered_first_and_everyone_is_while_there_is_work():
    async def main() -> None:
        work = Work()
        parking = work.parking()
        parked = [park(parking, f"r{n}") for n in range(200)]
        await settle()
        work.shards = 150
        parking.wake()
        await settle()
        assert work.offered == [f"r{n}" for n in range(150)]
        assert all(task.done() for task in parked[:150])
        assert not any(task.done() for task in parked[150:])

    run(main())


def test_work_that_nobody_can_take_is_offered_to_all_now_and_then_and_not_at_every_wake():
    async def main() -> None:
        work = Work()
        parking = work.parking()
        work.unfit = {f"r{n}" for n in range(100)}
        for n in range(100):
            park(parking, f"r{n}", seconds=60)
        await settle()
        work.shards = 1
        for _ in range(100):
            parking.wake()
            await asyncio.sleep(IN_VAIN_PAUSE_S / 50)
        assert len(work.offered) <= 400
        work.unfit = set()
        parking.wake()
        await asyncio.sleep(IN_VAIN_PAUSE_S)
        assert work.shards == 0

    run(main())


def test_only_the_newest_question_of_a_renderer_is_parked():
    async def main() -> None:
        work = Work()
        parking = work.parking()
        old = park(parking, "r0", sequence=3)
        await settle()
        new = park(parking, "r0", sequence=4)
        await settle()
        assert old.result() == NOTHING
        assert len(parking) == 1
        work.shards = 1
        parking.wake()
        await settle()
        assert new.result().lease is not None

    run(main())


def test_a_question_that_waited_for_long_enough_is_answered_with_nothing():
    async def main() -> None:
        parking = Work().parking()
        short, long = park(parking, "r0", seconds=2), park(parking, "r1", seconds=20)
        await asyncio.sleep(3)
        parking.expire(NOTHING)
        await settle()
        assert short.result() == NOTHING
        assert not long.done()

    run(main())


def test_a_caller_that_went_away_leaves_nothing_parked():
    async def main() -> None:
        parking = Work().parking()
        gone = park(parking, "r0")
        await settle()
        gone.cancel()
        await settle()
        assert len(parking) == 0

    run(main())


def test_a_question_forgotten_while_offers_go_round_is_not_offered():
    async def main() -> None:
        work = Work()
        parking = work.parking()
        for n in range(200):
            park(parking, f"r{n}")
        await settle()
        work.shards = 200
        parking.wake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < len(work.offered) < 200
        parking.forget("r199", NOTHING)
        await settle()
        assert work.offered == [f"r{n}" for n in range(199)]

    run(main())
