"""`python -m tests.chaos`: one round or all of them, long ones; see the package."""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import fields, replace

from tests.chaos.bench import Size, bench
from tests.chaos.namespaces import unavailable
from tests.chaos.processes import ChaosError
from tests.chaos.rounds import ROUNDS

SIZES = {
    "kills": Size(events=24, images=480, renderers=2, steps=8),
    "stop": Size(events=12, images=480, renderers=2, steps=8),
    "store": Size(events=9, images=480, renderers=2, steps=8),
    "cluster": Size(events=22, images=480, renderers=2, steps=8),
    "cut": Size(events=12, images=480, renderers=2, steps=8),
    "two-farms": Size(events=6, images=480, renderers=1, steps=8),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rounds; 1 where one failed, after its words."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description="Disturb a farm and audit what it stored."
    )
    parser.add_argument("--round", nargs="+", choices=[*ROUNDS, "all"], default=["all"])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    for part in fields(Size):
        flag = f"--{part.name.replace('_', '-')}"
        parser.add_argument(
            flag, type=float if part.name == "longest_s" else int, help="the round's own where left out"
        )
    given = parser.parse_args(arguments)
    names = list(ROUNDS) if "all" in given.round else given.round
    if "cut" in names and (reason := unavailable()):
        print(f"chaos: no round cut: {reason}")
        names.remove("cut")
    said = {part.name: value for part in fields(Size) if (value := getattr(given, part.name)) is not None}
    failed = []
    with bench() as made:
        for name in names:
            size = replace(SIZES[name], **said)
            try:
                print(ROUNDS[name](made, size, given.seed), flush=True)
            except ChaosError as error:
                print(f"chaos: round {name}, seed {given.seed} FAILED: {error}", flush=True)
                failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
