"""A manifest with all that a plan of it needs from its model card and this machine.

Checks parameters against the card before any prompt is read. Writes nothing.
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from farm.devices import DeviceInfo, numerics_for
from farm.errors import FarmError, ManifestError, PromptError
from farm.ledger import Ledger
from farm.lint import Advice
from farm.manifest import LoadedManifest, Manifest
from farm.modelcard import (
    AnyOverrides,
    ModelCard,
    ParamOverrides,
    Preset,
    RenderParams,
    find_card,
    merged,
    param_fault,
    resolved,
)
from farm.plan import Numerics, mean_work, speed_identity
from farm.settings import Settings
from farm.sources import StoreOpener
from farm.storage.opening import open_store
from farm.sweep import sweep_points
from farm.weights import pinned
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
    warnings: tuple[Advice, ...] = ()
    others: tuple[str, ...] = ()
    """Names of the pool's further devices; they may be of other kinds."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a manifest asks of a model: its parameters, those of each sweep point, and what the card warns of."""

    params: RenderParams
    points: tuple[ParamOverrides, ...]
    warnings: tuple[Advice, ...]


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
        card = pinned(find_card(manifest.model, settings), settings=settings)
    except FarmError as exc:
        raise type(exc)(f"{document.where(('model',))}: {exc.message}") from exc
    wish = wish_of(loaded, card)
    return Request(
        manifest=manifest,
        document=document,
        card=card,
        params=wish.params,
        points=wish.points,
        numerics=numerics_for(card, device=device, renderers=renderers),
        device=device.name,
        renderers=renderers,
        open_store=partial(open_store, settings=settings),
        owner=settings.owner or "",
        warnings=wish.warnings,
        others=tuple(gpu.name for gpu in device.gpus[1:]),
    )


def wish_of(loaded: LoadedManifest, card: ModelCard) -> Wish:
    """Merge a manifest's parameters with a card's, and check them. Raises ManifestError."""
    manifest, document = loaded.manifest, loaded.document
    preset = Preset()
    if manifest.preset is not None:
        if manifest.preset not in card.presets:
            near = did_you_mean(manifest.preset, list(card.presets)) or f"; it has {', '.join(card.presets) or 'none'}"
            raise ManifestError(
                f"{document.where(('preset',))}: {card.name} has no preset {shown(manifest.preset)}{near}"
            )
        preset = card.presets[manifest.preset]
    params = _resolved(card, merged(card.defaults, preset, manifest.params), document, "params")
    try:
        points = sweep_points(manifest.sweep)
    except ManifestError as exc:
        raise ManifestError(f"{document.where(('sweep',))}: {exc.message}") from exc
    points = tuple(_resolved(card, point, document, "sweep") for point in points)
    per_row = getattr(manifest.prompts, "per_row", {})
    for point in points:
        _check_point(card, params, point, document, given_by_rows=set(per_row))
    return Wish(params, points, card_advice(card, manifest.preset, document))


def speed_of(request: Request, ledger: Ledger | None) -> Speed:
    """How fast a renderer of the pool is: where its devices differ, such that all of them side by side come to the same."""
    devices = Counter((request.device, *request.others)[: request.renderers])
    found = {device: _speed_on(device, request, ledger) for device in devices}
    known = {device: speed.seconds_per_image for device, speed in found.items() if speed.seconds_per_image is not None}
    if not known:
        return Speed(None, "unknown")
    a_second = sum(devices[device] / seconds for device, seconds in known.items())
    measured = all(speed.source == "measured" for speed in found.values())
    return Speed(sum(devices[device] for device in known) / a_second, "measured" if measured else "estimated")


def _speed_on(device: str, request: Request, ledger: Ledger | None) -> Speed:
    params, card, kind = request.params, request.card, request.numerics.device
    profile = ledger.profile(card.name, device, card.accelerated_on(kind)) if ledger else None
    if profile is not None:
        then = (profile.width, profile.height, profile.num_inference_steps)
        alike = then == (params.width, params.height, params.num_inference_steps)
        if alike and request.points == (ParamOverrides(),) and profile.is_of(speed_identity(card, request.numerics)):
            return Speed(profile.seconds_per_image, "measured")
        each = [profile.seconds_of(merged(params, point)) for point in request.points]
        return Speed(statistics.fmean(each), "estimated")
    if kind in card.seconds_per_image:
        base = card.defaults.width * card.defaults.height * card.defaults.num_inference_steps
        return Speed(card.seconds_per_image[kind] * mean_work(params, request.points) / base, "estimated")
    return Speed(None, "unknown")


@contextmanager
def placed(document: Document) -> Iterator[None]:
    """Have faults of a manifest's prompts name its file and line."""
    try:
        yield
    except (ManifestError, PromptError) as exc:
        key = tuple(exc.message.partition(":")[0].split("."))
        if key[0] != "prompts":
            raise
        raise type(exc)(f"{document.where(key)}: {exc.message}") from exc


def card_advice(card: ModelCard, preset: str | None = None, document: Document | None = None) -> tuple[Advice, ...]:
    """What the card says to whoever renders with it, and with one of its presets; `document`: the manifest that does."""

    def where(key: str) -> str:
        return document.where((key,)) if document else ""

    found = []
    if card.licence_warning is not None:
        found.append(Advice("licence", f"{card.name} is under {card.licence}: {card.licence_warning}", where("model")))
    said = card.presets[preset].warning if preset in card.presets else None
    if said is not None:
        found.append(Advice("preset", f"preset {preset} of {card.name}: {said}", where("preset")))
    return tuple(found)


def _resolved(card: ModelCard, params: AnyOverrides, document: Document, section: str) -> AnyOverrides:
    try:
        return resolved(card, params)
    except ManifestError as exc:
        raise ManifestError(f"{document.where((section, 'negative_prompt'))}: {section}.{exc.message}") from exc


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
