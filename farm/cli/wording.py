"""How numbers are said: counts, bytes, durations, ages."""

import re
from datetime import UTC, datetime

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def count(number: int, noun: str) -> str:
    """`1 image`, `12,000 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(number_bytes: float) -> str:
    """Bytes in the unit that leaves at most four digits: `640 B`, `12.5 MB`, `1.2 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number_bytes < 999.5:
            return f"{number_bytes:.0f} {unit}" if unit == "B" or number_bytes >= 100 else f"{number_bytes:.1f} {unit}"
        number_bytes /= 1000
    return f"{number_bytes:,.1f} TB"


def duration(seconds: float) -> str:
    """A span in its two largest units: `40 ms`, `0.4 s`, `45 s`, `3 min 05 s`, `2 h 10 min`, `5 d 3 h`."""
    if 0 < seconds < 0.095:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def gpu_hours(number: float) -> str:
    """`1 GPU-hour`, `0.5 GPU-hours`, `1,300 GPU-hours`."""
    return f"{number:,.10g} GPU-hour{'' if number == 1 else 's'}"


def rate(per_second: float | None) -> str:
    """Images per second, or per minute or hour where that reads better."""
    if per_second is None:
        return "– images/s"
    if per_second >= 1:
        return f"{per_second:.1f} images/s"
    if per_second >= 0.1:
        return f"{per_second:.2f} images/s"
    if per_second * 60 >= 0.1:
        return f"{per_second * 60:.1f} images/min"
    return f"{per_second * 3600:.1f} images/h"


def age(iso: str, now: datetime | None = None) -> str:
    """How long ago an ISO time was, or the text itself where it is none."""
    try:
        then = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return duration(max(0.0, ((now or datetime.now(UTC)) - then).total_seconds()))


def printable(text: str) -> str:
    """The text with U+FFFD for control characters and for marks that turn the direction of writing."""
    return _UNPRINTABLE.sub("\ufffd", text)


def cut(text: str, length: int) -> str:
    """The text on one line of at most `length` characters, with nothing in it that a terminal would obey."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
