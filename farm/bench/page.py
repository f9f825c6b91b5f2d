"""Pages of figures: words that people write above a mark, and below it what a benchmark measured."""

from pathlib import Path


def check_page(path: Path, mark: str) -> None:
    """Refuse a page without its mark, before anything is measured for it. Raises SystemExit."""
    if not path.is_file() or mark not in path.read_text(encoding="utf-8"):
        raise SystemExit(f"{path}: has no line {mark!r}, below which the figures go; put it back, or name another page")


def fill_page(path: Path, mark: str, *parts: str) -> None:
    """Put parts, Markdown each, below the mark in place of what stands there. Raises SystemExit."""
    check_page(path, mark)
    words = path.read_text(encoding="utf-8").partition(mark)[0]
    path.write_text("\n\n".join((f"{words}{mark}", *parts)) + "\n", encoding="utf-8")
