"""When and by whom something is said to a job."""

import getpass
import os
import socket
from datetime import UTC, datetime


def now_iso() -> str:
    """This moment, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user_name() -> str:
    """The user, by number where they have no name here."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def whoami() -> str:
    """User and machine."""
    return f"{user_name()}@{socket.gethostname()}"
