"""`GET /v1/models`: the model cards that there are, and how soon each draws."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from farm.cardparts import SizeLimits
from farm.devices import numerics_for
from farm.errors import FarmUnavailableError, PlacementError
from farm.modelcard import ModelCard, Preset, RenderParams
from farm.portion import PoolView
from farm.reserve import in_force
from farm.server.caller import Reader
from farm.server.errors import answers
from farm.server.services import Served, Services

router = APIRouter(tags=["models"])


class Readiness(BaseModel):
    """How soon a model draws."""

    state: Literal["loaded", "warm", "cold", "unsuited", "unknown"] = Field(
        description="loaded: a renderer has it; warm: the farm keeps it loaded at this hour, and is about to; cold: it is loaded "
        "when somebody asks for it; unsuited: this farm's devices cannot draw it; unknown: the farm does not answer"
    )
    renderers: int = Field(description="how many have it loaded")
    load_seconds: float | None = Field(description="measured, to load it; None where nobody knows yet")
    wait_seconds: float | None = Field(description="expected until an image asked for now is begun; None: not known")
    reason: str | None = Field(default=None, description="why it is unsuited")


class Model(BaseModel):
    """One model card: OpenAI's fields, then the card's."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="0: cards have no date")
    owned_by: str = Field(description="who published the weights, as far as the card says")
    title: str
    licence: str
    licence_warning: str | None
    defaults: RenderParams
    presets: dict[str, Preset]
    negative_prompts: dict[str, str] = Field(description="by name; asked for as @NAME")
    limits: SizeLimits
    max_steps: int
    readiness: Readiness


class Models(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.get("/v1/models", summary="List the models", responses=answers())
async def list_models(_caller: Reader, services: Served) -> Models:
    """Every model card of the farm, and how soon it draws."""
    pool = await _pool(services)
    return Models(data=[_model(card, pool, services) for card in await services.cards.all()])


@router.get("/v1/models/{id}", summary="Look a model up", responses=answers(404))
async def show_model(id: str, _caller: Reader, services: Served) -> Model:
    """One model card, and how soon it draws."""
    return _model(await services.cards.pinned(id), await _pool(services), services)


async def _pool(services: Services) -> PoolView | None:
    try:
        return await services.pool()
    except FarmUnavailableError:
        return None


def _model(card: ModelCard, pool: PoolView | None, services: Services) -> Model:
    hub = card.source.hub
    return Model(
        id=card.name,
        owned_by=hub.partition("/")[0] if hub else "farm",
        title=card.title,
        licence=card.licence,
        licence_warning=card.licence_warning,
        defaults=card.defaults,
        presets=card.presets,
        negative_prompts=card.negative_prompts,
        limits=card.limits,
        max_steps=card.max_steps,
        readiness=_readiness(card, pool, services),
    )


def _readiness(card: ModelCard, pool: PoolView | None, services: Services) -> Readiness:
    if pool is None or pool.machine is None:
        return Readiness(state="unknown", renderers=0, load_seconds=None, wait_seconds=None)
    load_s, wait_s = pool.load_s.get(card.name), pool.wait_s.get(card.name)
    loaded = sum(one.loaded == card.name for one in pool.renderers)
    if loaded:
        return Readiness(state="loaded", renderers=loaded, load_seconds=load_s, wait_seconds=wait_s)
    try:
        numerics_for(card, device=pool.machine, renderers=max(1, len(pool.renderers)))
    except PlacementError as exc:
        return Readiness(state="unsuited", renderers=0, load_seconds=None, wait_seconds=None, reason=exc.message)
    rule = in_force(services.settings.reserve, services.wall())
    return Readiness(
        state="warm" if rule and card.name in rule.warm else "cold",
        renderers=0,
        load_seconds=load_s,
        wait_seconds=wait_s if wait_s is not None else load_s,
    )
