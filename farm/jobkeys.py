"""Where in the store the ledger's records lie: keys, and the names and numbers in them."""

import re

from farm.cardparts import PLAIN, Acceleration
from farm.plan import Plan


def plan_key(job: str, number: int) -> str:
    """Return the key of a job's plan 1, 2, …"""
    return f"jobs/{job}/plans/{number:04d}.json"


def run_key(plan: Plan, name: str) -> str:
    """Return the key of an object of a run."""
    return f"jobs/{plan.job}/{plan.run}/{name}"


def receipt_key(plan: Plan, pass_number: int, shard: int) -> str:
    """Return the key of a shard's receipt."""
    return run_key(plan, f"receipts/{pass_number:04d}/{shard:08d}.parquet")


def failure_key(plan: Plan, pass_number: int, shard: int) -> str:
    """Return the key of the marker that a shard has failed images."""
    return run_key(plan, f"failures/{pass_number:04d}/{shard:08d}")


def profile_prefix(model: str) -> str:
    """Return the prefix of what was measured of a model."""
    return f"profiles/{_plain(model)}/"


def profile_key(model: str, device: str, acceleration: Acceleration) -> str:
    """Return the key of what was measured of a model, accelerated like this, on one kind of device."""
    how = "" if acceleration == PLAIN else f"--{_plain(str(acceleration))}"
    return f"{profile_prefix(model)}{_plain(device)}{how}.json"


def is_job_name(name: str) -> bool:
    """Whether a job could have the name: whatever else is asked for reaches no other part of the store."""
    return re.fullmatch(r"[^/\0]{1,200}", name) is not None and name not in (".", "..")


def number_in(name: str, suffix: str) -> int | None:
    """Return the number that an object is named by, before `suffix`; None for a name of another kind."""
    digits = name.removesuffix(suffix)
    return int(digits) if name.endswith(suffix) and digits.isascii() and digits.isdigit() else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-.") or "-"
