"""A manifest with all that a plan of it needs from its model card and this machine.

Checks parameters against the card before any prompt is read. Writes nothing.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from farm.devices import DeviceInfo, numerics_for
from farm.errors import FarmError, ManifestError
from farm.ledger import Ledger
from farm.manifest import LoadedManifest, Manifest
from farm.modelcard import ModelCard, ParamOverrides, RenderParams, find_card, merged, param_fault, pinned
from farm.plan import Numerics, mean_work
from farm.settings import Settings
from farm.sources import StoreOpener
from farm.storage.opening import open_store
from farm.sweep import sweep_points
from farm.yamlfile import Document, did_you_mean, shown


@dataclass(frozen=True, slots=True)
class Request:
    """A manifest with all that a plan of it needs from this machine; checked against its model card."""

    manifest: Manifest
    document: Document
    card: ModelCard
    params: RenderParams
    points: tuple[ParamOverrides, ...]
    numerics: Numerics
    device: str
    renderers: int
    open_store: StoreOpener
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per image of one renderer. Measured: by a job just like this; else scaled, or the card's word."""

    seconds_per_image: float | None
    source: Literal["measured", "estimated", "unknown"]


def prepare(loaded: LoadedManifest, settings: Settings, *, device: DeviceInfo, renderers: int) -> Request:
    """Find the model, merge the parameters, check them. Raises UnknownModelError, ModelCardError, ManifestError,
    PlacementError; prompts are not looked at yet."""
    manifest, document = loaded.manifest, loaded.document
    try:
        card = pinned(find_card(manifest.model, settings))
    except FarmError as exc:
        raise type(exc)(f"{document.where(('model',))}: {exc.message}") from exc
    preset = ParamOverrides()
    if manifest.preset is not None:
        if manifest.preset not in card.presets:
            near = did_you_mean(manifest.preset, list(card.presets)) or f"; it has {', '.join(card.presets) or 'none'}"
            raise ManifestError(
                f"{document.where(('preset',))}: {card.name} has no preset {shown(manifest.preset)}{near}"
            )
        preset = card.presets[manifest.preset]
    params = merged(card.defaults, preset, manifest.params)
    try:
        points = sweep_points(manifest.sweep)
    except ManifestError as exc:
        raise ManifestError(f"{document.where(('sweep',))}: {exc.message}") from exc
    per_row = getattr(manifest.prompts, "per_row", {})
    for point in points:
        _check_point(card, params, point, document, given_by_rows=set(per_row))
    return Request(
        manifest=manifest,
        document=document,
        card=card,
        params=params,
        points=points,
        numerics=numerics_for(card, device=device, renderers=renderers),
        device=device.name,
        renderers=renderers,
        open_store=partial(open_store, settings=settings),
        owner=settings.owner or "",
    )


def speed_of(request: Request, ledger: Ledger | None) -> Speed:
    params, card, kind = request.params, request.card, request.numerics.device
    profile = ledger.profile(card.name, request.device) if ledger else None
    if profile is not None:
        then = (profile.width, profile.height, profile.num_inference_steps)
        if then == (params.width, params.height, params.num_inference_steps) and request.points == (ParamOverrides(),):
            return Speed(profile.seconds_per_image, "measured")
        return Speed(profile.seconds_per_image * mean_work(params, request.points) / math.prod(then), "estimated")
    if kind in card.seconds_per_image:
        base = card.defaults.width * card.defaults.height * card.defaults.num_inference_steps
        return Speed(card.seconds_per_image[kind] * mean_work(params, request.points) / base, "estimated")
    return Speed(None, "unknown")


def _check_point(
    card: ModelCard, params: RenderParams, point: ParamOverrides, document: Document, *, given_by_rows: set[str]
) -> None:
    fault = param_fault(card, merged(params, point))
    if (
        fault is None
        or fault.name in given_by_rows
        or ({"width", "height"} & given_by_rows and fault.name in ("width", "height"))
    ):
        return
    section = "sweep" if getattr(point, fault.name) is not None else "params"
    raise ManifestError(f"{document.where((section, fault.name))}: {section}.{fault.name}: {fault.text}")
