"""What the dispatcher knows, as people and metrics see it. Only looks: decides and changes nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from farm.board import Board
from farm.dispatch import Dispatch
from farm.held import Renderer
from farm.idle import hangs
from farm.lease import beat_s
from farm.meters import Meters
from farm.places import Place, Places
from farm.portion import RendererState, RendererView

STATES: tuple[RendererState, ...] = get_args(RendererState)
JOB_STATES = ("waiting", "running", "finalising", "pilot", "paused", "stopped", "stalled", "elsewhere")
SILENT_BEATS = 3
SILENT_S = 2.0
"""A renderer that is this much later than three beats gets no urgent images while others show life."""


@dataclass(frozen=True, slots=True)
class Overview:
    """A moment's view of the slots `names`."""

    board: Board
    places: Places
    names: Sequence[str]

    def renderers(self) -> tuple[RendererView, ...]:
        """Every slot, whether a renderer is there or not."""
        return tuple(self._renderer(name) for name in self.names)

    def open_places(self, model: str, *, now: float) -> list[Place]:
        """Renderers that an urgent image of a model may go to: none that is drained, and none that seems to hang or is
        silent, unless all are."""
        known = [one for name in self.names if (one := self.board.renderers.get(name))]
        free = [one for one in known if one.name not in self.board.drained]
        patience_s = SILENT_BEATS * beat_s(len(self.board.renderers)) + SILENT_S
        lively = [one for one in free if now - one.heard_at <= patience_s and not hangs(one)]
        return [self._place(one, model) for one in lively or free]

    def wait_s(self, *, now: float) -> Mapping[str, float]:
        """Seconds until an urgent image should be begun, by the models that are loaded."""
        loaded = {one.loaded for one in self.board.renderers.values()} - {None}
        waits = {}
        for model in sorted(str(one) for one in loaded):
            places = self.open_places(model, now=now)
            if places:
                waits[model] = round(min(self.places.wait_s(place, model) for place in places), 3)
        return waits

    def urgent(self, name: str) -> int:
        """Images of the endpoint that a slot's renderer has: by its seats, or by what it says itself if that is more."""
        known = self.board.renderers.get(name)
        said = known.standing.urgent if known and known.standing else 0
        return max(said, self.places.images_of(name))

    def _renderer(self, name: str) -> RendererView:
        known = self.board.renderers.get(name)
        leases = [held.lease for held in known.held.values()] if known else []
        return RendererView(
            name=name,
            state=self._state(name, known),
            device=known.device if known else "",
            loaded=known.loaded if known else None,
            job=leases[0].job if leases else None,
            urgent=self.urgent(name) if known else 0,
            reserved=name in self.board.reserved,
        )

    def _state(self, name: str, known: Renderer | None) -> RendererState:
        busy = known is not None and bool(known.held or self.urgent(name))
        if name in self.board.drained:
            return "draining" if busy else "drained"
        if known is None:
            return "starting"
        stages = {held.report.stage for held in known.held.values() if held.report}
        if "load" in stages or (known.standing is not None and known.standing.loading):
            return "loading"
        return "rendering" if busy else "idle"

    def _place(self, renderer: Renderer, model: str) -> Place:
        load_s = 0.0 if renderer.loaded == model else self.board.queue.swap_s(model)
        return Place(renderer.name, renderer.incarnation, bool(renderer.held), load_s)


def set_gauges(
    meters: Meters, dispatch: Dispatch, overview: Overview, *, gateways: int, now: float, wall: float
) -> None:
    """Measure what the dispatcher's gauges show."""
    board, places = dispatch.board, overview.places
    states = [view.state for view in overview.renderers()]
    for state in STATES:
        meters.gauge("farm_renderers", states.count(state), state=state)
    meters.gauge("farm_gateways", gateways)
    meters.gauge("farm_seats", places.seats)
    unfinished = set(dispatch.unfinished())
    runs = [run for run in board.runs.values() if run.entry.job in unfinished and not run.finalised]
    meters.gauge("farm_queue_images", sum(run.entry.images - run.done_images for run in runs), **{"class": "bulk"})
    meters.gauge("farm_queue_images", places.waiting, **{"class": "urgent"})
    waiting = (run.entry.created_at for run in runs if run.entry.run in board.queue)
    meters.gauge("farm_queue_age_seconds", _age_s(waiting, wall), **{"class": "bulk"})
    meters.gauge("farm_queue_age_seconds", places.age_s(now=now), **{"class": "urgent"})
    _set_jobs(meters, dispatch)


def _set_jobs(meters: Meters, dispatch: Dispatch) -> None:
    found = [progress.state for job in dispatch.jobs() if (progress := dispatch.progress(job))]
    for state in JOB_STATES:
        meters.gauge("farm_jobs", found.count(state), state=state)


def _age_s(created: Iterable[str], wall: float) -> float:
    oldest = min(created, default=None)
    return max(wall - datetime.fromisoformat(oldest).timestamp(), 0.0) if oldest else 0.0
