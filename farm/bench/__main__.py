"""`python -m farm.bench`: every benchmark that needs no GPU, one after another; a JSON line last."""

import json

from farm.bench import dispatching, endpoint, planning, scaling, throughput
from farm.bench.environment import environment


def main() -> None:
    print("Throughput of one renderer beside its peers\n")
    peers = throughput.measure(images=256, rounds=3)
    print(throughput.table(peers))
    print("\nThe endpoint, urgent images behind bulk work, and serving beside peers\n")
    served = endpoint.measure(images=100, bulk=480, rounds=3, load={1: 24, 8: 128, 64: 256})
    print(endpoint.table(served))
    print("\nMany renderers, each only sleeping\n")
    renderers = scaling.measure(counts=(1, 2, 4, 8, 16, 32), images_each=40)
    print(scaling.table(renderers))
    print("\nPlanning and resuming ten million images\n")
    plans = planning.measure()
    print(planning.table(plans))
    print("\nThe dispatcher's rules with up to 10,000 renderers\n")
    rules = dispatching.measure()
    print(dispatching.table(rules))
    found = {"throughput": peers, "endpoint": served, "scaling": renderers, "planning": plans, "dispatching": rules}
    print(json.dumps({"environment": environment(), **found}))


if __name__ == "__main__":
    main()
