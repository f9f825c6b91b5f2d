"""What commands print, and where: data to stdout, everything else to stderr."""

import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from farm.cli.wording import printable

PIPE_WIDTH = 160  # columns of a table that no person's window bounds

Json = Mapping[str, Any] | Sequence[Any]


def say(text: str = "") -> None:
    """Print a line of data."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print a line of progress or advice."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Json) -> None:
    """Print a JSON value as data."""
    unicode = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode, allow_nan=False), flush=True)


def print_error(code: str, message: str, *, as_json: bool) -> None:
    """Print one readable line to stderr; with `--json` the same as JSON to stdout."""
    if as_json:
        print_json({"error": {"code": code, "message": message}})
    else:
        note(f"error: {printable(' '.join(message.split()))}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print a table as data; columns named in `right` are numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    with console.capture() as drawn:
        console.print(table)
    print(drawn.get(), end="", flush=True)


class FieldsFormatter(logging.Formatter):
    """A log line with the fields of its `extra` behind it."""

    _known = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = " ".join(f"{name}={value}" for name, value in vars(record).items() if name not in self._known)
        line = super().format(record)
        return f"{line} {fields}" if fields else line


def log_to_stderr(*, verbose: bool) -> None:
    """Send logs to stderr: warnings, or with `verbose` everything of the farm's own."""
    logging.captureWarnings(True)
    line = logging.StreamHandler(sys.stderr)
    line.setFormatter(FieldsFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[line], force=True)
    for name in ("farm", "actors"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.WARNING)
