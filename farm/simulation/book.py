"""What an audit knows of one life of a dispatcher: what that was told, and what it has said."""

from dataclasses import dataclass, field

from farm.lease import Lease
from farm.run import JobView

Place = tuple[str, int, int]
"""Run, pass and shard."""


@dataclass(slots=True)
class Live:
    """A lease that a dispatcher counts as held; `seen_at`: granted, taken over or last reported."""

    lease: Lease
    renderer: str
    seen_at: float


@dataclass(slots=True)
class Rest:
    """A renderer's failures in a row at rendering or finalising a run, and how long it is left alone with it."""

    count: int
    since: float
    until: float = 0.0


@dataclass(slots=True)
class Book:
    """What one life of a dispatcher was told and has said."""

    live: dict[str, Live] = field(default_factory=dict)
    places: dict[Place, list[str]] = field(default_factory=dict)
    known: set[Place] = field(default_factory=set)
    unchecked: set[Place] = field(default_factory=set)
    views: dict[str, JobView] = field(default_factory=dict)
    closed: set[tuple[str, int]] = field(default_factory=set)
    claimed: dict[str, bool] = field(default_factory=dict)
    reading: set[str] = field(default_factory=set)
    rests: dict[tuple[str, str, bool], Rest] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)
    incarnations: dict[str, str] = field(default_factory=dict)
    idle_since: dict[str, float] = field(default_factory=dict)
    starved_since: dict[str, float] = field(default_factory=dict)
    hellos: dict[str, list[float]] = field(default_factory=dict)
    done_images: dict[str, int] = field(default_factory=dict)
    wall: float | None = None
    ticked_at: float | None = None


def place_of(lease: Lease) -> Place:
    return (lease.run, lease.pass_number, lease.shard)


def footprint(root: object) -> int:
    """How many things an object's containers hold, all the way down."""
    seen: set[int] = set()
    todo, count = [root], 0
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (str, bytes, int, float, type(None), type)) or callable(one):
            continue
        seen.add(id(one))
        inside: list[object] = []
        if isinstance(one, dict):
            inside = [*one.keys(), *one.values()]
            count += len(one)
        elif isinstance(one, (list, tuple, set, frozenset)) or type(one).__name__ == "deque":
            inside = list(one)  # type: ignore[call-overload]
            count += len(inside)
        else:
            names = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
            inside = [getattr(one, name, None) for name in names]
            inside += list(getattr(one, "__dict__", {}).values())
        todo.extend(inside)
    return count
