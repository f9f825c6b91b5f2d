"""Warnings as answers carry them."""

from collections.abc import Iterable

from pydantic import BaseModel, Field

from farm.lint import Advice


class Warned(BaseModel):
    """Something to know of what was asked for, which was done all the same."""

    code: str = Field(description="stable")
    text: str
    where: str = Field(description="the prompt, its element or the manifest's line; may be empty")


def warned(advice: Iterable[Advice]) -> tuple[Warned, ...]:
    """Return advice as answers carry it."""
    return tuple(Warned(code=one.code, text=one.text, where=one.where) for one in advice)
