"""An instant as people write it: ISO 8601 with its offset from UTC, so that it means the same on every machine."""

import re
from datetime import datetime

_EXAMPLE = "2026-12-01T09:00+08:00"
_BLANK_BEFORE_OFFSET = re.compile(r"\s+(?=[+-]\d|[zZ]$)")


def moment(text: str) -> datetime:
    """Read a moment; a blank for the T and one before the offset are fine, as YAML writes them.

    Raises ValueError saying what is wrong and what to write.
    """
    given = text.strip()
    try:
        found = datetime.fromisoformat(_BLANK_BEFORE_OFFSET.sub("", given))
    except ValueError:
        raise ValueError(f"must be a moment such as {_EXAMPLE}, got {text!r}; write date, time and offset") from None
    if found.tzinfo is None:
        whole = given if ":" in given else f"{given}T00:00"
        raise ValueError(
            f"needs an offset from UTC, got {text!r}; write {whole}Z for UTC, or an offset of yours as {whole}+08:00"
        )
    return found
