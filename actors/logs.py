"""Logs of the actors: to stderr, which Ray keeps in a file a process, with every record's own fields behind its message."""

import logging

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class FieldFormatter(logging.Formatter):
    """Writes `time LEVEL module: message field=value ...`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line, a traceback below it where there is one."""
        line = super().format(record)
        fields = " ".join(f"{name}={value!r}" for name, value in vars(record).items() if name not in _STANDARD)
        head, newline, rest = line.partition("\n")
        return f"{head} {fields}".rstrip() + newline + rest


def log_to_stderr() -> None:
    """Set up logging of this process."""
    handler = logging.StreamHandler()
    handler.setFormatter(FieldFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
