"""A dispatch on a bench: renderers that talk to it by hand, a clock that is set, effects that are carried out at once."""

from collections.abc import Mapping

import numpy as np

from farm.bitmap import Bitmap
from farm.dispatch import Dispatch
from farm.lease import Ask, Beat, Check, Completion, Drop, End, GiveBack, Hello, Lease, Read, Renewal, Report, Revoke
from farm.run import JobView, RunEntry


def entry(job: str = "job", *, images: int = 10, shard_images: int = 4, **fields: object) -> RunEntry:
    shards = -(-images // shard_images)
    done = fields.pop("done", np.zeros(shards, dtype=bool))
    given: dict[str, object] = {
        "job": job,
        "run": f"{job}-run",
        "model": "sketch",
        "pass_number": 1,
        "images": images,
        "shard_images": shard_images,
        "created_at": "2026-01-01T00:00:00Z",
        "done": Bitmap.of(np.asarray(done, dtype=bool)),
    }
    return RunEntry(**(given | fields))  # type: ignore[arg-type]


def view(*runs: RunEntry, job: str | None = None, **fields: object) -> JobView:
    return JobView(job or runs[0].job, runs=runs, **fields)  # type: ignore[arg-type]


class Bench:
    """`views` is what the ledger would say; `receipts` answers checks; what else was asked for is kept."""

    def __init__(
        self, *jobs: RunEntry | JobView, epoch: str = "e1", shares: Mapping[str, float] = {}, claims: bool = False
    ):
        self.dispatch = Dispatch(epoch=epoch, shares=shares, claims=claims)
        self.now = 0.0
        self.wall = 1_000_000.0
        self.sequence: dict[str, int] = {}
        self.views: dict[str, JobView] = {}
        self.receipts: dict[int, Completion] = {}
        self.dropped: list[tuple[str, str]] = []
        self.revoked: list[tuple[str, str]] = []
        self.ended: list[tuple[str, str]] = []
        self.checks: list[Check] = []
        self.answers_checks = True
        for one in jobs:
            self.take_up(one)

    def take_up(self, job: RunEntry | JobView, *, again: bool = False) -> None:
        found = job if isinstance(job, JobView) else view(job)
        self.views[found.job] = found
        self.dispatch.take_up(found, again=again, now=self.now)
        self.perform()

    def perform(self) -> None:
        """Carry out what the dispatch asks for, until it asks for nothing more."""
        while effects := self.dispatch.effects():
            for effect in effects:
                match effect:
                    case Drop(renderer, token):
                        self.dropped.append((renderer, token))
                    case Revoke(renderer, token):
                        self.revoked.append((renderer, token))
                    case End(renderer, why):
                        self.ended.append((renderer, why))
                    case Check():
                        self.checks.append(effect)
                        if self.answers_checks:
                            self.dispatch.checked(effect, self.receipts.get(effect.shard), now=self.now)
                    case Read(job) if job in self.views:
                        self.dispatch.take_up(self.views[job], now=self.now)

    def meet(self, renderer: str, *held: Lease, incarnation: str = "i") -> tuple[str, ...]:
        dropped = self.dispatch.meet(Hello(renderer, incarnation, "cpu", held), now=self.now)
        self.perform()
        return dropped

    def ask(self, renderer: str, *, model: str | None = None, repeat: bool = False) -> Lease | None:
        if not repeat:
            self.sequence[renderer] = self.sequence.get(renderer, 0) + 1
        question = Ask(renderer, "i", self.dispatch.epoch, self.sequence[renderer], model)
        lease = self.dispatch.ask(question, now=self.now).lease
        self.perform()
        return lease

    def need(self, renderer: str, *, model: str | None = None) -> Lease:
        lease = self.ask(renderer, model=model)
        assert lease is not None
        return lease

    def beat(self, renderer: str, *reports: Report, epoch: str | None = None) -> Renewal:
        renewal = self.dispatch.renew(Beat(renderer, "i", epoch or self.dispatch.epoch, reports), now=self.now)
        self.perform()
        return renewal

    def report(
        self,
        renderer: str,
        lease: Lease,
        *,
        ticks: int = 1,
        in_hand: tuple[int, ...] = (),
        stage="denoise",
        fraction=0.5,
        aside: bool = False,
        aside_s: float = 0.0,
    ) -> tuple[str, ...]:
        return self.beat(renderer, Report(lease.token, stage, ticks, fraction, in_hand, aside, aside_s)).gone

    def complete(self, renderer: str, lease: Lease, *, failed: int = 0, **seconds: float) -> None:
        """Complete a lease; of a finalised pass the ledger then shows nothing open."""
        if lease.task == "finalise":
            found = self.views[lease.job]
            left = tuple(run for run in found.runs if run.run != lease.run)
            self.views[lease.job] = JobView(**{name: getattr(found, name) for name in found.__slots__} | {"runs": left})
        done = Completion(lease, renderer, lease.images - failed, failed, seconds or {"denoise": 1.0})
        self.dispatch.complete(done, now=self.now)
        self.perform()

    def give_back(self, renderer: str, lease: Lease, code: str) -> None:
        self.dispatch.give_back(GiveBack(lease, renderer, code, f"why: {code}"), now=self.now)
        self.perform()

    def lose(self, renderer: str) -> None:
        self.dispatch.lost(renderer, now=self.now)
        self.perform()

    def tick(self) -> list[tuple[str, str]]:
        """Tick; returns the renderers that were ended by it."""
        before = len(self.ended)
        self.dispatch.tick(now=self.now, wall=self.wall + self.now)
        self.perform()
        return self.ended[before:]

    def wait(self, seconds: float, *beating: str) -> None:
        """Let time pass second by second; the `beating` renderers show life without a report."""
        for _ in range(int(seconds)):
            self.now += 1.0
            for name in beating:
                self.beat(name)
            self.tick()

    def state(self, job: str = "job") -> str:
        found = self.dispatch.progress(job)
        assert found is not None
        return found.state
