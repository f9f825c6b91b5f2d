"""Schedulers by name: the source's noise levels, another way from one to the next."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler

from farm.cardparts import Scheduler
from farm.errors import ModelCardError
from farm.models.qwen import QwenFamily
from farm.models.schedulers import load_scheduler
from tests.drawing import card, numerics, spec
from tests.tiny_qwen import write_tiny_qwen

SIGMAS = [1.0, 0.75, 0.5, 0.25]
SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    FlowMatchEulerDiscreteScheduler(**SHIFT).save_pretrained(folder / "scheduler")
    return folder


def make(folder: Path, name: str, **options: Any) -> Any:
    return load_scheduler(card(folder, scheduler=Scheduler(name=name, options=options)), folder)()


def stock() -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFT)
    scheduler.set_timesteps(sigmas=SIGMAS, mu=0.8)
    return scheduler


def solved(scheduler: Any, sigmas: list[float], mu: float) -> float:
    """Go from 1 along dx/dsigma = x, whose value at sigma 0 is 1/e times that at sigma 1."""
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    scheduler.set_begin_index(0)
    x = torch.ones(1, 1)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, return_dict=False)[0]
    return float(x)


def test_without_a_scheduler_the_sources_own_is_made_anew_each_time(folder: Path) -> None:
    make_own = load_scheduler(card(folder), folder)
    first, second = make_own(), make_own()
    assert type(first) is FlowMatchEulerDiscreteScheduler
    assert first is not second
    assert first.config.shift_terminal == 0.02


@pytest.mark.parametrize("name", ["flow-euler", "flow-heun", "flow-dpm++", "flow-unipc"])
def test_all_schedulers_go_through_the_sources_noise_levels(folder: Path, name: str) -> None:
    scheduler, levels = make(folder, name), stock()
    scheduler.set_timesteps(sigmas=SIGMAS, mu=0.8)
    own = sorted({round(float(sigma), 4) for sigma in scheduler.sigmas}, reverse=True)
    assert own == pytest.approx([round(float(sigma), 4) for sigma in levels.sigmas])
    assert sorted({float(t) for t in scheduler.timesteps}) == pytest.approx(sorted(levels.timesteps.tolist()))
    assert len(scheduler.timesteps) == (7 if name == "flow-heun" else 4)
    assert scheduler.config.base_shift == 0.5


def test_higher_orders_come_nearer_with_the_same_levels(folder: Path) -> None:
    sigmas = [1 - i / 16 for i in range(16)]
    wrong = {
        name: abs(solved(make(folder, name, use_dynamic_shifting=False, shift_terminal=None), sigmas, 0.0) - 0.3679)
        for name in ("flow-euler", "flow-heun", "flow-dpm++", "flow-unipc")
    }
    assert wrong["flow-euler"] > 0.009
    assert all(wrong[name] < 0.004 for name in ("flow-heun", "flow-dpm++", "flow-unipc")), wrong


def test_options_set_up_levels_and_solver(folder: Path) -> None:
    scheduler = make(folder, "flow-dpm++", shift=3.0, use_dynamic_shifting=False, shift_terminal=None, solver_order=3)
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.8)
    assert float(scheduler.sigmas[1]) == pytest.approx(0.75)
    assert scheduler._solver.config.solver_order == 3


@pytest.mark.parametrize("option", ["stochastic_sampling", "algorithm_type", "sigmas_of_my_own"])
def test_an_option_that_is_unknown_or_draws_noise_is_refused(folder: Path, option: str) -> None:
    with pytest.raises(ModelCardError) as caught:
        make(folder, "flow-euler", **{option: True})
    assert caught.value.message.startswith(
        f"model sketch: scheduler flow-euler has no option {option}; it has base_image_seq_len, base_shift, "
    )


def test_options_that_do_not_work_are_told_before_anything_is_drawn(folder: Path) -> None:
    with pytest.raises(ModelCardError, match=r"flow-unipc does not take its options \(solver_type: nonsense\)"):
        make(folder, "flow-unipc", solver_type="nonsense")
    with pytest.raises(ModelCardError, match=r"flow-euler does not take its options \(time_shift_type: cubic\)"):
        make(folder, "flow-euler", time_shift_type="cubic")


def test_a_source_without_a_flow_matching_scheduler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelCardError, match="scheduler cannot be loaded"):
        load_scheduler(card(tmp_path), tmp_path)
    PNDMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ModelCardError, match="scheduler has a PNDMScheduler, and schedulers by name go by"):
        load_scheduler(card(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "forwards"), [("flow-heun", 5), ("flow-dpm++", 3), ("flow-unipc", 3)], ids=["heun", "dpm++", "unipc"]
)
def test_a_family_draws_with_the_cards_scheduler(tmp_path: Path, name: str, forwards: int) -> None:
    folder = write_tiny_qwen(tmp_path)

    def draw(**changes: Any) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        family = QwenFamily(card(folder, family="qwen-image", **changes), numerics(), device="cpu", vram_gib=16.0)
        family.load()
        specs, steps = [spec(0, guidance_scale=1.0)], list[tuple[int, int]]()
        latents = family.denoise(
            specs,
            family.noise(specs),
            positive=[family.encode(family.tokenize("a red circle"))],
            negative=[],
            on_step=lambda step, of: steps.append((step, of)),
        )
        return latents, steps

    plain, _ = draw()
    other, steps = draw(scheduler=Scheduler(name=name))
    assert steps == [(i + 1, forwards) for i in range(forwards)]
    assert bool(torch.isfinite(other).all())
    assert 1e-4 < float((other - plain).abs().max()) < 3.0
