"""One simulated farm's claims: the rules of `farm/claims.py`, with time between each look and write."""

from collections.abc import Callable
from typing import Any

from farm.claims import CLAIM_LOOK_S, CLAIM_RENEW_S, Claim, decide
from farm.simulation.store import UNAVAILABLE, Key, Store

Held = Callable[[str, bool, str], object]
Later = Callable[..., None]


class SimClaims:
    """Looks at each job's claim again and again, and tells `held(job, whether, by)`.

    `later` and `heard` belong to the dispatcher's process: what they were given is forgotten when it dies.
    """

    def __init__(
        self,
        store: Store,
        farm: str,
        *,
        now: Callable[[], float],
        later: Later,
        heard: Callable[[Callable[[Any], object]], Callable[[Any], object]],
        held: Held,
    ):
        self._store = store
        self._me = Claim(farm=farm, host=farm)
        self._now = now
        self._later = later
        self._heard = heard
        self._held = held
        self._sights: dict[str, tuple[int, float]] = {}
        self._followed: set[str] = set()

    def follow(self, job: str) -> None:
        """Take a job's claim, or wait for it; once for each job."""
        if job not in self._followed:
            self._followed.add(job)
            self._look(job)

    def release(self, job: str) -> None:
        """Let a job's claim go if it is ours."""
        self._followed.discard(job)
        self._sights.pop(job, None)
        found = self._store.get(("claim", job))
        if found is not None and found.farm == self._me.farm:
            del self._store.objects["claim", job]

    def _look(self, job: str) -> None:
        if job in self._followed:
            key = ("claim", job)
            self._store.read(
                lambda: self._store.objects.get(key), self._heard(lambda found: self._seen(job, key, found))
            )

    def _seen(self, job: str, key: Key, found: Any) -> None:
        if job not in self._followed:
            return
        if found is UNAVAILABLE:
            self._later(CLAIM_LOOK_S, self._look, job)
            return
        if found is None:
            self._store.write(key, self._written(0), self._heard(lambda won: self._written_at(job, won, "")))
            return
        claim, version = found
        sight = self._sights.get(job)
        if sight is None or sight[0] != version:
            self._sights[job] = sight = (version, self._now())
        decision = decide(claim, self._me, same_for_s=self._now() - sight[1], lives=lambda pid, started: True)
        if decision == "leave":
            self._answer(job, held=False, by=claim.host)
            return
        written = self._written(claim.beat)
        self._store.replace(key, written, version, self._heard(lambda won: self._written_at(job, won, claim.host)))

    def _written_at(self, job: str, won: Any, by: str) -> None:
        if won is UNAVAILABLE:
            self._later(CLAIM_LOOK_S, self._look, job)
        elif won:
            self._sights.pop(job, None)
            self._answer(job, held=True, by="")
        else:
            self._later(0.0, self._look, job)

    def _answer(self, job: str, *, held: bool, by: str) -> None:
        if job in self._followed:
            self._held(job, held, by)
            self._later(CLAIM_RENEW_S if held else CLAIM_LOOK_S, self._look, job)

    def _written(self, beat: int) -> Claim:
        return self._me.model_copy(update={"beat": beat + 1})
