"""Numerics of a new plan follow from the card and the machine."""

from importlib.metadata import PackageNotFoundError, version
from typing import Literal, get_args

import pytest

from farm import versions
from farm.cardparts import Acceleration, Adapter, Attention, Denoiser
from farm.comparison import numerics_differences
from farm.devices import (
    DeviceInfo,
    Gpu,
    HostMemory,
    default_renderers,
    gpu_of,
    host_memory,
    local_device,
    numerics_for,
    renderers_on,
)
from farm.engine import check_numerics
from farm.errors import NumericsError, PlacementError
from farm.versions import KERNELS, PACKAGES, versions_for
from tests.unit.finished_jobs import CARD

T4 = Gpu("GPU-1", "Tesla T4", 16 * 2**30, (7, 5))
A4000 = Gpu("GPU-2", "RTX A4000", 16 * 2**30, (8, 6))


def on(*gpus: Gpu) -> DeviceInfo:
    return DeviceInfo("cuda" if gpus else "cpu", gpus[0].name if gpus else "CPU", gpus, cores=8)


def test_cpu_renderers_share_the_cores():
    assert numerics_for(CARD, device=on(), renderers=2).threads == 4
    assert numerics_for(CARD, device=on(), renderers=100).threads == 1
    frugal = CARD.model_copy(update={"cpu_threads": 1})
    assert numerics_for(frugal, device=on(), renderers=2).threads == 1


def test_a_gpu_without_native_bfloat16_is_refused_a_model_that_is_sound_in_nothing_else():
    card = CARD.model_copy(update={"dtypes": {"cuda": ("bfloat16",)}})
    assert numerics_for(card, device=on(A4000), renderers=1).dtype == "bfloat16"
    with pytest.raises(PlacementError, match=r"cannot be rendered on Tesla T4.*capability 8\.0"):
        numerics_for(card, device=on(T4), renderers=1)


def test_a_pool_with_one_old_gpu_falls_back_to_a_dtype_that_all_can_do():
    card = CARD.model_copy(update={"dtypes": {"cuda": ("bfloat16", "float32")}, "batch": {"cuda": 2}})
    assert numerics_for(card, device=on(A4000, T4), renderers=2).dtype == "float32"


def test_an_old_gpu_among_others_keeps_no_model_from_them():
    card = CARD.model_copy(update={"dtypes": {"cuda": ("bfloat16",)}, "batch": {"cuda": 2}})
    assert numerics_for(card, device=on(A4000, T4), renderers=2).dtype == "bfloat16"


def test_a_gpu_goes_by_its_number_or_its_uuid():
    machine = on(T4, A4000)
    assert gpu_of(machine, "1") == gpu_of(machine, A4000.uuid) == A4000
    assert [gpu_of(machine, name) for name in ("2", "GPU-none", None)] == [None] * 3
    assert gpu_of(on(), "0") is None


def test_one_renderer_a_gpu_and_one_for_every_two_cores_without():
    assert default_renderers(on(T4, A4000)) == 2
    assert default_renderers(on()) == 4
    assert default_renderers(DeviceInfo("cpu", "CPU", (), cores=1)) == 1
    assert default_renderers(DeviceInfo("cpu", "CPU", (), cores=2)) == 1
    assert default_renderers(DeviceInfo("cpu", "CPU", (), cores=2), stays=True) == 2
    assert default_renderers(DeviceInfo("cpu", "CPU", (), cores=64), stays=True) == 4
    assert default_renderers(on(T4, A4000), stays=True) == 2


def test_versions_of_all_that_decides_bytes_are_part_of_the_numerics():
    here = numerics_for(CARD, device=on(), renderers=1)
    assert sorted(here.versions) == ["diffusers", "farm-sleep", "pillow", "tokenizers", "torch", "transformers"]
    check_numerics(here, device="cpu")
    other = here.model_copy(update={"versions": here.versions | {"pillow": "1.0"}})
    with pytest.raises(NumericsError, match=r"made with pillow 1\.0, .* install pillow==1\.0 to go on"):
        check_numerics(other, device="cpu")
    assert numerics_differences(other, here) == (f"pillow: 1.0 -> {here.versions['pillow']}",)


def uses(*, device: Literal["cuda", "cpu"] = "cuda", **changes: object) -> set[str]:
    return set(versions_for(CARD.model_copy(update=changes), device)) - {*PACKAGES, "farm-sleep"}


def test_packages_that_not_every_card_uses_count_where_it_does(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("farm.versions.version", lambda package: "1.0")
    assert uses() == set()
    assert uses(quantise={"encoder": "nf4"}) == {"bitsandbytes"}
    assert uses(quantise={"encoder": "nf4"}, device="cpu") == set()
    for device in ("cuda", "cpu"):
        assert uses(denoiser=Denoiser(path=".", file="a.gguf", format="gguf"), device=device) == {"gguf"}
        assert uses(denoiser=Denoiser(path=".", file="a.safetensors", format="safetensors"), device=device) == set()
        assert uses(adapters=(Adapter(name="style", path=".", file="style.safetensors"),), device=device) == {"peft"}
    flash = {"cuda": Acceleration(attention="flash")}
    assert uses(acceleration=flash) == {"flash-attn"}
    assert uses(acceleration=flash, device="cpu") == set()


def test_every_kernel_is_of_torch_or_of_a_package_that_is_known():
    kernels = set(get_args(Attention))
    assert set(KERNELS) == {name for name in kernels if "native" not in name}


def test_a_plan_leaves_out_what_its_planner_lacks(monkeypatch: pytest.MonkeyPatch):
    def here(package: str) -> str:
        if package == "peft":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr("farm.versions.version", here)
    card = CARD.model_copy(update={"adapters": (Adapter(name="style", path=".", file="style.safetensors"),)})
    lacking = numerics_for(card, device=on(), renderers=1)
    assert "peft" not in lacking.versions
    monkeypatch.setattr("farm.versions.version", lambda package: "1.0")
    check_numerics(lacking, device="cpu")
    assert numerics_differences(lacking, numerics_for(card, device=on(), renderers=1)) == ()


def test_a_farm_that_computes_a_family_otherwise_refuses_plans_of_before(monkeypatch: pytest.MonkeyPatch):
    before = numerics_for(CARD, device=on(), renderers=1)
    assert before.versions["farm-sleep"] == "1"
    monkeypatch.setitem(versions._OWN, "farm-sleep", "2")
    with pytest.raises(NumericsError, match=r"revision 1 of farm-sleep, .* has 2; go on with this run with the farm"):
        check_numerics(before, device="cpu")
    older = before.model_copy(update={"versions": {name: version(name) for name in PACKAGES}})
    check_numerics(older, device="cpu")


def test_this_machine_can_be_looked_at():
    device = local_device()
    assert device.cores >= 1
    assert device.kind in ("cpu", "cuda")


def test_a_containers_limit_is_the_memory_that_there_is(tmp_path):
    def cgroup(**files: str) -> HostMemory:
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)
        return host_memory(tmp_path)

    whole = host_memory(tmp_path)
    assert 0 < whole.free_bytes <= whole.total_bytes
    assert cgroup(max="max\n").total_bytes == whole.total_bytes
    held = cgroup(max="1000000\n", current="700000\n", stat="anon 500000\ninactive_file 200000\n")
    assert held == HostMemory(1_000_000, 500_000)
    assert cgroup(current="2000000\n").free_bytes == 0


def test_renderers_of_a_machine_are_its_gpus_or_share_its_cores():
    assert renderers_on(on(T4, A4000), 1) == 2
    assert [renderers_on(on(), cores) for cores in (1, 2, 8, 16)] == [8, 4, 1, 1]
    assert [renderers_on(on(T4, A4000), 1, most=most) for most in (1, 2, 9)] == [1, 2, 2]
