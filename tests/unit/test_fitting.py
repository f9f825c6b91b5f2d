"""How a planned model would lie on the devices of a pool."""

from pathlib import Path
from typing import Any

import pytest

from farm import placement
from farm.cardparts import SizeLimits
from farm.devices import DeviceInfo, Gpu, HostMemory
from farm.errors import SettingsError
from farm.fitting import Fit, asked_device, fits
from farm.modelcard import ModelCard
from farm.needs import GIB
from farm.plan import drawing_identity
from farm.records import WorkingMemory
from farm.settings import Settings
from tests.drawing import card, numerics
from tests.unit.test_needs import PARAMS, profile_with
from tests.unit.test_tensorfiles import write_safetensors

HERE = DeviceInfo("cpu", "CPU, 8 cores", (), 8)
WITH_GPU = DeviceInfo("cuda", "A4000", (Gpu("u", "A4000", 16 * GIB, (8, 6)),), 8)


@pytest.fixture
def model(tmp_path: Path) -> ModelCard:
    """An encoder of 1.5 MiB, a denoiser of 1 MiB and a tiny decoder, in bfloat16."""
    shapes = {
        "text_encoder": {"layers.0.w": (512, 512), "layers.1.w": (512, 512), "layers.2.w": (512, 512)},
        "transformer": {"layers.0.w": (1024, 512)},
        "vae": {"w": (8, 8)},
    }
    for name, tensors in shapes.items():
        write_safetensors(tmp_path / name / "model.safetensors", tensors)
        (tmp_path / name / "config.json").write_text("{}")
    limits = SizeLimits(max_pixels=2**20)
    return card(tmp_path, defaults=PARAMS, limits=limits, dtypes={"cuda": ("bfloat16",)}, batch={"cuda": 1})


def pool(*gib: float) -> DeviceInfo:
    return asked_device([f"card of {size:g}:{size}" for size in gib], vram_gib=None, here=HERE)


def found(model: ModelCard, device: DeviceInfo, *, host: HostMemory | None = None, **settings: Any) -> tuple[Fit, ...]:
    fitting = fits(
        model,
        numerics(device=device.kind, dtype="bfloat16", batch=1),
        device=device,
        settings=Settings(**settings),
        host=host,
    )
    assert fitting is not None
    return fitting


@pytest.mark.parametrize(
    ("name", "is_old"),
    [
        ("Tesla T4", True),
        ("NVIDIA GeForce RTX 2080 Ti", True),
        ("Quadro RTX 6000", True),
        ("TITAN V", True),
        ("Tesla P4", True),
        ("Tesla K80", True),
        ("T1000", True),
        ("NVIDIA RTX 2000 Ada Generation", False),
        ("RTX A4000", False),
        ("NVIDIA L4", False),
        ("RTX 4060 Ti", False),
        ("H200", False),
    ],
)
def test_old_gpus_are_known_by_their_whole_names(name: str, is_old: bool) -> None:
    (gpu,) = asked_device([f"{name}:16"], vram_gib=None, here=HERE).gpus
    assert (gpu.capability < (8, 0)) is is_old


def test_what_was_measured_on_a_device_decides_there(model: ModelCard) -> None:
    given = numerics(device="cuda", dtype="bfloat16", batch=1)
    working = WorkingMemory(encode_gib=0.1, step_gib=20.0, decode_gib=1.0, identity=drawing_identity(model, given))
    profiles = {"card of 16": profile_with(working)}
    fitting = fits(
        model, given, device=pool(15, 16, 24), settings=Settings(vram_gib=24), host=None, profile=profiles.get
    )
    assert fitting is not None
    by_name = {one.device: one for one in fitting}
    assert by_name["card of 16"].placement is None
    for other in ("card of 15", "card of 24"):
        placement = by_name[other].placement
        assert placement is not None
        assert "as measured" not in placement.explained
    profiles = {"card of 24": profile_with(working)}
    fitting = fits(model, given, device=pool(24), settings=Settings(vram_gib=24), host=None, profile=profiles.get)
    assert fitting is not None
    assert fitting[0].placement is not None
    assert "20.0 of 23.0 GiB as measured" in fitting[0].placement.explained


def test_each_kind_of_device_of_a_pool_is_told_and_which_cannot_draw_it(model: ModelCard) -> None:
    first, second = found(model, pool(2, 16, 16))
    assert (first.device, first.count, first.placement) == ("card of 2", 1, None)
    assert first.refusal is not None
    assert first.refusal.startswith("model sketch does not fit card of 2: its largest phase needs 1.5 GiB")
    assert (second.device, second.count) == ("card of 16", 2)
    assert second.placement is not None
    assert second.placement.layout == "resident"


def test_cards_that_let_urgent_images_in_sooner_are_named(model: ModelCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "CONTEXT_GIB", 0.0)
    monkeypatch.setattr(placement, "SLACK_GIB", 0.0)
    weights = 2.5 * 2**20 / GIB
    usable = weights + 1.5205  # the encoder of 1.5 MiB is not wholly in the way of a decode of 1.52 GiB
    (fit,) = found(model, pool(usable - 0.0015), vram_gib=16.0)
    assert fit.placement is not None
    assert (fit.placement.layout, fit.placement.within) == ("phased", "encoded")
    assert [(change, placed.within) for change, placed in fit.sooner] == [
        ("quantise: {encoder: nf4}", "anything"),
        ("options: {encoder_on: cpu}", "anything"),
    ]


def test_the_nodes_memory_counts_where_it_is_known(model: ModelCard) -> None:
    (fit,) = found(model, WITH_GPU, host=HostMemory(64 * GIB, 32 * GIB))
    assert fit.placement is not None
    assert fit.placement.host_gib == pytest.approx(2.5 / 1024, rel=0.01)
    cpu = model.model_copy(update={"dtypes": {"cpu": ("bfloat16",)}})
    (fit,) = found(cpu, HERE, host=HostMemory(2**20, 2**20))
    assert "in main memory for each renderer" in (fit.refusal or "")


def test_the_nodes_memory_is_shared_by_as_many_renderers_as_are_started(model: ModelCard) -> None:
    cpu = model.model_copy(update={"dtypes": {"cpu": ("bfloat16",)}})
    memory = HostMemory(8 * 2**20, 8 * 2**20)  # 6.8 MiB for weights, 2.5 MiB each
    (four,) = found(cpu, HERE, host=memory)
    assert (four.refusal or "").endswith("start 2 with FARM_RENDERERS=2")
    (two,) = found(cpu, HERE, host=memory, renderers=2)
    assert two.placement is not None
    roomy, small = HostMemory(11 * 2**20, 11 * 2**20), pool(16, 16, 16, 16)
    (all_gpus,) = found(model, small, host=roomy, vram_gib=16.0)
    (fewer,) = found(model, small, host=roomy, renderers=3)
    (no_more,) = found(model, small, host=roomy, renderers=9)
    kept = [fit.placement.host_gib > 0 for fit in (all_gpus, fewer, no_more) if fit.placement]
    assert kept == [False, True, False]


def test_weights_that_are_not_here_are_not_fetched(tmp_path: Path) -> None:
    away = card(tmp_path / "nowhere")
    assert fits(away, numerics(), device=HERE, settings=Settings(), host=None) is None


def test_a_device_that_is_not_here_is_asked_about_by_name_and_memory() -> None:
    asked = asked_device(["RTX 4060 Ti:16", "Tesla T4:15"], vram_gib=None, here=HERE)
    assert (asked.kind, asked.name, asked.cores) == ("cuda", "RTX 4060 Ti", 8)
    assert [(gpu.name, gpu.memory_bytes // GIB, gpu.capability) for gpu in asked.gpus] == [
        ("RTX 4060 Ti", 16, (8, 0)),
        ("Tesla T4", 15, (7, 5)),
    ]
    assert asked_device([], vram_gib=None, here=HERE) is HERE
    assert asked_device([], vram_gib=12, here=WITH_GPU) is WITH_GPU
    (gpu,) = asked_device([], vram_gib=12, here=HERE).gpus
    assert (gpu.name, gpu.memory_bytes) == ("GPU of 12 GiB", 12 * GIB)


@pytest.mark.parametrize("wrong", ["RTX 4060", "RTX:", ":16", "RTX:many", "RTX:-1", "RTX:nan"])
def test_a_device_without_a_name_or_memory_is_refused(wrong: str) -> None:
    with pytest.raises(SettingsError, match="write its name and its memory in GiB, as --device 'RTX 4060 Ti:16'"):
        asked_device([wrong], vram_gib=None, here=HERE)
