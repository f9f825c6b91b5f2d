"""Rounds on a Ray cluster of several nodes: machines die, freeze, lose their network, and come back."""

import time
from collections.abc import Callable, Sequence

from tests.chaos.bench import Bench, Size
from tests.chaos.cluster import AGAIN_S, Cluster, Node
from tests.chaos.events import Action, Event, say
from tests.chaos.namespaces import CABLES, Cable, Machine, Network, unavailable
from tests.chaos.processes import ChaosError, title
from tests.chaos.round import AWAY, NAMES, STORE_OR_FARM_AWAY, Round, opened

DEATH_SEEN_S = 3.0
"""How long after its network the farm gives up a node and leases its shards anew: what it stores then is late."""
SETTLE_S = 5.0
"""After everything is whole again: how long those that were away may still write, before the store is looked at."""


def cluster(bench: Bench, size: Size, seed: int) -> dict[str, object]:
    """Nodes on loopback: machines switched off or frozen whole, the head too, and single processes on them."""
    choices: list[tuple[Action, str]] = [
        ("kill", "node"),
        ("stop", "node"),
        ("kill", "raylet"),
        ("stop", "raylet"),
        ("kill", "head"),
        ("stop", "gcs"),
        ("kill", "renderer"),
        ("stop", "renderer"),
        ("kill", "dispatcher"),
        ("stop", "dispatcher"),
        ("kill", "cli"),
    ]
    with opened("cluster", bench, size, seed) as this:
        nodes = [Node("head", "127.0.0.9", head=True)]
        nodes += [Node(f"node-{number}", f"127.0.0.{10 + number}") for number in range(1, size.renderers + 1)]
        return _on_cluster(this, nodes, choices, AWAY, lambda cluster, event: False)


def cut(bench: Bench, size: Size, seed: int) -> dict[str, object]:
    """Nodes in network namespaces, one more than is needed: frozen, or pulled off the farm's network, the storage's, or both.

    Off the farm's network alone a node's renderers still store: their receipts wait in the proxy for some seconds, so that
    they come when others have been given the same shards.
    """
    reason = unavailable()
    if reason:
        raise ChaosError(f"no round `cut` here: {reason}")
    network = Network()
    try:
        with opened("cut", bench, size, seed, host=network.storage_address) as this:
            head = network.add("head")
            machines = {f"n{number}": network.add(f"n{number}") for number in range(1, size.renderers + 2)}
            nodes = [Node("head", head.address, head.prefix, head=True)]
            nodes += [Node(name, machine.address, machine.prefix) for name, machine in machines.items()]
            cuts: list[tuple[Machine, float, float]] = []

            def perform(cluster: Cluster, event: Event) -> bool:
                up = [
                    node
                    for node in cluster.workers
                    if node.name not in off
                    and this.proxy.pictures_from(machines[node.name].storage_address, seconds=3.0)
                ]
                if not up:
                    return False
                node = this.rng.choice(up)
                machine = machines[node.name]
                cables: list[Cable] = {"farm": ["farm"], "storage": ["storage"]}.get(event.kind, list(CABLES))
                off.add(node.name)
                this.proxy.hold_receipts(machine.storage_address, this.rng.uniform(4.0, 9.0))
                for cable in cables:
                    network.cut(machine, cable)
                if "farm" in cables:
                    cuts.append((machine, time.monotonic(), event.length_s))

                def heal() -> None:
                    off.discard(node.name)
                    this.proxy.hold_receipts(machine.storage_address, 0.0)
                    for cable in cables:
                        network.heal(machine, cable)
                    say(f"{node.name} is back at the network")

                say(f"{node.name} loses {' and '.join(cables)}")
                this.later.after(event.length_s, heal)
                return True

            off: set[str] = set()
            choices: list[tuple[Action, str]] = [("cut", "farm"), ("cut", "both"), ("cut", "storage"), ("stop", "node")]
            happened = _on_cluster(this, nodes, choices, STORE_OR_FARM_AWAY, perform)
            late = [
                exchange
                for machine, at, seconds in cuts
                for exchange in this.proxy.journal
                if exchange.peer == machine.storage_address
                and "/receipts/" in exchange.path
                and exchange.method == "PUT"
                and at + DEATH_SEEN_S < exchange.at < at + seconds + SETTLE_S
            ]
            return happened | {"late_receipts": [exchange.status for exchange in late]}
    finally:
        network.close()


def _on_cluster(
    this: Round,
    nodes: list[Node],
    choices: Sequence[tuple[Action, str]],
    allowed: frozenset[int],
    cut: Callable[[Cluster, Event], bool],
) -> dict[str, object]:
    """Bring a cluster up, render on it while events happen, look, and take it down."""
    rng = this.rng
    cluster = Cluster(nodes, this.env, this.folder, pause=lambda: rng.uniform(*AGAIN_S))
    cluster.start()
    say(f"{len(nodes)} nodes are up")
    command = this.command("farm render", allowed, prefix=nodes[0].prefix, FARM_ADDRESS=cluster.address)

    def perform(event: Event) -> bool:
        if event.action == "cut":
            return cut(cluster, event)
        if event.kind == "cli":
            command.kill()
            return True
        if event.kind in ("node", "head"):
            some = [node for node in nodes if node.head == (event.kind == "head") and cluster.alive(node)]
            if not some:
                return False
            found = cluster.family(rng.choice(some))
            if event.action == "stop":
                return this.pause(found, event.length_s)
            for process in found:
                this.kill(process)
            return True
        found = [one for node in nodes for one in cluster.family(node) if title(one).startswith(NAMES[event.kind])]
        if not found:
            return False
        chosen = rng.choice(found)
        return this.kill(chosen) if event.action == "kill" else this.pause([chosen], event.length_s)

    started = time.monotonic()
    try:
        happened = this.go(choices, perform, every_look=cluster.look)
        this.later.run(everything=True)
        time.sleep(SETTLE_S)
        return this.finish(happened, started)
    finally:
        this.later.run(everything=True)
        cluster.stop()
