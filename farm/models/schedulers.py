"""How a denoising step is taken: the source's own scheduler, or another solver over the same noise levels.

Noise levels (sigmas) always come from the source's FlowMatchEulerDiscreteScheduler, with its shift by picture size, as the
pipelines call it; a solver changes how one gets from a level to the next. None draws noise of its own: an image follows from
its seed.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from farm.errors import ModelCardError
from farm.modelcard import ModelCard
from farm.models.loading import load_part

LEVEL_OPTIONS = frozenset(inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters) - {
    "self",
    "num_train_timesteps",
    "invert_sigmas",
    "stochastic_sampling",
}
"""Options of the noise levels; every scheduler has them. Left out: what is the model's own, and what draws noise."""
SOLVER_OPTIONS = {
    "flow-euler": frozenset[str](),
    "flow-heun": frozenset[str](),
    "flow-dpm++": frozenset({"solver_order", "solver_type", "lower_order_final", "euler_at_final"}),
    "flow-unipc": frozenset({"solver_order", "solver_type", "lower_order_final", "predict_x0"}),
}
LARGEST_SIGMA = 1 - 1e-6
"""Multistep solvers take the logarithm of 1 - sigma."""


def load_scheduler(card: ModelCard, folder: Path) -> Callable[[], Any]:
    """Return what makes a new scheduler of a card, as each drawing needs its own.

    Raises ModelCardError for a source that has no flow-matching scheduler, and for options that are not known or do not work.
    """
    own: dict[str, Any] = load_part(
        card,
        folder,
        "scheduler",
        lambda: FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler", local_files_only=True),
    )
    if (kind := own.get("_class_name")) != FlowMatchEulerDiscreteScheduler.__name__:
        raise ModelCardError(
            f"model {card.name}: {folder / 'scheduler'} has a {kind}, and schedulers by name go by the noise levels of a "
            f"FlowMatchEulerDiscreteScheduler; take `scheduler` out of the card, or mend the folder"
        )
    wanted = card.scheduler
    if wanted is None:
        return lambda: FlowMatchEulerDiscreteScheduler.from_config(own)
    known = LEVEL_OPTIONS | SOLVER_OPTIONS[wanted.name]
    unknown = sorted(set(wanted.options) - known)
    if unknown:
        raise ModelCardError(
            f"model {card.name}: scheduler {wanted.name} has no option {unknown[0]}; it has {', '.join(sorted(known))}"
        )

    def make() -> Any:
        return _make(own, wanted.name, wanted.options)

    try:
        make().set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
    except (ValueError, TypeError, NotImplementedError, ImportError, AttributeError) as exc:
        given = ", ".join(f"{name}: {value}" for name, value in wanted.options.items())
        raise ModelCardError(
            f"model {card.name}: scheduler {wanted.name} does not take its options ({given}): {exc}; mend the card"
        ) from exc
    return make


def _make(config: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    mine = {key: value for key, value in options.items() if key in SOLVER_OPTIONS[name]}
    levels = FlowMatchEulerDiscreteScheduler.from_config(
        config, **{key: value for key, value in options.items() if key not in mine}
    )
    if name == "flow-euler":
        return levels
    if name == "flow-heun":
        return HeunSolver(levels)
    flow = {
        "num_train_timesteps": levels.config.num_train_timesteps,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    kind = DPMSolverMultistepScheduler if name == "flow-dpm++" else UniPCMultistepScheduler
    return MultistepSolver(levels, lambda: kind(**flow, **mine))


class _Solver(ABC):
    """Takes the steps of `solver` over the noise levels of `levels`, whose configuration the pipelines ask for."""

    def __init__(self, levels: FlowMatchEulerDiscreteScheduler, solver: Any):
        self.config = levels.config
        self.order: int = solver.order
        self._levels = levels
        self._solver = solver

    @property
    def timesteps(self) -> torch.Tensor:
        """One for each forward of the denoiser."""
        timesteps: torch.Tensor = self._solver.timesteps
        return timesteps

    @property
    def sigmas(self) -> torch.Tensor:
        """The noise levels, the last one 0."""
        sigmas: torch.Tensor = self._solver.sigmas
        return sigmas

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Start a drawing; arguments as the stock scheduler's."""
        self._levels.set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        self._begin(len(self._levels.timesteps), device)

    @abstractmethod
    def _begin(self, steps: int, device: Any) -> None:
        """Have the solver go over the levels that were just set."""

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say where a drawing starts, so that nobody has to look for it."""
        self._solver.set_begin_index(begin_index)

    def step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True) -> Any:
        """Go one step on from `sample`, computed in float32."""
        moved = self._solver.step(output.float(), timestep, sample.float(), return_dict=False)[0].to(output.dtype)
        return {"prev_sample": moved} if return_dict else (moved,)


class HeunSolver(_Solver):
    """Heun's method: two forwards a step but for the last, n steps make 2n - 1."""

    def __init__(self, levels: FlowMatchEulerDiscreteScheduler):
        solver = FlowMatchHeunDiscreteScheduler(num_train_timesteps=levels.config.num_train_timesteps)
        super().__init__(levels, solver)

    def _begin(self, steps: int, device: Any) -> None:
        self._solver.set_timesteps(steps, device=device)
        times, sigmas = self._levels.timesteps, self._levels.sigmas
        self._solver.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])
        self._solver.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])


class MultistepSolver(_Solver):
    """DPM-Solver++ or UniPC: one forward a step, and what the last ones said. Each drawing has a new solver."""

    def __init__(self, levels: FlowMatchEulerDiscreteScheduler, make: Callable[[], Any]):
        super().__init__(levels, make())
        self._make = make

    def _begin(self, steps: int, device: Any) -> None:
        self._solver = self._make()
        self._solver.num_inference_steps = steps
        self._solver.timesteps = self._levels.timesteps
        self._solver.sigmas = self._levels.sigmas.clamp(max=LARGEST_SIGMA).to("cpu")
