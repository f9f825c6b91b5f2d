"""How far a reader of a job's events has come, as the short text that stands in `Last-Event-ID`.

    0a1b2c3d.1.14          of run 0a1b2c3d, pass 1: shards 0 to 13 were told
    0a1b2c3d.2.3-5,8       of pass 2: 0 to 2, and 5 and 8 besides; one entry a run, oldest first, between semicolons

Shards land in any order, so beyond the first that is missing they are listed. What the text has no room for is told
twice: an image is known by its run, index and pass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from farm.errors import RequestError
from farm.plan import Plan

MAX_LISTED = 200
MAX_RUNS = 100
"""Runs that the text names, the newest; those before them count as told."""
_ENTRY = re.compile(r"([0-9a-z]{1,32})\.([0-9]{1,6})\.([0-9]{1,10})((?:[-,][0-9]{1,10}){0,200})")


@dataclass(frozen=True, slots=True)
class Landed:
    """A shard of a run that is done."""

    run: str
    pass_number: int
    shard: int


@dataclass(slots=True)
class _Seen:
    """Of a run's pass the shards below `below` were told, and those of `beyond`."""

    pass_number: int = 1
    below: int = 0
    beyond: set[int] = field(default_factory=set)


class Position:
    """What a reader was told."""

    def __init__(self) -> None:
        self._runs: dict[str, _Seen] = {}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str()` gave; an empty text is the beginning. Raises RequestError."""
        made = cls()
        for entry in text.split(";") if text else ():
            match = _ENTRY.fullmatch(entry)
            if match is None:
                raise RequestError(
                    f"Last-Event-ID {text[:40]!r} is none that this farm gave; send the last one as it came, or none"
                )
            run, number, below, beyond = match.groups()
            listed = {int(shard) for shard in re.findall(r"\d+", beyond)}
            made._runs[run] = _Seen(int(number), int(below), listed)
        return made

    def __str__(self) -> str:
        entries = []
        for run, seen in list(self._runs.items())[-MAX_RUNS:]:
            beyond = ",".join(str(shard) for shard in sorted(seen.beyond)[:MAX_LISTED])
            entries.append(f"{run}.{seen.pass_number}.{seen.below}{f'-{beyond}' if beyond else ''}")
        return ";".join(entries)

    def ahead(self, plans: Sequence[Plan]) -> Sequence[Plan]:
        """Return those of a job's runs of which something may be left to tell."""
        named = [at for at, plan in enumerate(plans) if plan.run in self._runs]
        return plans[named[0] :] if named else plans

    def pass_of(self, run: str) -> int:
        """The latest pass of which something was told; 1 at the beginning."""
        return self._runs[run].pass_number if run in self._runs else 1

    def unseen(self, run: str, number: int, done: npt.NDArray[np.bool_], *, most: int) -> list[int]:
        """Return shards that are `done` in a pass and were not told, ascending; at most `most`."""
        seen = self._runs.get(run)
        if seen is None or seen.pass_number < number:
            seen = _Seen(number)
        if seen.pass_number > number:
            return []
        fresh: list[int] = []
        for shard in np.flatnonzero(done[seen.below :]):
            if len(fresh) >= most:
                break
            if int(shard) + seen.below not in seen.beyond:
                fresh.append(int(shard) + seen.below)
        return fresh

    def tell(self, landed: Landed) -> None:
        """Note that a shard was told."""
        seen = self._runs.setdefault(landed.run, _Seen(landed.pass_number))
        if seen.pass_number < landed.pass_number:
            seen.pass_number, seen.below, seen.beyond = landed.pass_number, 0, set()
        seen.beyond.add(landed.shard)
        while seen.below in seen.beyond:
            seen.beyond.remove(seen.below)
            seen.below += 1

    def skip(self, run: str, number: int, done: npt.NDArray[np.bool_]) -> None:
        """Take all that is done in a pass as told."""
        for shard in np.flatnonzero(done).tolist():
            self.tell(Landed(run, number, shard))
