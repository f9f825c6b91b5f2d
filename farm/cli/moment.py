"""When and by whom something is said to a job."""

import getpass
import os
import socket
from datetime import UTC, datetime


def now_iso() -> str:
    """This moment, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def whoami() -> str:
    """User and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
