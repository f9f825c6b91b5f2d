"""Which run a free renderer works for next.

Higher priority first. Within one priority the owner goes first who had the least GPU time for its share; but a renderer
keeps the model that it has loaded until another owner's deficit is worth several swaps and that owner has fewer
renderers than its share of them. Of one owner's runs those with the loaded model, until the oldest has waited for as
long. Knows nothing of leases, clocks or storage. Equal inputs give equal order.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

SWAPS_WORTH = 8
"""How many swaps another owner's deficit must be worth before a renderer swaps models for it."""
UNKNOWN_SWAP_S = 10.0
"""What a swap is taken to cost before a load of that model was measured."""
SWAP_MEMORY = 0.5
"""Weight of the newest measured load in the running mean."""
MEASURED_LOAD_S = 0.05
"""A shorter load found the model there."""


class FairShare:
    """GPU-seconds over weight, by owner: who has the least goes first.

    Time that is measured counts as it was; of a lease in hand what is still expected counts too, so that a burst of
    grants is shared out before the first second is measured. Who begins to want something starts level with those who
    want already: time in which nothing was wanted earns no credit.
    """

    def __init__(self, shares: Mapping[str, float]):
        self._shares = dict(shares)
        self._used: dict[str, float] = {}
        self._expected: dict[str, float] = {}

    def weight(self, owner: str) -> float:
        """The owner's weight; 1 where none is set."""
        return self._shares.get(owner, 1.0)

    def charge(self, owner: str, seconds: float) -> None:
        """Count measured GPU-seconds; a correction may be negative."""
        self._used[owner] = self._used.get(owner, 0.0) + seconds / self.weight(owner)

    def expect(self, owner: str, seconds: float) -> None:
        """Change what leases in hand are still expected to take."""
        self._expected[owner] = self._expected.get(owner, 0.0) + seconds / self.weight(owner)

    def join(self, owner: str, active: Iterable[str]) -> None:
        """Bring an owner who had nothing to do level with the `active`, or with the one furthest on where there is none."""
        others = [self._used.get(one, 0.0) for one in active if one != owner]
        level = min(others) if others else max(self._used.values(), default=0.0)
        self._used[owner] = max(self._used.get(owner, 0.0), level)

    def used(self, owner: str) -> float:
        """GPU-seconds over weight, those still expected included."""
        return self._used.get(owner, 0.0) + self._expected.get(owner, 0.0)


@dataclass(frozen=True, slots=True, order=True)
class Waiting:
    """A run with work to lease, as the queue sees it; ordered by age."""

    created_at: str
    run: str
    priority: int = field(compare=False)
    owner: str = field(compare=False)
    model: str = field(compare=False)


Level = dict[str, dict[str, list[Waiting]]]
"""The waiting runs of one priority: owner -> model -> runs, oldest first."""


class Queue:
    """Runs with work, and who of their owners is served by how many renderers."""

    def __init__(self, shares: Mapping[str, float]):
        self.share = FairShare(shares)
        self._levels: dict[int, Level] = {}
        self._priorities: list[int] = []
        self._waiting: dict[str, Waiting] = {}
        self._serving: dict[str, int] = {}
        self._swap_s: dict[str, float] = {}
        self._used_then: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, run: str) -> bool:
        return run in self._waiting

    def put(self, waiting: Waiting) -> None:
        """Let a run wait; one that waits already stands as it is now described."""
        known = self._waiting.get(waiting.run)
        if known == waiting and known.priority == waiting.priority and known.owner == waiting.owner:
            return
        if known is None and not self._is_active(waiting.owner):
            self.share.join(waiting.owner, self._active())
        if known is not None:
            then = self._used_then[waiting.run]
            self.remove(waiting.run)
            self._used_then[waiting.run] = then
        if waiting.priority not in self._levels:
            self._levels[waiting.priority] = {}
            self._priorities = sorted(self._levels, reverse=True)
        runs = self._levels[waiting.priority].setdefault(waiting.owner, {}).setdefault(waiting.model, [])
        insort(runs, waiting)
        self._waiting[waiting.run] = waiting
        self._used_then.setdefault(waiting.run, self.share.used(waiting.owner))

    def remove(self, run: str) -> None:
        """Take a run out that has nothing to lease; absent is fine."""
        waiting = self._waiting.pop(run, None)
        if waiting is None:
            return
        del self._used_then[run]
        level = self._levels[waiting.priority]
        models = level[waiting.owner]
        runs = models[waiting.model]
        del runs[bisect_left(runs, waiting)]
        if not runs:
            del models[waiting.model]
        if not models:
            del level[waiting.owner]
        if not level:
            del self._levels[waiting.priority]
            self._priorities.remove(waiting.priority)

    def serve(self, owner: str, renderers: int) -> None:
        """Count `renderers` more (or fewer) that work for an owner."""
        left = self._serving.get(owner, 0) + renderers
        if left:
            self._serving[owner] = left
        else:
            self._serving.pop(owner, None)

    def loaded(self, model: str, seconds: float) -> None:
        """Learn what loading a model took on a renderer that did not have it."""
        if seconds > MEASURED_LOAD_S:
            before = self._swap_s.get(model, seconds)
            self._swap_s[model] = before + SWAP_MEMORY * (seconds - before)

    def swap_s(self, model: str) -> float:
        """What a swap to a model costs, as measured."""
        return self._swap_s.get(model, UNKNOWN_SWAP_S)

    def load_s(self) -> dict[str, float]:
        """Measured seconds to load a model, by its name."""
        return dict(self._swap_s)

    def choose(self, loaded: str | None, *, fits: Callable[[str], bool], renderers: int) -> Waiting | None:
        """The run to work for next on a renderer that has the model `loaded`, of those that `fits` lets through.

        `renderers`: how many the farm has.
        """
        for priority in self._priorities:
            level = self._levels[priority]
            fair = self._fairest(level, level, loaded, fits)
            if fair is None:
                continue
            if loaded is None or fair.model == loaded:
                return fair
            keep = self._fairest(level, [one for one in level if loaded in level[one]], loaded, fits)
            if keep is None or keep.model != loaded or self._is_worth_a_swap(level, fair, keep, renderers):
                return fair
            return keep
        return None

    def _fairest(
        self, level: Level, owners: Iterable[str], loaded: str | None, fits: Callable[[str], bool]
    ) -> Waiting | None:
        """The first run that fits, of the owner with the least use."""
        used = self.share.used
        first = min(owners, key=lambda one: (used(one), one), default=None)
        if first is None:
            return None
        found = self._of_owner(level[first], loaded, fits)
        if found is not None:
            return found
        for owner in sorted(owners, key=lambda one: (used(one), one)):
            found = self._of_owner(level[owner], loaded, fits)
            if found is not None:
                return found
        return None

    def _of_owner(
        self, models: dict[str, list[Waiting]], loaded: str | None, fits: Callable[[str], bool]
    ) -> Waiting | None:
        """An owner's next run: one with the loaded model, until the oldest of all has waited for several swaps' worth."""
        firsts = [one for runs in models.values() if (one := next((run for run in runs if fits(run.run)), None))]
        oldest = min(firsts, default=None)
        if oldest is None or loaded is None or oldest.model == loaded:
            return oldest
        kept = next((one for one in firsts if one.model == loaded), None)
        share = self.share
        waited = (share.used(oldest.owner) - self._used_then[oldest.run]) * share.weight(oldest.owner)
        return oldest if kept is None or waited >= SWAPS_WORTH * self.swap_s(oldest.model) else kept

    def _is_worth_a_swap(self, level: Level, fair: Waiting, keep: Waiting, renderers: int) -> bool:
        if fair.owner == keep.owner:
            return False
        share = self.share
        deficit = (share.used(keep.owner) - share.used(fair.owner)) * share.weight(fair.owner)
        if deficit < SWAPS_WORTH * self.swap_s(fair.model):
            return False
        weights = sum(share.weight(one) for one in {*level, *self._serving})
        return self._serving.get(fair.owner, 0) < renderers * share.weight(fair.owner) / weights

    def _is_active(self, owner: str) -> bool:
        return owner in self._serving or any(owner in level for level in self._levels.values())

    def _active(self) -> set[str]:
        return {*self._serving, *(owner for level in self._levels.values() for owner in level)}
