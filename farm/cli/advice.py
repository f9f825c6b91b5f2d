"""Warnings as commands print them: on stderr, a line each, and not too many."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from farm.cli.terminal import note
from farm.cli.wording import printable

if TYPE_CHECKING:
    from farm.lint import Advice

MOST = 20


def warn(warnings: Sequence["Advice"], *, most: int | None = MOST) -> None:
    """Print warnings, `most` of them, and how many more there are."""
    tell(warning_records(warnings), most=most)


def tell(told: object, *, most: int | None = MOST) -> None:
    """Print warnings as a farm tells of them; what is none is passed over."""
    records = [one for one in told if isinstance(one, Mapping)] if isinstance(told, Sequence) else []
    for one in records[:most]:
        where = str(one.get("where") or "")
        note(printable(f"warning: {where}{': ' if where else ''}{one.get('text')}"))
    left = 0 if most is None else len(records) - most
    if left > 0:
        note(f"… and {left:,} more; farm lint shows all of them")


def warning_records(warnings: Sequence["Advice"]) -> list[dict[str, str]]:
    """Return warnings as JSON has them."""
    return [{"code": one.code, "text": one.text, "where": one.where} for one in warnings]
