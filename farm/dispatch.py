"""Hand out shards to renderers and take them back: the rules, without clock, network or storage.

Every method is quick, blocks on nothing and is given the time (`now`, monotonic seconds). What is durable is decided by
receipts alone: a shard is done when its receipt exists, whoever wrote it, so that forgetting everything here costs time
and never truth.
"""

import heapq
from dataclasses import dataclass, field, replace

from farm.lease import (
    CONFIRM_S,
    LEASE_S,
    STAGE_LIMIT_S,
    Ask,
    Beat,
    Completion,
    GiveBack,
    Hello,
    Lease,
    Renewal,
    Reply,
    Report,
)
from farm.queue import Waiting, next_job
from farm.retry import FINALISE_DEATHS_BEFORE_STALL, IDLE_DEATHS_BEFORE_STALL, Blame, after_failure
from farm.run import FINALISE, JobProgress, RunEntry, RunState

RATE_WINDOW_S = 30.0
"""Span of the measured images per second."""
PAUSE_S = 5.0
"""A tick this late means that this process stood still, and heard nobody meanwhile: that is nobody's silence."""
RUNS_KEPT = 256
"""Finalised runs that progress can still be asked of."""


@dataclass(slots=True)
class _Held:
    """A lease given out, and when it was last reported and last showed progress."""

    lease: Lease
    renderer: str
    reported_at: float
    progressed_at: float
    report: Report | None = None


@dataclass(slots=True)
class _Renderer:
    incarnation: str
    device: str
    heard_at: float
    sequence: int = -1
    answered: Lease | None = None
    unfit: set[str] = field(default_factory=set)


class Dispatch:
    """Leases over a queue of runs."""

    def __init__(self, *, epoch: str):
        self.epoch = epoch
        self._runs: dict[str, RunState] = {}
        self._held: dict[str, _Held] = {}
        self._renderers: dict[str, _Renderer] = {}
        self._granted = 0
        self._ticked_at: float | None = None

    # Runs

    def add(self, entry: RunEntry) -> None:
        """Take up a run's open pass; one already known is left as it is, unless it is a later pass or was stopped."""
        known = self._runs.get(entry.run)
        if known and known.entry.pass_number > entry.pass_number:
            return
        if known and known.entry.pass_number == entry.pass_number and not (known.stopped or known.stalled):
            return
        if known:
            self._drop_leases(known)
        for renderer in self._renderers.values():
            renderer.unfit.discard(entry.run)
        run = RunState(entry)
        self._runs[entry.run] = run
        finalised = [name for name, one in self._runs.items() if one.finalised]
        for name in finalised[:-RUNS_KEPT]:
            del self._runs[name]
        for held in self._held.values():
            if held.lease.run == entry.run and held.lease.pass_number == entry.pass_number:
                self._attach(run, held.lease)

    def stop(self, job: str, reason: str) -> tuple[tuple[str, str], ...]:
        """Lease no more of a job; returns (renderer, token) of each lease that should end now."""
        ended = []
        for run in self._of(job):
            if not run.finalised:
                run.stopped = reason
                ended += self._drop_leases(run)
        return tuple(ended)

    def unfinished(self) -> tuple[str, ...]:
        """Names of the jobs with work that is not done, stopped or stalled."""
        return tuple(sorted({r.entry.job for r in self._runs.values() if not (r.finalised or r.stopped or r.stalled)}))

    # Renderers

    def meet(self, hello: Hello, *, now: float) -> tuple[str, ...]:
        """Know a renderer, and take over the leases that it holds; returns tokens that it should drop."""
        known = self._renderers.get(hello.renderer)
        if known and known.incarnation != hello.incarnation:
            self.lost(hello.renderer)
        unfit = known.unfit if known else set()
        self._renderers[hello.renderer] = _Renderer(hello.incarnation, hello.device, now, unfit=unfit)
        return tuple(lease.token for lease in hello.held if not self._take_over(lease, hello.renderer, now))

    def _take_over(self, lease: Lease, renderer: str, now: float) -> bool:
        """Let a renderer keep a lease that it reports, unless it is done, stopped, of another pass or someone else's."""
        run = self._runs.get(lease.run)
        if run is not None:
            holder = run.finaliser if lease.task == "finalise" else run.held.get(lease.shard)
            if (
                run.stopped
                or run.finalised
                or lease.pass_number != run.entry.pass_number
                or (lease.task == "render" and run.done[lease.shard])
                or (holder is not None and holder != lease.token)
            ):
                return False
            self._attach(run, lease)
        self._held[lease.token] = _Held(lease, renderer, now, now)
        return True

    def lost(self, renderer: str, *, blame: bool = True) -> None:
        """A renderer's process ended: its leases go back at once, and what it had in hand is blamed where `blame`."""
        self._renderers.pop(renderer, None)
        mine = [held for held in self._held.values() if held.renderer == renderer]
        runs = [(held, self._release(held)) for held in mine]
        if blame:
            self._blame([(held, run) for held, run in runs if run is not None])
        self._stall_unfit()

    def _blame(self, lost: list[tuple[_Held, RunState]]) -> None:
        """Count a death against the batch that was on the device, else against the run whose model was loading."""
        rendering = [(held, run) for held, run in lost if held.report and held.report.in_hand]
        for held, run in rendering:
            if held.report:
                run.blame.setdefault(held.lease.shard, Blame()).died(held.report.in_hand)
        for held, run in lost[:1] if not rendering else ():
            if held.lease.task == "finalise":
                run.finalise_deaths += 1
            else:
                run.idle_deaths += 1
            if run.finalise_deaths >= FINALISE_DEATHS_BEFORE_STALL:
                run.stall(
                    "renderer_died",
                    f"writing the dataset ended its renderer {run.finalise_deaths} times; look into the renderers' logs, "
                    "check host memory, then render again",
                )
            elif run.idle_deaths >= IDLE_DEATHS_BEFORE_STALL:
                run.stall(
                    "renderer_died",
                    f"renderers died {run.idle_deaths} times without finishing a batch of {run.entry.model}; "
                    "look into the renderers' logs, check host and GPU memory, then render again",
                )

    # Leases

    def ask(self, question: Ask, *, now: float, grants: bool = True) -> Reply:
        """Answer a renderer's question for work. A lease of None means: nothing for you now.

        Without `grants` no new lease is given: renderers that live may still have to report theirs.
        """
        renderer = self._known(question, now)
        if renderer is None:
            return Reply(self.epoch, meet=True)
        if question.sequence == renderer.sequence and renderer.answered and renderer.answered.token in self._held:
            return Reply(self.epoch, renderer.answered)
        if not grants or question.sequence <= renderer.sequence:
            return Reply(self.epoch)
        lease = self._grant(question, renderer, now)
        if lease is not None:
            renderer.sequence, renderer.answered = question.sequence, lease
        return Reply(self.epoch, lease)

    def renew(self, beat: Beat, *, now: float) -> Renewal:
        """Keep a renderer's leases alive and note their progress."""
        if self._known(beat, now) is None:
            return Renewal(self.epoch, meet=True)
        gone = []
        for report in beat.reports:
            held = self._held.get(report.token)
            if held is None or held.renderer != beat.renderer:
                gone.append(report.token)
                continue
            held.reported_at = now
            before = held.report
            if before is None or report.ticks > before.ticks or report.stage != before.stage:
                held.progressed_at = now
            if before and before.in_hand and before.in_hand != report.in_hand:
                self._batch_finished(held.lease)
            held.report = report
        if beat.whole:
            for held in [held for held in self._held.values() if held.renderer == beat.renderer]:
                if now - held.reported_at > CONFIRM_S:
                    self._release(held)
        return Renewal(self.epoch, tuple(gone))

    def complete(self, completion: Completion, *, now: float) -> tuple[tuple[str, str], ...]:
        """A receipt exists. Honoured whatever became of the lease; returns (renderer, token) of twins to end."""
        lease = completion.lease
        held = self._held.get(lease.token)
        if held:
            self._release(held, give_back=False)
        run = self._runs.get(lease.run)
        if run is None or run.entry.pass_number != lease.pass_number:
            return ()
        run.failures, run.idle_deaths, run.message, run.not_before = 0, 0, None, 0.0
        if lease.task == "finalise":
            run.finalised = True
            return ()
        if not run.done[lease.shard]:
            run.done[lease.shard] = True
            run.done_images += run.shard_size(lease.shard)
            run.failed += completion.failed
            for stage, seconds in completion.seconds.items():
                run.seconds[stage] = run.seconds.get(stage, 0.0) + seconds
        run.blame.pop(lease.shard, None)
        twin = self._held.get(run.held.pop(lease.shard, ""))
        if twin is None:
            return ()
        self._release(twin, give_back=False)
        return ((twin.renderer, twin.lease.token),)

    def give_back(self, end: GiveBack, *, now: float) -> None:
        """A renderer could not finish a lease. What follows is decided by `farm.retry`."""
        held = self._held.get(end.lease.token)
        if held is None:
            return
        run = self._release(held)
        if run is None or end.code in ("cancelled", "retired"):
            return
        if run.failures == 0:
            run.failing_since = now
        run.failures += 1
        decision = after_failure(end.code, in_a_row=run.failures, failing_for_s=now - run.failing_since)
        run.message = end.message
        if decision.action == "again":
            run.not_before = now + decision.delay_s
        elif decision.action == "stall":
            run.stall(end.code, end.message)
        else:
            renderer = self._renderers.get(end.renderer)
            if renderer:
                renderer.unfit.add(run.entry.run)
            run.unfit = (end.code, end.message)
            self._stall_unfit()

    def tick(self, *, now: float) -> tuple[tuple[str, str], ...]:
        """Give up renderers that show no life and sample the speed; returns (renderer, why) of those to be ended.

        `why` is `silent` (nothing was heard of it) or `stuck` (it reports, and nothing progresses).
        """
        late = now - self._ticked_at if self._ticked_at is not None else 0.0
        self._ticked_at = now
        if late > PAUSE_S:
            for renderer in self._renderers.values():
                renderer.heard_at += late
            for held in self._held.values():
                held.reported_at += late
                held.progressed_at += late
        given_up = [(name, "silent") for name, one in self._renderers.items() if now - one.heard_at > LEASE_S]
        for held in self._held.values():
            stuck = held.report and now - held.progressed_at > STAGE_LIMIT_S[held.report.stage]
            if stuck and held.renderer in self._renderers:
                given_up.append((held.renderer, "stuck"))
        given_up = list(dict(reversed(given_up)).items())
        for name, why in given_up:
            self.lost(name, blame=why == "stuck")
        for run in self._runs.values():
            run.samples.append((now, self._images_done(run)))
            while run.samples and now - run.samples[0][0] > RATE_WINDOW_S:
                run.samples.popleft()
        return tuple(given_up)

    # Looking

    def progress(self, job: str) -> JobProgress | None:
        """Show the job's open pass: of its oldest run that is not finalised, or of its newest."""
        runs = sorted(self._of(job), key=lambda run: run.entry.created_at)
        if not runs:
            return None
        run = next((r for r in runs if not r.finalised), runs[-1])
        busy = {held.renderer for held in self._held.values()}
        ahead = sorted({held.lease.job for held in self._held.values()} - {job})
        message = run.message
        if run.state == "waiting" and ahead:
            message = f"waits behind {', '.join(ahead)}"
        done = self._images_done(run)
        rate = None
        if len(run.samples) >= 2 and run.samples[-1][0] > run.samples[0][0]:
            rate = max(0.0, (run.samples[-1][1] - run.samples[0][1]) / (run.samples[-1][0] - run.samples[0][0]))
        return JobProgress(
            job=job,
            run=run.entry.run,
            pass_number=run.entry.pass_number,
            state=run.state,
            images=run.entry.images,
            done=run.done_images,
            failed=run.failed,
            fraction=done / run.entry.images if run.entry.images else 1.0,
            images_per_s=rate or None,
            eta_s=(run.entry.images - done) / rate if rate else None,
            renderers=len(self._renderers),
            renderers_busy=len(busy),
            message=message,
            seconds=dict(run.seconds),
        )

    def stall_code(self, job: str) -> str | None:
        """The error code of what stalled a job, or None."""
        return next((run.stalled[0] for run in self._of(job) if run.stalled), None)

    # Inside

    def _of(self, job: str) -> list[RunState]:
        return [run for run in self._runs.values() if run.entry.job == job]

    def _images_done(self, run: RunState) -> float:
        done = float(run.done_images)
        for token in run.held.values():
            held = self._held.get(token)
            done += held.report.fraction * held.lease.images if held and held.report else 0.0
        return done

    def _known(self, caller: Ask | Beat, now: float) -> _Renderer | None:
        """The renderer that calls, if it has met this dispatcher."""
        renderer = self._renderers.get(caller.renderer)
        if caller.epoch != self.epoch or renderer is None or renderer.incarnation != caller.incarnation:
            return None
        renderer.heard_at = now
        return renderer

    def _stall_unfit(self) -> None:
        """Stall the runs that every renderer has refused."""
        for run in self._runs.values():
            refused = self._renderers and all(run.entry.run in one.unfit for one in self._renderers.values())
            if run.unfit and refused and not (run.stalled or run.finalised):
                run.stall(*run.unfit)

    def _grant(self, question: Ask, renderer: _Renderer, now: float) -> Lease | None:
        """Give the next piece of work, one at a time for each renderer and task it asks for."""
        candidates = {
            run.entry.run: run
            for run in self._runs.values()
            if run.entry.run not in renderer.unfit and now >= run.not_before and run.has_work()
        }
        chosen = next_job(
            (Waiting(r.entry.run, r.entry.priority, r.entry.created_at, r.entry.model) for r in candidates.values()),
            loaded_model=question.loaded_model,
        )
        if chosen is None:
            return None
        run = candidates[chosen.run]
        entry = run.entry
        shard = FINALISE if run.rendered else run.next_shard()
        self._granted += 1
        run.attempts[shard] = run.attempts.get(shard, 0) + 1
        lease = Lease(
            token=f"{self.epoch}-{self._granted}",
            task="finalise" if shard == FINALISE else "render",
            job=entry.job,
            run=entry.run,
            pass_number=entry.pass_number,
            shard=shard,
            images=0 if shard == FINALISE else run.shard_size(shard),
            attempt=run.attempts[shard],
        )
        blame = run.blame.get(shard)
        if blame:
            lease = replace(lease, alone=frozenset(blame.alone), skip=frozenset(blame.skip))
        self._held[lease.token] = _Held(lease, question.renderer, now, now)
        self._attach(run, lease)
        return lease

    def _attach(self, run: RunState, lease: Lease) -> None:
        if lease.task == "finalise":
            run.finaliser = lease.token
        else:
            run.held[lease.shard] = lease.token
        run.attempts[lease.shard] = max(run.attempts.get(lease.shard, 0), lease.attempt)

    def _release(self, held: _Held, *, give_back: bool = True) -> RunState | None:
        """End a lease; its shard waits again unless it is done. Returns the run, where it is still known."""
        self._held.pop(held.lease.token, None)
        run = self._runs.get(held.lease.run)
        if run is None or run.entry.pass_number != held.lease.pass_number:
            return None
        if held.lease.task == "finalise":
            if run.finaliser == held.lease.token:
                run.finaliser = None
        elif run.held.get(held.lease.shard) == held.lease.token:
            del run.held[held.lease.shard]
            if give_back and not run.done[held.lease.shard]:
                heapq.heappush(run.returned, held.lease.shard)
        return run

    def _drop_leases(self, run: RunState) -> list[tuple[str, str]]:
        mine = [held for held in self._held.values() if held.lease.run == run.entry.run]
        for held in mine:
            self._release(held)
        return [(held.renderer, held.lease.token) for held in mine]

    def _batch_finished(self, lease: Lease) -> None:
        run = self._runs.get(lease.run)
        if run is not None:
            run.idle_deaths = 0
