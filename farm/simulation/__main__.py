"""`python -m farm.simulation --seed N [--trace]` replays one world; `--seeds A-B` runs many and names those that fail."""

import argparse
import sys
import time

from farm.simulation.audit import Violation
from farm.simulation.scenario import Small


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m farm.simulation", description=__doc__)
    arguments.add_argument("--seed", type=int, help="replay this one")
    arguments.add_argument("--trace", action="store_true", help="tell all that happens")
    arguments.add_argument("--seeds", help="first and last, as in 0-1999", default="0-1999")
    given = arguments.parse_args()
    if given.seed is not None:
        found = failure(given.seed, tell=print if given.trace else None)
        print(f"seed {given.seed}: {found or 'all rules held'}")
        return 1 if found else 0
    first, _, last = given.seeds.partition("-")
    started, failed = time.perf_counter(), 0
    for seed in range(int(first), int(last or first) + 1):
        found = failure(seed)
        if found:
            failed += 1
            print(f"seed {seed}: {found}")
    worlds = int(last or first) + 1 - int(first)
    print(f"{worlds} worlds in {time.perf_counter() - started:.1f} s, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


def failure(seed: int, *, tell: object = None) -> str | None:
    """What went wrong in a world, or None."""
    world = Small(seed, tell=tell if callable(tell) else None)
    try:
        world.run()
    except Violation as exc:
        return str(exc)
    return None


if __name__ == "__main__":
    sys.exit(main())
