"""How a planned model would lie on each device of a pool, before anything is loaded; and what would let urgent images in sooner.

Reads headers of weights that are on this machine, and asks no network. Imports no torch.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from farm.devices import DeviceInfo, Gpu, HostMemory, default_renderers
from farm.errors import PlacementError, SettingsError
from farm.families import FAMILIES
from farm.modelcard import ModelCard
from farm.needs import GIB, files_of, measured_of, needs_of
from farm.placement import DeviceLimits, Placement, Within, place
from farm.plan import Numerics, speed_identity
from farm.records import Profile, Stages
from farm.settings import Settings
from farm.weights import are_here, locate
from farm.yamlfile import shown

SOONER: dict[Within, int] = {"nothing": 0, "encoded": 1, "anything": 2}
OLDER = (
    (re.compile(r"\b(T4G?|T1000|T1200|T[456]00|RTX 20[678]0|QUADRO RTX|TITAN RTX|GTX)\b"), (7, 5)),
    (re.compile(r"\b(V100S?|TITAN V|GV100)\b"), (7, 0)),
    (re.compile(r"\b(P100|P40|P4|P6|TITAN XP?|M40|M60|M10|K80|K40)\b"), (6, 1)),
)
"""Names of GPUs that only emulate bfloat16, or do not even that, and the compute capability that they have at most; others count
as 8.0 and newer."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model lies on one kind of device, or why it cannot. `sooner`: changes of the card with which urgent images wait
    less, each with its placement; they change pixels, so nobody makes them unasked. `stages`: as measured there."""

    device: str
    count: int
    placement: Placement | None
    refusal: str | None = None
    sooner: tuple[tuple[str, Placement], ...] = ()
    stages: Stages | None = None


def asked_device(names: Sequence[str], *, vram_gib: float | None, here: DeviceInfo) -> DeviceInfo:
    """Return the pool that somebody asks about, each device as NAME:GIB; this machine where none is named.

    With a budget alone, and no GPU here, a GPU of that size is meant. Raises SettingsError.
    """
    if not names and (vram_gib is None or here.gpus):
        return here
    gpus = []
    for name in names or (f"GPU of {vram_gib:g} GiB:{vram_gib}",):
        title, colon, size = name.rpartition(":")
        try:
            gib = float(size)
        except ValueError:
            gib = 0.0
        if not (colon and title.strip() and title.isprintable() and 0 < gib < 10_000):
            said = name if name.isprintable() else shown(name)
            raise SettingsError(f"--device {said}: write its name and its memory in GiB, as --device 'RTX 4060 Ti:16'")
        upper = title.upper()
        capability = next((older for names, older in OLDER if names.search(upper)), (8, 0))
        gpus.append(Gpu("", title.strip(), int(gib * GIB), capability))
    return DeviceInfo("cuda", gpus[0].name, tuple(gpus), here.cores)


def fits(
    card: ModelCard,
    numerics: Numerics,
    *,
    device: DeviceInfo,
    settings: Settings,
    host: HostMemory | None,
    profile: Callable[[str], Profile | None] = lambda device: None,
) -> tuple[Fit, ...] | None:
    """Return how a model lies on each kind of device, None where its weights are not on this machine yet.

    It is what the engine will do: room for a batch at the card's defaults, and for a decode at its limits.

    `host`: memory of the devices' node, None where nobody knows it. `profile`: what was measured on a device of that
    name. Raises ModelCardError for broken weights.
    """
    if not are_here(card, settings=settings):
        return None
    found: dict[DeviceLimits, int] = {}
    for limits in _limits(device, settings, host):
        found[limits] = found.get(limits, 0) + 1
    return tuple(
        _fit(card, numerics, limits=limits, count=count, settings=settings, profile=profile(limits.name))
        for limits, count in found.items()
    )


def _limits(device: DeviceInfo, settings: Settings, host: HostMemory | None) -> Iterator[DeviceLimits]:
    host_gib, vram_gib = None if host is None else host.total_bytes / GIB, settings.vram_gib
    renderers = settings.renderers or default_renderers(device)
    if not device.gpus:
        renderers = min(renderers, max(1, device.cores))
        yield DeviceLimits("cpu", device.name, vram_gib, host_gib=host_gib, renderers=renderers)
    for gpu in device.gpus:
        yield DeviceLimits(
            "cuda",
            gpu.name,
            vram_gib,
            gpu.memory_bytes / GIB,
            gpu.capability,
            host_gib,
            min(renderers, len(device.gpus)),
        )


def _fit(
    card: ModelCard,
    numerics: Numerics,
    *,
    limits: DeviceLimits,
    count: int,
    settings: Settings,
    profile: Profile | None,
) -> Fit:
    def placed(card: ModelCard) -> Placement:
        needs = needs_of(
            card,
            locate(card, settings=settings),
            dtype=numerics.dtype,
            batch=numerics.batch,
            files=files_of(card, settings=settings),
            device=limits.kind,
            measured=measured_of(profile, card, numerics),
        )
        return place(card.name, needs, dtype=numerics.dtype, device=limits)

    try:
        placement = placed(card)
    except PlacementError as exc:
        return Fit(limits.name, count, None, exc.message)
    sooner = []
    for change, other in _variants(card) if limits.kind == "cuda" else ():
        try:
            changed = placed(other)
        except PlacementError:
            continue
        if SOONER[changed.within] > SOONER[placement.within]:
            sooner.append((change, changed))
    stages = profile.stages if profile and profile.is_of(speed_identity(card, numerics)) else None
    return Fit(limits.name, count, placement, sooner=tuple(sooner), stages=stages)


def _variants(card: ModelCard) -> Iterator[tuple[str, ModelCard]]:
    """Cards that differ in how prompts are encoded, and what to write for each."""
    takes = FAMILIES[card.family]
    if "encoder" in takes.quantise and "encoder" not in card.quantise:
        quantised = {**card.quantise, "encoder": "nf4"}
        yield "quantise: {encoder: nf4}", card.model_copy(update={"quantise": quantised})
    if "encoder_on" in takes.options and "encoder_on" not in card.options:
        on_cpu = {**card.options, "encoder_on": "cpu"}
        yield "options: {encoder_on: cpu}", card.model_copy(update={"options": on_cpu})
