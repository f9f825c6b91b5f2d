"""How a NewBie batch is drawn: which noise there is at each step, when guidance applies, and how its two halves are joined.

At the published values, which a card's `options` may change.
"""

from dataclasses import dataclass
from typing import Any

import torch

from farm.errors import ModelCardError
from farm.modelcard import ModelCard
from farm.models.newbie_text import SYSTEM_PROMPT


@dataclass(frozen=True, slots=True)
class Recipe:
    """A card's `options`, at the published values where left out.

    `shift`: how far the even grid of noise is bent towards noise. `cfg_truncation`: guidance applies while the time, 0 for noise
    and 1 for the picture, is below it. `cfg_renormalisation`: the guided prediction's norm, over a whole sample, is at most so
    many times the conditional one's; 0 leaves it as it is. `system_prompt`: what Gemma reads before each prompt.
    """

    shift: float = 6.0
    cfg_truncation: float = 1.0
    cfg_renormalisation: float = 1.0
    system_prompt: str = SYSTEM_PROMPT

    def sigmas(self, steps: int) -> list[float]:
        """Return how much noise there is before each step, and after the last: from 1 to 0."""
        even = [1 - step / steps for step in range(steps + 1)]
        return [self.shift * sigma / (1 + (self.shift - 1) * sigma) for sigma in even]

    def guided(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """Join the two predictions, batch x channels x height x width."""
        guided = unconditional + scale * (conditional - unconditional)
        if self.cfg_renormalisation > 0:
            norm = torch.linalg.vector_norm(guided, dim=(1, 2, 3), keepdim=True)
            most = torch.linalg.vector_norm(conditional, dim=(1, 2, 3), keepdim=True) * self.cfg_renormalisation
            guided = guided * torch.where(norm > most, most / norm, 1.0)
        return guided


def recipe_of(card: ModelCard) -> Recipe:
    """Read a card's options. Raises ModelCardError for a number out of bounds."""
    options: dict[str, Any] = {name: card.options[name] for name in Recipe.__dataclass_fields__ if name in card.options}
    recipe = Recipe(**options)
    if recipe.shift <= 0:
        raise ModelCardError(f"model {card.name}: options: shift must be above 0, got {recipe.shift}; mend the card")
    for name in ("cfg_truncation", "cfg_renormalisation"):
        value = getattr(recipe, name)
        if value < 0:
            raise ModelCardError(f"model {card.name}: options: {name} must be 0 or more, got {value}; mend the card")
    return recipe
