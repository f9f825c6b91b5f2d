"""The words that gateway, dispatcher and renderers exchange about urgent images. Plain records.

A request of the endpoint is split into portions, one for each renderer that takes part; the dispatcher gives a seat for each
and keeps count, the gateway brings the portion to the renderer by itself. Only jobs have shards and leases.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from farm.devices import DeviceInfo
from farm.manifest import Output
from farm.modelcard import ModelCard
from farm.plan import ImageSpec, Numerics

HOLD_S = 5.0
"""How often a gateway tells which seats it still needs."""
SEAT_S = 20.0
"""A seat that its gateway has not told of for this long is given up, and its renderer told to drop the portion."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one key may use. None where there is no limit."""

    images_per_minute: int | None = None
    images_at_once: int | None = None
    images_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A gateway's question for seats for `images` images of one model. Asking twice with one `token` gives the same seats.

    `key`: the id of the key that asks, empty without one; quotas are kept by it. `steps`: denoising steps of all images
    together, for the estimate. `again`: the images were counted for the quotas before, and lost with their renderer.
    """

    token: str
    gateway: str
    owner: str
    key: str
    allowance: Allowance
    model: str
    images: int
    steps: int
    again: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """A renderer's promise to draw so many images. `token` names the portion there; `incarnation` its process."""

    token: str
    renderer: str
    images: int
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no seat is given. `rate`, `at_once` and `quota` are the key's own limits (429), the others the farm's state (503).

    `retry_after_s`: when asking again may help.
    """

    code: Literal["rate", "at_once", "quota", "busy", "no_renderer", "stopping"]
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Placing:
    """The answer to an entry: seats for all its images, or a refusal. `wait_s`: expected until the first is begun."""

    seats: tuple[Seat, ...] = ()
    refusal: Refusal | None = None
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Portion:
    """Images of one request for one renderer. The specs' `index` counts them within the request."""

    token: str
    owner: str
    card: ModelCard
    numerics: Numerics
    specs: tuple[ImageSpec, ...]
    output: Output


@dataclass(frozen=True, slots=True)
class Drawn:
    """One image of a portion: the picture file with its provenance, or why there is none.

    `seconds`: its share of its batch's time on the device. `flag`: what looks wrong with it (`black`, `flat`), if anything.
    """

    index: int
    seed: int
    seconds: float
    data: bytes = b""
    sha256: str = ""
    flag: str | None = None
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A drawn portion. `waited_s`: from its arrival to the start of its first batch; `load_s`: of that, loading the model;
    `engine_s`: the time on the device of all batches that it shared in, by its share of them."""

    renderer: str
    device: str
    images: tuple[Drawn, ...]
    waited_s: float
    load_s: float
    engine_s: float


SeatEnd = Literal["done", "lost", "unfit"]
"""How a seat ended: drawn or given up; its renderer ended, or did not know it; its renderer cannot draw the model."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A seat, or all of an entry's, given back. `seconds`: device time for its owner's account."""

    token: str
    seconds: float
    end: SeatEnd = "done"


RendererState = Literal["starting", "idle", "rendering", "loading", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class RendererView:
    """A renderer as people see it. `job`: whose shard it has in hand; `urgent`: images of the endpoint that it has."""

    name: str
    state: RendererState
    device: str
    loaded: str | None
    job: str | None
    urgent: int
    reserved: bool


@dataclass(frozen=True, slots=True)
class PoolView:
    """The farm as people see it. `machine`: what its renderers render on, None before the first has come.

    `load_s`: measured seconds to load a model, by its name. `wait_s`: expected seconds until an urgent image of a model that
    is loaded somewhere is begun, by its name. `waiting`: urgent images that are placed and not drawn; `capacity`: how many
    there may be.
    """

    version: str
    store: str
    renderers: tuple[RendererView, ...]
    machine: DeviceInfo | None
    waiting: int
    capacity: int
    load_s: Mapping[str, float] = field(default_factory=dict)
    wait_s: Mapping[str, float] = field(default_factory=dict)
