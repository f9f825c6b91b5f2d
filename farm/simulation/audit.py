"""What must hold at every moment of a simulated farm, whatever went wrong, and at its end.

Keeps books of its own from what goes into a dispatcher and comes out of it; looks into none of its fields. A broken rule
is a `Violation`, with what was known.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from farm.dispatch import PAUSE_S
from farm.idle import REVOKE_WORTH_S
from farm.lease import (
    CONFIRM_S,
    LEASE_S,
    Ask,
    Beat,
    Check,
    Completion,
    Drop,
    Effect,
    End,
    GiveBack,
    Hello,
    Lease,
    Read,
    Renewal,
)
from farm.retry import after_failure
from farm.run import FINALISE, JobView, RunEntry
from farm.simulation.book import Book, Live, Place, Rest, footprint, place_of
from farm.simulation.jobs import Books, SimJob
from farm.simulation.renderers import SimRenderer
from farm.simulation.task import Task
from farm.simulation.world import World

if TYPE_CHECKING:
    from farm.simulation.farm import Farm

IDLE_S = 3.0
"""A question that waits although there is work for it is answered with the next tick but one."""
HOARD_S = 14.0
"""For so long at most a renderer waits for work while another keeps a lease that it does not begin.

Longer where what that one works on hangs: for a while nobody can know.
"""
HELLOS_S = 5.0
MOST_HELLOS = 40
"""So many hellos of one renderer in so many seconds are a quarrel."""
BLAMELESS = frozenset({"cancelled", "retired", "revoked"})


class Violation(AssertionError):  # noqa: N818 (what was found, not what went wrong with the audit)
    """Raised when a rule of the farm was broken."""


class Audit:
    """Watches every farm on one bucket."""

    def __init__(self, world: World, books: Books, *, claims: bool = False):
        self.gpu_s: dict[str, float] = {}
        self.swaps = 0
        self.swap_s = 0.0
        self.grants = 0
        self.window: tuple[float, float] = (0.0, float("inf"))
        self._world = world
        self._books = books
        self._claims = claims
        self._book: dict[str, Book] = {}
        self._deaths_alone: dict[tuple[str, int], int] = {}
        self._finalised: set[tuple[str, int]] = set()

    # A dispatcher's lives

    def begins(self, farm: "Farm") -> None:
        self._book[farm.name] = Book()

    def forgets(self, farm: "Farm") -> None:
        self._book[farm.name] = Book()

    # What it is told

    def takes_up(self, farm: "Farm", view: JobView) -> None:
        book = self._book[farm.name]
        book.views[view.job] = view
        book.reading.discard(view.job)
        for entry in view.runs:
            for shard in range(entry.done.size):
                if entry.done[shard]:
                    self._now_known(book, (entry.run, entry.pass_number, shard))
            if entry.seconds_per_image is not None:
                book.measured.add(entry.run)
        if view.state == "deleted":
            book.views.pop(view.job)

    def claimed(self, farm: "Farm", job: str, *, held: bool) -> None:
        self._book[farm.name].claimed[job] = held

    def met(self, farm: "Farm", hello: Hello, refused: Iterable[str]) -> None:
        book = self._book[farm.name]
        times = book.hellos.setdefault(hello.renderer, [])
        times.append(self._world.now)
        while times[0] < self._world.now - HELLOS_S:
            times.pop(0)
        if len(times) > MOST_HELLOS:
            self._break(f"{hello.renderer} says hello to {farm.name} {len(times)} times in {HELLOS_S:.0f} s")
        current = book.incarnations.get(hello.renderer, hello.incarnation)
        if hello.incarnation < current:
            kept = {lease.token for lease in hello.held}.difference(refused)
            if kept:
                self._break(
                    f"{farm.name} lets {hello.renderer}/{hello.incarnation} keep {kept}, though {current} came after"
                )
            return
        if current != hello.incarnation:
            self.lost(farm, hello.renderer)
        book.incarnations[hello.renderer] = hello.incarnation
        no, kept = set(refused), {lease.token for lease in hello.held}
        for live in [one for one in book.live.values() if one.renderer == hello.renderer]:
            if live.lease.token not in kept and self._world.now - live.seen_at > CONFIRM_S:
                self._release(book, live.lease.token)
        for lease in hello.held:
            if lease.token in no:
                continue
            place = place_of(lease)
            if place in book.known and lease.job in book.views:
                self._break(f"{farm.name} lets {hello.renderer} keep {lease.token}, whose receipt it knows: {lease}")
            others = [token for token in book.places.get(place, ()) if token != lease.token]
            if others and not lease.twin and not any(book.live[token].lease.twin for token in others):
                self._break(f"{farm.name} lets {hello.renderer} keep {lease}, which {others} hold too")
            book.unchecked.discard(place)
            self._add(book, lease, hello.renderer)

    def renewed(self, farm: "Farm", beat: Beat, renewal: Renewal) -> None:
        if renewal.meet:
            return
        book, now = self._book[farm.name], self._world.now
        for token in renewal.gone:
            self._release(book, token)
        for report in beat.reports:
            live = book.live.get(report.token)
            if live is not None:
                live.seen_at = now
        for live in [one for one in book.live.values() if one.renderer == beat.renderer]:
            if now - live.seen_at > CONFIRM_S:
                self._release(book, live.lease.token)

    def completed(self, farm: "Farm", completion: Completion) -> None:
        book, lease = self._book[farm.name], completion.lease
        self._release(book, lease.token)
        book.rests.pop((completion.renderer, lease.run, lease.task == "finalise"), None)
        if lease.task == "finalise":
            book.closed.add((lease.run, lease.pass_number))
            return
        book.measured.add(lease.run)
        self._now_known(book, place_of(lease))

    def gave_back(self, farm: "Farm", end: GiveBack) -> None:
        book = self._book[farm.name]
        held = self._release(book, end.lease.token)
        now, key = self._world.now, (end.renderer, end.lease.run, end.lease.task == "finalise")
        if end.code not in BLAMELESS:
            rest = book.rests.setdefault(key, Rest(0, now))
            rest.count += 1
            rest.until = now + after_failure(end.code, in_a_row=rest.count, failing_for_s=now - rest.since).delay_s
        if held and end.code not in BLAMELESS:
            self._must_check(book, end.lease)

    def checked(self, farm: "Farm", check: Check, completion: Completion | None) -> None:
        book = self._book[farm.name]
        place = (check.run, check.pass_number, check.shard)
        book.unchecked.discard(place)
        if completion is not None:
            self._now_known(book, place)

    def lost(self, farm: "Farm", renderer: str) -> None:
        book = self._book[farm.name]
        book.incarnations.pop(renderer, None)
        book.idle_since.pop(renderer, None)
        for key in [key for key in book.rests if key[0] == renderer]:
            del book.rests[key]
        for token in [token for token, live in book.live.items() if live.renderer == renderer]:
            live = book.live[token]
            self._release(book, token)
            self._must_check(book, live.lease)

    # What it says

    def effect(self, farm: "Farm", effect: Effect) -> None:
        book = self._book[farm.name]
        if isinstance(effect, Drop):
            self._release(book, effect.token)
        elif isinstance(effect, End):
            self.lost(farm, effect.renderer)
        elif isinstance(effect, Read):
            book.reading.add(effect.job)
        elif isinstance(effect, Check):
            book.unchecked.add((effect.run, effect.pass_number, effect.shard))

    def granted(self, farm: "Farm", ask: Ask, lease: Lease, *, may: bool) -> None:
        """A lease was given: is it one that may be?"""
        book, place = self._book[farm.name], place_of(lease)
        again = book.live.get(lease.token)
        if again is not None:
            if again.renderer != ask.renderer:
                self._break(f"{farm.name} gives {lease.token} of {again.renderer} to {ask.renderer}")
            return
        self.grants += 1
        book.idle_since.pop(ask.renderer, None)
        if not may:
            self._break(f"{farm.name} gives {lease} before its renderers have reported")
        if place in book.known:
            self._break(f"{farm.name} gives {lease}, whose receipt it knows")
        if place in book.unchecked:
            self._break(f"{farm.name} gives {lease}, which came back, before it knows whether it has a receipt")
        holders = [book.live[token] for token in book.places.get(place, ())]
        if holders and (not lease.twin or len(holders) > 1 or holders[0].renderer == ask.renderer):
            self._break(f"{farm.name} gives {lease} to {ask.renderer}, while {holders} stand")
        if lease.twin and not holders:
            self._break(f"{farm.name} gives {lease} as a twin, which nobody else holds")
        self._may_be_leased(farm, book, lease)
        self._add(book, lease, ask.renderer)

    def _may_be_leased(self, farm: "Farm", book: Book, lease: Lease) -> None:
        view = book.views.get(lease.job)
        if view is None or view.state != "open":
            self._break(f"{farm.name} gives {lease}, whose job is {view.state if view else 'unknown'}")
            return
        entry = next((entry for entry in view.runs if entry.run == lease.run), None)
        if entry is None or entry.pass_number != lease.pass_number:
            self._break(f"{farm.name} gives {lease}, whose pass is not open: {view}")
            return
        if self._claims and not book.claimed.get(lease.job):
            self._break(f"{farm.name} gives {lease}, whose job it has not claimed")
        if lease.task == "finalise":
            missing = [s for s in range(entry.done.size) if (lease.run, lease.pass_number, s) not in book.known]
            if missing:
                self._break(f"{farm.name} gives {lease} while shards {missing} have no receipt")
            if (lease.run, lease.pass_number) in book.closed:
                self._break(f"{farm.name} gives {lease}, whose pass it was told is closed")
            return
        if view.finish_by is not None and book.wall is not None and book.wall >= view.finish_by:
            self._break(f"{farm.name} gives {lease} {book.wall - view.finish_by:.0f} s past the job's finish_by")
        if view.max_images is not None and not lease.twin:
            self._within_images(farm, book, view, lease)

    def _within_images(self, farm: "Farm", book: Book, view: JobView, lease: Lease) -> None:
        """Images with a receipt, those in hand and these are no more than the budget."""
        done = max(self._images_done(book, view), view.images_before)
        in_hand = {place_of(live.lease): live.lease.images for live in book.live.values() if live.lease.job == view.job}
        total = done + sum(in_hand.values()) + lease.images
        if total > (view.max_images or 0):
            self._break(f"{farm.name} gives {lease}: {done} images are done, {in_hand} in hand, of {view.max_images}")

    def _images_done(self, book: Book, view: JobView) -> int:
        """Images of the job with a receipt that this life knows of."""
        job: SimJob | None = self._books.store.get(("plan", view.job))
        total = 0
        for run in job.runs if job else ():
            for number in range(1, self._books.passes(run) + 1):
                for shard in range(self._books.shards(run, number)):
                    if (run.run, number, shard) in book.known:
                        total += len(self._books.shard_indexes(run, number, shard))
        return total

    def ticks(self, farm: "Farm", wall: float) -> None:
        """Once a tick, before the dispatcher's own: nobody waits for work that is there."""
        book, now = self._book[farm.name], self._world.now
        book.wall = wall
        if book.ticked_at is not None and now - book.ticked_at > PAUSE_S:
            for live in book.live.values():  # a dispatcher that stood still takes that for nobody's silence
                live.seen_at = min(live.seen_at + now - book.ticked_at, now)
        book.ticked_at = now
        slots = {name: one.incarnation for name, one in farm.slots.items() if one is not None}
        waiting = dict.fromkeys(ask.renderer for ask in farm.parked if slots.get(ask.renderer) == ask.incarnation)
        for times in (book.idle_since, book.starved_since):
            for renderer in [one for one in times if one not in waiting]:
                del times[renderer]

        def known(renderer: str) -> bool:
            """Whether it is met; one whose name an older process has, which came back, waits until that is silent."""
            return book.incarnations.get(renderer) == slots[renderer]

        if not farm.grants:
            book.idle_since.clear()
            book.starved_since.clear()
            return
        for renderer in waiting:
            slot = farm.slots[renderer]
            work = None if slot is None or slot.hung else self._work_for(farm, book, renderer)
            if work is None:
                book.idle_since.pop(renderer, None)
                self._sees_hoards(farm, book, renderer)
            elif now - book.idle_since.setdefault(renderer, now) > (IDLE_S if known(renderer) else IDLE_S + LEASE_S):
                since = now - book.idle_since[renderer]
                self._break(f"{renderer} asks {farm.name} for work and gets none for {since:.1f} s, while {work} waits")

    def _sees_hoards(self, farm: "Farm", book: Book, renderer: str) -> None:
        """Nobody keeps a lease for later while another has nothing to do."""
        slots = [one for one in farm.slots.values() if one is not None and one.name != renderer]
        found = next(((one, leases) for one in slots if (leases := one.hoards(REVOKE_WORTH_S)) is not None), None)
        now, asker = self._world.now, farm.slots.get(renderer)
        hoarded = None
        if found is not None and asker is not None and not asker.tasks:
            lease, ahead = found[1]
            may = self._is_open(farm, book, lease) and not self._rests(book, renderer, lease.run, False)
            hoarded = lease if may and ahead.run in book.measured else None
        if found is None or hoarded is None:
            book.starved_since.pop(renderer, None)
            return
        waited = now - book.starved_since.setdefault(renderer, now)
        if waited > HOARD_S + (found[0].unheard_s if found[0].hung else 0.0):
            self._break(
                f"{renderer} asks {farm.name} for work for {waited:.1f} s, while another has not begun {hoarded}"
            )

    def _is_open(self, farm: "Farm", book: Book, lease: Lease) -> bool:
        view = book.views.get(lease.job)
        if view is None or view.state != "open" or lease.job in book.reading or lease.token not in book.live:
            return False
        return not self._claims or bool(book.claimed.get(lease.job))

    def _work_for(self, farm: "Farm", book: Book, renderer: str) -> Place | None:
        """Something that could be leased to a renderer at this moment."""
        dispatch = farm.dispatch
        for view in book.views.values():
            limited = view.max_images is not None or view.max_gpu_s is not None or view.finish_by is not None
            if (
                view.state != "open"
                or limited
                or view.job in book.reading
                or (self._claims and not book.claimed.get(view.job))
            ):
                continue
            if dispatch is None or dispatch.stall_code(view.job) is not None:
                continue
            for entry in view.runs:
                found = self._free_place(book, entry)
                if found is not None and not self._rests(book, renderer, entry.run, found[2] == FINALISE):
                    return found
        return None

    def _rests(self, book: Book, renderer: str, run: str, finalise: bool) -> bool:
        """Whether a renderer is left alone with a run for a while, since it failed there."""
        rest = book.rests.get((renderer, run, finalise))
        return rest is not None and rest.until + IDLE_S >= self._world.now

    def _free_place(self, book: Book, entry: RunEntry) -> Place | None:
        run, number = entry.run, entry.pass_number
        missing = False
        for shard in range(entry.done.size):
            place = (run, number, shard)
            if place not in book.known:
                missing = True
                if place not in book.unchecked and not book.places.get(place):
                    return place
        place = (run, number, FINALISE)
        if not missing and not book.places.get(place) and (run, number) not in book.closed:
            return place
        return None

    # What renderers do

    def worked(self, renderer: SimRenderer, lease: Lease, seconds: float) -> None:
        self._charge(lease, seconds)

    def loaded(self, renderer: SimRenderer, lease: Lease, seconds: float) -> None:
        self.swaps += 1
        if self.window[0] <= self._world.now <= self.window[1]:
            self.swap_s += seconds
        self._charge(lease, seconds)

    def died_with(self, renderer: SimRenderer, task: Task | None) -> None:
        if task is None or len(task.in_hand) != 1:
            return
        if task.lease.cautious or task.in_hand[0] in task.lease.alone:
            key = (task.lease.run, task.in_hand[0])
            self._deaths_alone[key] = self._deaths_alone.get(key, 0) + 1

    def finalising(self, lease: Lease) -> None:
        """Totals are about to be written: has every shard its receipt?"""
        job: SimJob = self._books.store.get(("plan", lease.job))
        run = next(run for run in job.runs if run.run == lease.run)
        for shard in range(self._books.shards(run, lease.pass_number)):
            if self._books.receipt(lease.run, lease.pass_number, shard) is None:
                self._break(f"{lease} finalises, and shard {shard} has no receipt")

    def _charge(self, lease: Lease, seconds: float) -> None:
        if self.window[0] <= self._world.now <= self.window[1]:
            job: SimJob | None = self._books.store.get(("plan", lease.job))
            owner = job.owner if job else ""
            self.gpu_s[owner] = self.gpu_s.get(owner, 0.0) + seconds

    # The end

    def wrote(self, key: tuple[Any, ...], content: Any) -> None:
        """An object was written: a receipt has a row for each image of its shard."""
        if key[0] == "receipt" and len(content.rows) != len(content.indexes):
            self._break(f"receipt {key} has {len(content.rows)} rows for {len(content.indexes)} images")

    def at_the_end(self, jobs: list[SimJob], farms: Iterable["Farm"]) -> None:
        """Every job that ended well has one row for each image, failed ones only where an image is to blame."""
        for job in jobs:
            current = self._books.job(job.name)
            if current is None or not self._books.finished(current):
                continue
            for run in current.runs:
                self._rows_of(run)
        for farm in farms:
            self._footprint(farm, jobs)

    def _rows_of(self, run: Any) -> None:
        rows = self._books.rows(run)
        if sorted(rows) != list(range(run.images)):
            missing = sorted(set(range(run.images)) - set(rows))
            self._break(
                f"{run.run}: images {missing} have no row, {sorted(set(rows) - set(range(run.images)))} too many"
            )
        for index, ok in rows.items():
            if ok and index in run.poison:
                self._break(f"{run.run}: image {index} ends every renderer and has come out well")
            blamed = index in run.poison or index in run.bad or self._deaths_alone.get((run.run, index), 0) >= 2
            if not ok and not blamed:
                self._break(f"{run.run}: image {index} failed, and nothing was wrong with it")

    def _footprint(self, farm: "Farm", jobs: list[SimJob]) -> None:
        """What a dispatcher remembers when all is done: its renderers, and for each run some seconds of its speed."""
        size = footprint(farm.dispatch)
        runs = sum(len(job.runs) for job in jobs)
        allowed = 100 + 40 * len(farm.slots) + 170 * runs
        if size > allowed:
            self._break(f"{farm.name} remembers {size} things when all is done, more than {allowed}")

    # Books

    def _add(self, book: Book, lease: Lease, renderer: str) -> None:
        if lease.token not in book.live:
            book.places.setdefault(place_of(lease), []).append(lease.token)
        book.live[lease.token] = Live(lease, renderer, self._world.now)

    def _release(self, book: Book, token: str) -> bool:
        live = book.live.pop(token, None)
        if live is None:
            return False
        place = place_of(live.lease)
        left = [one for one in book.places[place] if one != token]
        if left:
            book.places[place] = left
        else:
            del book.places[place]
        return True

    def _must_check(self, book: Book, lease: Lease) -> None:
        """A shard that came back from trouble may have a receipt; unless another holds it still."""
        place = place_of(lease)
        if lease.task == "render" and place not in book.known and not book.places.get(place):
            view = book.views.get(lease.job)
            if view and any((e.run, e.pass_number) == place[:2] for e in view.runs):
                book.unchecked.add(place)

    def _now_known(self, book: Book, place: Place) -> None:
        book.known.add(place)
        book.unchecked.discard(place)
        for token in list(book.places.get(place, ())):
            self._release(book, token)

    def _break(self, what: str) -> None:
        raise Violation(f"at {self._world.now:.3f} s: {what}")
