"""What a figure was measured on: it stands beside every figure."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version


def environment() -> dict[str, str | int]:
    """Date, processor, cores of this process and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "diffusers", "ray")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
