"""A job's priority and where it stops by itself: what its manifest stated, and what was said since.

The first run's manifest counts; what a later one states differently is said to the job as a `change` when it is
submitted, so that the order of words alone decides. Pure.
"""

from dataclasses import dataclass, fields
from typing import Any

from farm.errors import RecordError
from farm.manifest import Manifest
from farm.moment import moment
from farm.records import Standing

_NAMES = {
    "priority": "priority",
    "finish_by": "finish_by",
    "gpu_hours": "budget.gpu_hours",
    "max_images": "budget.images",
}


@dataclass(frozen=True, slots=True)
class Changes:
    """New values; None leaves one as it is. `finish_by` is ISO 8601 with an offset."""

    priority: int | None = None
    finish_by: str | None = None
    gpu_hours: float | None = None
    max_images: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are given, as `Ledger.append_control` takes them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for a job now; None: no limit."""

    priority: int
    finish_by: str | None = None
    gpu_hours: float | None = None
    max_images: int | None = None

    @property
    def finish_by_s(self) -> float | None:
        """`finish_by` as Unix seconds."""
        return None if self.finish_by is None else moment(self.finish_by).timestamp()

    def seconds_left(self, now: str) -> float | None:
        """Return the seconds from `now` until `finish_by`, below 0 where it has passed; None without one."""
        return None if self.finish_by is None else (moment(self.finish_by) - moment(now)).total_seconds()

    def differing(self, changes: Changes) -> Changes:
        """Return those changes that are none yet; two ways to write one moment are one value."""
        return Changes(
            **{name: value for name, value in changes.given.items() if not _same(name, getattr(self, name), value)}
        )

    def words(self, changes: Changes) -> tuple[str, ...]:
        """Say each change as `priority: 50 -> 80`."""
        return tuple(
            f"{_NAMES[name]}: {_shown(getattr(self, name))} -> {_shown(value)}" for name, value in changes.given.items()
        )

    def unlike(self, stated: Changes) -> tuple[str, ...]:
        """Name what holds and is not what a manifest states, as `budget.images: 5000`. No priority is stated as the usual."""
        holds = {name: getattr(self, name) for name in _NAMES}
        if stated.priority is None:
            del holds["priority"]
        given = stated.given
        return tuple(
            f"{_NAMES[name]}: {_shown(value)}"
            for name, value in holds.items()
            if value is not None and not (name in given and _same(name, value, given[name]))
        )


def limits_of(manifest: Manifest, said: Standing) -> Limits:
    """Return what a job's first manifest stated and what was said since come to. Raises RecordError."""
    first = stated(manifest)
    if said.finish_by is not None:
        try:
            moment(said.finish_by)
        except ValueError as exc:
            raise RecordError(
                f"job {manifest.name}: finish_by of a control {exc}; say another with farm change"
            ) from exc
    return Limits(
        priority=manifest.priority if said.priority is None else said.priority,
        finish_by=said.finish_by or first.finish_by,
        gpu_hours=said.gpu_hours or first.gpu_hours,
        max_images=said.max_images or first.max_images,
    )


def stated(manifest: Manifest) -> Changes:
    """Return the values that stand in a manifest; what it leaves out, it has no opinion on."""
    budget = manifest.budget
    return Changes(
        priority=manifest.priority if "priority" in manifest.model_fields_set else None,
        finish_by=manifest.finish_by,
        gpu_hours=budget.gpu_hours if budget else None,
        max_images=budget.images if budget else None,
    )


def restated(manifest: Manifest, planned: Manifest) -> Changes:
    """Return the values in a manifest that are not those it stated when its job was planned: what a person has edited.

    What stands there as it stood says nothing new, so it does not undo what was said to the job since.
    """
    then = stated(planned).given
    new = {
        name: value
        for name, value in stated(manifest).given.items()
        if name not in then or not _same(name, then[name], value)
    }
    return Changes(**new)


def _same(name: str, before: Any, value: Any) -> bool:
    if name == "finish_by" and before is not None:
        return moment(before) == moment(value)
    return bool(before == value)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
