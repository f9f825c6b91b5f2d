"""Hand out shards to renderers and take them back: the rules, without clock, network or storage.

Every method is quick, blocks on nothing and is given the time (`now`, monotonic seconds). What is durable is decided by
receipts alone: a shard is done when its receipt exists, whoever wrote it, so that forgetting everything here costs time
and never truth. What should be done outside (end a renderer, look for a receipt, read a job) is asked for by `effects`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from farm.blame import count_deaths
from farm.board import Board, task
from farm.held import Renderer
from farm.idle import REVOKE_WORTH_S, TwinOffer, hangs, twin_offers, unstarted
from farm.intake import take_up
from farm.lease import (
    CONFIRM_S,
    LEASE_S,
    STAGE_LIMIT_S,
    STUCK_GRACE_S,
    Ask,
    Beat,
    Check,
    Completion,
    Effect,
    End,
    GiveBack,
    Hello,
    Lease,
    Read,
    Renewal,
    Reply,
    Standing,
    beat_s,
)
from farm.progress import images_done, snapshot
from farm.records import device_seconds
from farm.retry import (
    Blame,
    Trouble,
    after_failure,
)
from farm.run import FINALISE, JobProgress, JobState, JobView, RunState, may_keep

RATE_WINDOW_S = 30.0
"""Span of the measured images per second."""
OFFERS_TRIED = 16
"""Slow shards that one question is tried on."""
LOOKS_PER_S = 2000.0
"""Leases that are looked over in a second of ticks; with more, each is seen less often, and no call waits long."""
PAUSE_S = 5.0
"""A tick this late means that this process stood still, and heard nobody meanwhile: that is nobody's silence."""
BLAMELESS = frozenset({"cancelled", "retired", "revoked"})


class Dispatch:
    """Leases over a queue of runs. With `claims`, a job is leased only while its claim is held (`claimed`)."""

    def __init__(self, *, epoch: str, shares: Mapping[str, float] = {}, claims: bool = False):
        self.epoch = epoch
        self._claims = claims
        self._board = Board(shares)
        self._offers: list[TwinOffer] = []
        self._drains_said: set[str] = set()
        self._granted = 0
        self._ticked_at: float | None = None
        self._looked_at = 0.0
        self._was_late = False

    def effects(self) -> tuple[Effect, ...]:
        """What should be done outside, each once; to be asked for after every call."""
        if not self._board.effects:
            return ()
        effects, self._board.effects = tuple(self._board.effects), []
        return effects

    # Jobs

    def take_up(self, view: JobView, *, again: bool = False, again_soon: bool = False, now: float) -> None:
        """Know a job as it was just read. `again`: a person asks for it, and what had stalled is tried again."""
        take_up(self._board, view, again=again, again_soon=again_soon, claimed=not self._claims or None, now=now)

    def said(self, job: str, state: Literal["paused", "cancelled"], *, now: float) -> None:
        """Somebody paused or cancelled a job: what there is of it ends at once, before it is read again."""
        known = self._board.jobs.get(job)
        if known is None or known.view.state in (state, "deleted"):
            return
        known.view = replace(known.view, state=state)
        for run in known.runs.values():
            self._board.drop_leases(run, now)
        self._board.requeue_job(known, now)

    def claimed(self, job: str, held: bool, *, by: str = "", now: float) -> None:
        """Whether this farm holds a job's claim, and who else does. Nothing is leased before it was read again."""
        known = self._board.jobs.get(job)
        if known is None:
            return
        if held and not known.claimed:
            known.reading = True
            self._board.effects.append(Read(job))
        if not held:
            for run in known.runs.values():
                self._board.drop_leases(run, now)
        known.claimed, known.elsewhere = held, by
        self._board.requeue_job(known, now)

    def unfinished(self) -> tuple[str, ...]:
        """Names of the jobs with work that is not done, stopped or stalled."""
        return tuple(
            sorted(
                name
                for name, job in self._board.jobs.items()
                if job.view.state == "open"
                and not (job.limit and not any(run.held for run in job.runs.values()))
                and (job.reading or any(run.held or not (run.finalised or run.stalled) for run in job.runs.values()))
            )
        )

    def jobs(self) -> tuple[str, ...]:
        """Names of the jobs that are not done or deleted: of those, too, that wait for a person."""
        return tuple(sorted(name for name, job in self._board.jobs.items() if not job.is_over))

    # Renderers

    def meet(self, hello: Hello, *, now: float) -> tuple[str, ...]:
        """Know a renderer, and take over the leases that it holds; returns tokens that it should drop.

        Of two processes of one name the one that was born later is the renderer. The other, cut off and back, is told to
        end; what it completes counts all the same.
        """
        if self._is_replaced(hello.renderer, hello.incarnation):
            return tuple(lease.token for lease in hello.held)
        known = self._board.renderers.get(hello.renderer)
        if known is not None and known.incarnation != hello.incarnation:
            self.lost(hello.renderer, now=now, blame=False)
            known = None
        if known is None:
            known = Renderer(hello.renderer, hello.incarnation, hello.device, now, now)
            self._board.renderers[hello.renderer] = known
            self._board.unstall_refused(now)
        known.heard_at = now
        known.machine = hello.machine
        if hello.drained and hello.renderer not in self._drains_said:
            self._board.drained.add(hello.renderer)
        kept = {lease.token for lease in hello.held if self._take_over(lease, known, now)}
        for held in list(known.held.values()):
            if held.lease.token not in kept and now - held.reported_at > CONFIRM_S:
                self._board.release(held, now=now)
        return tuple(lease.token for lease in hello.held if lease.token not in kept)

    def _take_over(self, lease: Lease, renderer: Renderer, now: float) -> bool:
        """Let a renderer keep a lease that it reports, unless it is done, stopped, of another pass or someone else's."""
        held = self._board.held.get(lease.token)
        if held is not None:
            held.reported_at = now
            return held.renderer == renderer.name
        job, run = self._board.jobs.get(lease.job), self._board.runs.get(lease.run)
        if job is not None and (run is None or not may_keep(job, run, lease)):
            return False
        held = self._board.hold(lease, renderer, now)
        if job is not None and run is not None:
            self._board.attach(job, run, held)
            self._board.requeue(job, run, now)
        else:
            self._board.effects.append(Read(lease.job))
        return True

    def lost(self, renderer: str, *, now: float, blame: bool = True) -> None:
        """A renderer's process ended: its leases go back at once, and what it had in hand is blamed where `blame`."""
        known = self._board.renderers.get(renderer)
        if known is None:
            return
        mine = list(known.held.values())
        runs = [(held, self._board.release(held, now=now)) for held in mine]
        del self._board.renderers[renderer]
        if blame:
            count_deaths(self._board, [(held, run) for held, run in runs if run is not None], now)
        self._board.stall_refused(now)

    def drain(self, renderer: str, drained: bool, *, now: float) -> None:
        """Give a slot's renderer nothing more to do, or again; a lease that it has not begun is asked back."""
        self._drains_said.add(renderer)
        (self._board.drained.add if drained else self._board.drained.discard)(renderer)
        self._ask_kept(now)

    def reserve(self, renderers: frozenset[str], *, now: float) -> None:
        """Give no shards to these slots' renderers, and to all others again."""
        if renderers != self._board.reserved:
            self._board.reserved = renderers
            self._ask_kept(now)

    def charge(self, owner: str, seconds: float) -> None:
        """Count device seconds of the endpoint for their owner's share."""
        self._board.queue.share.charge(owner, seconds)

    def _ask_kept(self, now: float) -> None:
        """Ask back what renderers that are kept from shards have not begun."""
        for name in self._board.drained | self._board.reserved:
            known = self._board.renderers.get(name)
            if known is not None:
                self._board.ask_back(known.held.values(), now)

    def _is_replaced(self, renderer: str, incarnation: str) -> bool:
        """Whether a process that was born later has a renderer's name."""
        known = self._board.renderers.get(renderer)
        return known is not None and incarnation < known.incarnation

    # Leases

    def ask(self, question: Ask, *, now: float, grants: bool = True) -> Reply:
        """Answer a renderer's question for work. A lease of None means: nothing for you now.

        Asking twice with one sequence gives the same lease, and a question older than the newest seen none. Without
        `grants` no new lease is given: renderers that live may still have to report theirs.
        """
        renderer = self._known(question, now)
        if renderer is None:
            replaced = question.epoch == self.epoch and self._is_replaced(question.renderer, question.incarnation)
            return Reply(self.epoch, meet=not replaced, replaced=replaced)
        renderer.asked_at = now
        if renderer.standing is None or question.sequence > renderer.asked:
            renderer.loaded = question.loaded_model  # a parked question is older than what was heard since
        if question.sequence == renderer.sequence and renderer.answered and renderer.answered.token in self._board.held:
            return Reply(self.epoch, renderer.answered)
        if question.sequence < renderer.asked or question.sequence <= renderer.sequence:
            return Reply(self.epoch, late=True)
        renderer.asked = question.sequence
        lease = self._grant(renderer, now) if grants else None
        if lease is not None:
            renderer.sequence, renderer.answered = question.sequence, lease
        return Reply(self.epoch, lease)

    def has_work(self, *, now: float) -> bool:
        """Whether there is something to lease at this moment, to somebody."""
        return bool(self._board.queue) or bool(self._offers)

    def renew(self, beat: Beat, *, now: float) -> Renewal:
        """Keep a renderer's leases alive and note their progress."""
        renderer = self._known(beat, now)
        if renderer is None:
            if beat.epoch == self.epoch and self._is_replaced(beat.renderer, beat.incarnation):
                return Renewal(self.epoch, tuple(report.token for report in beat.reports), replaced=True)
            return Renewal(self.epoch, meet=True)
        if beat.standing is not None and beat.standing != renderer.standing:
            self._stands(renderer, beat.standing, now)
        gone = []
        for report in beat.reports:
            held = renderer.held.get(report.token)
            if held is None:
                gone.append(report.token)
                continue
            before = held.report
            self._board.charge(held, held.heard(report, now))
            if before and before.in_hand and before.in_hand != report.in_hand:
                self._batch_finished(held.lease)
        for held in list(renderer.held.values()):
            if now - held.reported_at > CONFIRM_S:
                self._board.release(held, now=now)
        drained = beat.renderer in self._board.drained
        return Renewal(self.epoch, tuple(gone), every_s=beat_s(len(self._board.renderers)), drained=drained)

    def complete(self, completion: Completion, *, now: float) -> None:
        """A receipt exists. Honoured whatever became of the lease; the shard's other leases end."""
        lease = completion.lease
        measured = device_seconds(completion.seconds)
        held = self._board.held.get(lease.token)
        if held is not None:
            if lease.task == "render":
                self._board.charge(held, measured - held.charged_s)
            self._board.release(held, now=now, back=False)
        job, run = self._board.jobs.get(lease.job), self._board.runs.get(lease.run)
        if job is None or run is None or run.entry.pass_number != lease.pass_number or run.finalised:
            return
        run.idle_deaths, run.message = 0, None
        renderer = self._board.renderers.get(completion.renderer)
        if renderer is not None:
            renderer.troubles.pop(task(run), None)
        self._board.queue.loaded(run.entry.model, completion.seconds.get("load", 0.0))
        if lease.task == "finalise":
            run.finalised = True
            self._board.drop_leases(run, now)
            job.reading = True
            self._board.effects.append(Read(lease.job))
        else:
            self._set_done(job, run, completion, measured, now)
        self._board.requeue(job, run, now)

    def _set_done(self, job: JobState, run: RunState, completion: Completion, measured: float, now: float) -> None:
        shard = completion.lease.shard
        if not run.set_done(shard):
            return
        images = run.shard_size(shard)
        job.images += images
        run.failed += completion.failed
        run.measured(images, measured - completion.seconds.get("load", 0.0))
        for stage, seconds in completion.seconds.items():
            run.seconds[stage] = run.seconds.get(stage, 0.0) + seconds
        for lease in list(run.held.get(shard, ())):
            self._board.drop(self._board.held[lease.token], now)

    def checked(self, check: Check, completion: Completion | None, *, now: float) -> None:
        """The answer to a `Check`: what a shard's receipt tells, or None where there is none and it waits again."""
        job, run = self._board.jobs.get(check.job), self._board.runs.get(check.run)
        if job is None or run is None or run.entry.pass_number != check.pass_number or run.finalised:
            return
        if completion is not None:
            measured = device_seconds(completion.seconds)
            self._set_done(job, run, completion, measured, now)
        elif check.shard in run.unsure:
            run.came_back(check.shard)
        self._board.requeue(job, run, now)

    def give_back(self, end: GiveBack, *, now: float) -> None:
        """A renderer could not finish a lease. What follows is decided by `farm.retry`."""
        held = self._board.held.get(end.lease.token)
        if held is None:
            return
        run = self._board.release(held, now=now, sure=end.code in BLAMELESS)
        renderer = self._board.renderers.get(held.renderer)
        if run is None or renderer is None or end.code in BLAMELESS:
            return
        trouble = renderer.troubles.setdefault(task(run), Trouble(0, now))
        trouble.count += 1
        decision = after_failure(end.code, in_a_row=trouble.count, failing_for_s=now - trouble.since)
        trouble.until = now + decision.delay_s
        run.message = end.message
        if decision.action == "elsewhere":
            trouble.refusal = (end.code, end.message)
            self._board.refused(run, trouble.refusal)
            self._board.stall_refused(now)

    def tick(self, *, now: float, wall: float) -> float:
        """Give up renderers that show no life or no progress, apply limits of time, help idle renderers, sample speeds.

        `wall`: Unix seconds. It may jump: only a job's `finish_by` is compared with it. Returns seconds for which this process
        stood still, and which are nobody's silence.
        """
        late = now - self._ticked_at if self._ticked_at is not None else 0.0
        self._ticked_at = now
        self._board.set_wall(wall, now=now)
        # One tick that is late forgives the time; ticks that are always late are this machine's pace, and forgive none.
        forgives, self._was_late = late > PAUSE_S and not self._was_late, late > PAUSE_S
        if forgives:
            for renderer in self._board.renderers.values():
                renderer.heard_at = min(renderer.heard_at + late, now)
                renderer.asked_at = min(renderer.asked_at + late, now)
                renderer.urgent_at = min(renderer.urgent_at + late, now)
            for held in self._board.held.values():
                held.reported_at = min(held.reported_at + late, now)
                held.progressed_at = min(held.progressed_at + late, now)
        looks = now - self._looked_at >= len(self._board.held) / LOOKS_PER_S
        if looks:
            self._looked_at = now
            self._give_up(now)
        for job in self._board.jobs.values():
            view = job.view
            if job.limit is not None or view.finish_by is not None or view.max_gpu_s is not None:
                self._board.requeue_job(job, now)
            if job.limit is not None and not job.is_over:
                leases = [lease for run in job.runs.values() for holders in run.held.values() for lease in holders]
                self._board.ask_back([self._board.held[lease.token] for lease in leases], now)
        self._ask_kept(now)
        self._help_idle(now)
        for run in self._board.runs.values() if looks else ():
            if run.finalised:
                continue
            run.samples.append((now, images_done(run, self._board.held)))
            while now - run.samples[0][0] > RATE_WINDOW_S:
                run.samples.popleft()
        return late if forgives else 0.0

    def _give_up(self, now: float) -> None:
        given_up = {name: "silent" for name, one in self._board.renderers.items() if now - one.heard_at > LEASE_S}
        for held in self._board.held.values():
            since = held.progressed_at
            if held.report and held.report.stage == "waiting":
                since = max(one.progressed_at for one in self._board.renderers[held.renderer].held.values())
            if held.report and now - since > STAGE_LIMIT_S[held.report.stage] + STUCK_GRACE_S:
                given_up.setdefault(held.renderer, "stuck")
        for name, one in self._board.renderers.items():
            if not one.held and now - one.asked_at > STAGE_LIMIT_S["load"] + STUCK_GRACE_S:
                given_up.setdefault(name, "stuck")  # it lives, has nothing to do, and asks for nothing
        for name, why in given_up.items():
            self.lost(name, now=now, blame=why == "stuck")
            self._board.effects.append(End(name, "stuck" if why == "stuck" else "silent"))

    def _help_idle(self, now: float) -> None:
        """Where renderers stand idle and nothing waits: ask back what nobody has begun, else offer twins of slow shards."""
        self._offers = []
        if self._board.queue or not self._board.held:
            return
        board = self._board
        idle = [one for one in board.renderers.values() if not (one.held or board.is_kept(one.name))]
        if not idle:
            return
        for ahead_s, held in unstarted(board.renderers.values(), board.runs, now=now):
            run = board.runs.get(held.lease.run)
            fit = [one for one in idle if run and board.fits(one, run, now)] if idle else ()
            if run and fit and ahead_s > REVOKE_WORTH_S + self._load_s(fit[0], run):
                idle.remove(fit[0])
                board.ask_back([held], now)
        self._offers = twin_offers(board.held.values(), board.jobs, board.runs, now=now)[: len(idle)]

    # Looking

    @property
    def board(self) -> Board:
        """What is waiting and held, to look at."""
        return self._board

    def progress(self, job: str) -> JobProgress | None:
        """Show the job's open pass: of its oldest run that is not finalised, or of its newest."""
        known = self._board.jobs.get(job)
        return snapshot(known, self._board.renderers.values(), self._board.held) if known else None

    def stall_code(self, job: str) -> str | None:
        """The error code of what stalled all that is left of a job, or None."""
        known = self._board.jobs.get(job)
        left = [run for run in known.runs.values() if not run.finalised] if known else []
        codes = [run.stalled[0] for run in left if run.stalled]
        return codes[0] if codes and len(codes) == len(left) else None

    # Inside

    def _known(self, caller: Ask | Beat, now: float) -> Renderer | None:
        """The renderer that calls, if it has met this dispatcher."""
        renderer = self._board.renderers.get(caller.renderer)
        if caller.epoch != self.epoch or renderer is None or renderer.incarnation != caller.incarnation:
            return None
        renderer.heard_at = now
        return renderer

    def _stands(self, renderer: Renderer, standing: Standing, now: float) -> None:
        """Take in what a renderer says of itself, and what it measured."""
        before, model = renderer.standing, standing.loaded_model
        renderer.standing, renderer.loaded = standing, model
        if before is not None and standing.urgent_ticks > before.urgent_ticks:
            renderer.urgent_at = now
        if model is not None and (before is None or (before.loaded_model, before.load_s) != (model, standing.load_s)):
            self._board.queue.loaded(model, standing.load_s)

    def _grant(self, renderer: Renderer, now: float) -> Lease | None:
        """Give the next piece of work; none to one that seems to hang, and would not come to it."""
        board = self._board
        if hangs(renderer):
            return None
        chosen = board.queue.choose(
            renderer.loaded,
            fits=lambda run: board.fits(renderer, board.runs[run], now),
            renderers=board.renderers_for_shards(),
        )
        if chosen is None:
            return self._grant_twin(renderer, now)
        run = self._board.runs[chosen.run]
        job = self._board.jobs[run.entry.job]
        shard = FINALISE if run.rendered else run.next_shard()
        if shard != FINALISE:
            run.take(shard)
        lease = self._lease(job, run, shard, renderer, now)
        self._board.requeue_job(job, now) if job.view.max_images or job.view.max_gpu_s else self._board.requeue(
            job, run, now
        )
        return lease

    def _grant_twin(self, renderer: Renderer, now: float) -> Lease | None:
        """Give an idle renderer a shard that another is slow with."""
        if renderer.held:
            return None
        for offer in self._offers[:OFFERS_TRIED]:
            held = self._board.held.get(offer.token)
            run = self._board.runs.get(offer.run)
            if (
                held is None
                or run is None
                or held.renderer == renderer.name
                or not self._board.fits(renderer, run, now)
            ):
                continue
            if not self._board.in_time(self._board.jobs[run.entry.job], now):
                continue
            if len(run.held.get(offer.shard, ())) != 1 or run.done[offer.shard]:
                continue
            if offer.pays(run.expected_s(held.lease.images) + self._load_s(renderer, run)):
                self._offers.remove(offer)
                return self._lease(self._board.jobs[run.entry.job], run, offer.shard, renderer, now, twin=True)
        return None

    def _load_s(self, renderer: Renderer, run: RunState) -> float:
        """Seconds until a renderer has a run's model."""
        return 0.0 if renderer.loaded == run.entry.model else self._board.queue.swap_s(run.entry.model)

    def _lease(
        self, job: JobState, run: RunState, shard: int, renderer: Renderer, now: float, *, twin: bool = False
    ) -> Lease:
        self._granted += 1
        entry = run.entry
        blame = run.blame.get(shard, Blame())
        lease = Lease(
            token=f"{self.epoch}-{self._granted}",
            task="finalise" if shard == FINALISE else "render",
            job=entry.job,
            run=entry.run,
            pass_number=entry.pass_number,
            shard=shard,
            images=0 if shard == FINALISE else run.shard_size(shard),
            attempt=run.attempts.get(shard, 0) + 1,
            alone=frozenset(blame.alone),
            skip=frozenset(blame.skip),
            twin=twin,
            cautious=blame.cautious,
        )
        self._board.attach(job, run, self._board.hold(lease, renderer, now))
        return lease

    def _batch_finished(self, lease: Lease) -> None:
        run = self._board.runs.get(lease.run)
        if run is not None:
            run.idle_deaths = 0
