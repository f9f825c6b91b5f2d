"""What waits, what is held, and by whom: the dispatcher's state, and the changes that keep it whole.

A lease is counted in five places (its renderer, its shard, its job's limits, its owner's share, the queue). Whatever
gives one out or ends one goes through here, so that the five agree. Decides nothing: that is `farm/dispatch.py`.
"""

from collections.abc import Iterable, Mapping

from farm.held import Held, Renderer
from farm.lease import Check, Drop, Effect, Lease, Revoke
from farm.queue import Queue, Waiting
from farm.run import JobState, RunState

FINALISE_FIRST = 101
"""The priority of finalising, above all that people can give: it takes no device, and somebody waits for its end."""
TASKS = ("", "/finalise")
ASK_BACK_EVERY_S = 10.0
"""Pause before a lease that has not begun is asked for again."""


class Board:
    """Jobs and runs by name, leases by token, renderers by name; `effects` are what should be done outside.

    `drained` renderers get nothing more to do, because a person said so; `reserved` ones no shards, by the time of day. Both
    are names of slots, whether a renderer is there or not.
    """

    def __init__(self, shares: Mapping[str, float]):
        self.jobs: dict[str, JobState] = {}
        self.runs: dict[str, RunState] = {}
        self.held: dict[str, Held] = {}
        self.renderers: dict[str, Renderer] = {}
        self.effects: list[Effect] = []
        self.queue = Queue(shares)
        self.drained: set[str] = set()
        self.reserved: frozenset[str] = frozenset()
        self._refused: set[str] = set()
        self._wall_ahead = 0.0

    def set_wall(self, wall: float, *, now: float) -> None:
        """Know what the wall clock says, Unix seconds."""
        self._wall_ahead = wall - now

    def in_time(self, job: JobState, now: float) -> bool:
        """Whether a job's `finish_by` has not passed yet."""
        return job.view.finish_by is None or now + self._wall_ahead < job.view.finish_by

    # What waits

    def requeue_job(self, job: JobState, now: float) -> None:
        """Let each of a job's runs wait in the queue, or not, as things stand."""
        for run in job.runs.values():
            self.requeue(job, run, now)

    def requeue(self, job: JobState, run: RunState, now: float) -> None:
        """Let a run wait in the queue, or not, as things stand. What is left to finalise goes before everything."""
        name, view = run.entry.run, job.view
        if view.state != "open" or not run.has_work():
            self.queue.remove(name)
            return
        if not run.rendered:
            images = run.shard_size(run.next_shard())
            seconds = None if run.speed is None else run.expected_s(images)
            job.limit = job.over(images, seconds, now + self._wall_ahead)
        if not job.is_open or (job.limit is not None and not run.rendered):
            self.queue.remove(name)
            return
        priority, model = (FINALISE_FIRST, "") if run.rendered else (view.priority, run.entry.model)
        self.queue.put(Waiting(run.entry.created_at, name, priority, view.owner, model))

    # Who can do what

    def fits(self, renderer: Renderer, run: RunState, now: float) -> bool:
        """Whether a renderer may be given what a run needs next: not while it rests from failures there, nor a shard where
        it is kept for other work."""
        if renderer.name in self.drained or (renderer.name in self.reserved and not run.rendered):
            return False
        trouble = renderer.troubles.get(task(run))
        return trouble is None or now >= trouble.until

    def renderers_for_shards(self) -> int:
        """How many renderers may be given shards."""
        kept = self.drained | self.reserved
        return len(self.renderers) - sum(name in self.renderers for name in kept)

    def is_kept(self, renderer: str) -> bool:
        """Whether a renderer gets no shards for now."""
        return renderer in self.drained or renderer in self.reserved

    def refused(self, run: RunState, why: tuple[str, str]) -> None:
        """A renderer leaves a run to others; `why` is a code and words for people."""
        run.refusal = why
        self._refused.add(run.entry.run)

    def stall_refused(self, now: float) -> None:
        """Stall the runs that every renderer leaves to others."""
        for name in self._refused:
            run = self.runs[name]
            if run.refusal is None or run.stalled or run.finalised or not self.renderers:
                continue
            troubles = [one.troubles.get(task(run)) for one in self.renderers.values()]
            if all(one is not None and one.refusal is not None and now < one.until for one in troubles):
                run.stall(*run.refusal)
                self.queue.remove(name)

    def unstall_refused(self, now: float) -> None:
        """Let runs that every renderer refused be tried by one that has just come."""
        for name in self._refused:
            run = self.runs[name]
            if run.stalled is not None and run.stalled == run.refusal:
                run.stalled = run.message = None
                self.requeue(self.jobs[run.entry.job], run, now)

    def fit_again(self, run: RunState) -> None:
        """Forget every renderer's failures at a run."""
        run.refusal = None
        self._refused.discard(run.entry.run)
        for renderer in self.renderers.values():
            for kind in TASKS:
                renderer.troubles.pop(run.entry.run + kind, None)

    def forget_runs(self, job: JobState) -> None:
        """Forget a job's runs, whose leases have ended."""
        for name, run in job.runs.items():
            self.queue.remove(name)
            self.fit_again(run)
            del self.runs[name]
        job.runs.clear()

    # What is held

    def hold(self, lease: Lease, renderer: Renderer, now: float) -> Held:
        """Give a lease to a renderer."""
        held = self.held[lease.token] = renderer.held[lease.token] = Held(lease, renderer.name, now, now)
        return held

    def serve(self, renderer: Renderer, owner: str | None) -> None:
        """Note whom a renderer works for now."""
        if renderer.serves != owner:
            if renderer.serves is not None:
                self.queue.serve(renderer.serves, -1)
            if owner is not None:
                self.queue.serve(owner, 1)
            renderer.serves = owner

    def attach(self, job: JobState, run: RunState, held: Held) -> None:
        """Count a lease for its job and run, and its time for their owner."""
        lease = held.lease
        held.owner = job.view.owner
        held.attached = True
        self.serve(self.renderers[held.renderer], held.owner)
        run.attempts[lease.shard] = max(run.attempts.get(lease.shard, 0), lease.attempt)
        if lease.task == "finalise":
            run.finaliser = lease.token
            return
        run.unsure.discard(lease.shard)
        holders = run.held.setdefault(lease.shard, [])
        if not holders:
            job.images_held += lease.images
        holders.append(lease)
        held.expected_s = run.expected_s(lease.images)
        self.queue.share.expect(held.owner, held.expected_s)
        job.gpu_expected_s += held.expected_s
        self.charge(held, held.charged_s)

    def charge(self, held: Held, seconds: float) -> None:
        """Charge measured device seconds to who caused them; what is expected shrinks by as much."""
        if not seconds or not held.attached:
            return
        share = self.queue.share
        share.charge(held.owner, seconds)
        job = self.jobs.get(held.lease.job)
        spent = min(max(seconds, 0.0), held.expected_s)
        held.expected_s -= spent
        share.expect(held.owner, -spent)
        if job is not None:
            job.gpu_s += seconds
            job.gpu_expected_s -= spent

    def release(self, held: Held, *, now: float, back: bool = True, sure: bool = False) -> RunState | None:
        """End a lease. Its shard waits again if it came `back`: at once where it surely has no receipt, else once that
        was looked up. Returns the run, where it is still known."""
        lease = held.lease
        if self.held.pop(lease.token, None) is None:
            return None
        renderer = self.renderers.get(held.renderer)
        if renderer is not None:
            renderer.held.pop(lease.token, None)
            renderer.asked_at = max(renderer.asked_at, now)
            if not renderer.held:
                self.serve(renderer, None)
        job, run = self.jobs.get(lease.job), self.runs.get(lease.run)
        if job is None or run is None or run.entry.pass_number != lease.pass_number:
            return None
        if lease.task == "finalise":
            if run.finaliser == lease.token:
                run.finaliser = None
        else:
            self._let_go(job, run, held, back=back, sure=sure)
        self.requeue(job, run, now)
        return run

    def _let_go(self, job: JobState, run: RunState, held: Held, *, back: bool, sure: bool) -> None:
        lease = held.lease
        holders = run.held.get(lease.shard, [])
        if lease not in holders:
            return
        self.queue.share.expect(held.owner, -held.expected_s)
        job.gpu_expected_s -= held.expected_s
        holders.remove(lease)
        if holders:
            return
        job.images_held -= lease.images
        del run.held[lease.shard]
        if not back or run.finalised or run.done[lease.shard]:
            return
        if sure:
            run.came_back(lease.shard)
        else:
            run.unsure.add(lease.shard)
            self.effects.append(Check(lease.job, lease.run, lease.pass_number, lease.shard))

    def drop(self, held: Held, now: float) -> None:
        """End a lease that nobody needs, and tell its renderer."""
        self.effects.append(Drop(held.renderer, held.lease.token))
        self.release(held, now=now)

    def drop_leases(self, run: RunState, now: float) -> None:
        """End every lease of a run's pass."""
        tokens = [lease.token for leases in run.held.values() for lease in leases]
        for token in [*tokens, *([run.finaliser] if run.finaliser else [])]:
            self.drop(self.held[token], now)

    def ask_back(self, leases: Iterable[Held], now: float) -> None:
        """Ask for leases that have not begun; each once in a while, since a call may be lost."""
        for held in leases:
            if not held.has_begun and held.lease.task == "render" and now >= held.ask_back_at:
                held.ask_back_at = now + ASK_BACK_EVERY_S
                self.effects.append(Revoke(held.renderer, held.lease.token))


def task(run: RunState) -> str:
    """The name of what a run needs next, under which renderers' failures are kept: its shards, or to be finalised."""
    return run.entry.run + TASKS[run.rendered]
