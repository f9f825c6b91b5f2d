"""What is known against a manifest before it is rendered: of its card, and of its prompts, with the place of each."""

from farm.lint import Advice, lint_prompt
from farm.modelcard import ModelCard
from farm.request import Request
from farm.samples import Samples
from farm.yamlfile import Document


def advice_on(request: Request, samples: Samples) -> tuple[Advice, ...]:
    """Return all advice on a request."""
    return request.warnings + prompt_advice(samples, card=request.card, document=request.document)


def prompt_advice(samples: Samples, *, card: ModelCard, document: Document) -> tuple[Advice, ...]:
    """Return the advice on prompts, each with file, line and number; first of all how many were looked at, where not all."""
    found = []
    for sample in samples.prompts:
        place = sample.where or document.where(("prompts", sample.row))
        for one in lint_prompt(sample.prompt, family=card.family, max_tokens=card.max_sequence_length):
            inside = f", {one.where}" if one.where else ""
            found.append(Advice(one.code, one.text, f"{place}: prompt {sample.row + 1}{inside}"))
    if found and not samples.whole:
        looks = f"only the first {len(samples.prompts):,} different prompts were looked at"
        found.insert(0, Advice("looked_at", looks, document.where(("prompts",))))
    return tuple(found)
