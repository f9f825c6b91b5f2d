"""The endpoint: what it adds to an image, how long urgent images wait behind bulk work, and images/s beside its peers.

Three figures, all with the bundled model, its defaults and PNGs in base64, on a real `farm up` on loopback.

Overhead. A client asks for one image at a time; the engine's own seconds for it (encode, denoise, decode) stand in the answer
and are taken off. What is left is the endpoint: the proxy, the gateway, a call of the dispatcher for a seat, a call of
the renderer, which encodes and hashes the PNG off its render thread, and the way back. The floor is a GET of `/healthz`,
which goes the same way and asks nobody.

Cutting in. Bulk work keeps every core of every renderer busy, and single images are asked for at random moments. An
image's wait is all of its seconds but the engine's own for it, so the overhead is in it. It can begin when the next denoising
step of the bulk batch ends: half a step on average, one step at worst, and the overhead on top. One step is the bulk work's own,
from the receipts of the undisturbed run. Both runs must have the same bytes in every picture.

Images per second from 1, 8 and 64 clients, each with one image in hand. The floor is again the denoiser, which costs the same
everywhere: a server wins by full batches and by what else it keeps off the cores that draw. Ray Serve with `@serve.batch`
and LitServe draw with the stock pipeline, in the farm's batch size; both run as one replica whose torch uses all cores, and as
one replica of a single thread for each core. They answer and forget; so does the farm here (FARM_IMAGES_DAYS=0), which runs a
renderer for each core by default. It runs once more keeping every picture and its record in a store, as it does by default,
and once as a single renderer that draws in as many threads of one process, which share Python's lock. It also writes provenance
into each picture and hashes it. All in turn in one run; medians over the rounds, ratios to the first farm of the same round.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from farm.bench.environment import environment
from farm.bench.load import Client, Reply, drive, free_port, percentiles, running
from farm.bench.throughput import COLORS, SHAPES
from farm.devices import default_renderers, local_device
from farm.ledger import Ledger
from farm.modelcard import find_card
from farm.settings import load_settings
from farm.storage.opening import open_store

FARM = str(Path(sys.executable).parent / "farm")
GENERATIONS = "/v1/images/generations"
JOB = "bulk"
WARM_IMAGES = 16
LOOK_EVERY = 4
"""Images after which the job is asked for, which reads its store."""
PAUSE_S = (0.1, 0.6)
"""Between two urgent images, drawn at random: so that they do not keep step with the bulk work."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server of `farm.bench.servers`: how many processes, and torch's threads in each."""

    module: str
    replicas: int
    threads: int


@dataclass(frozen=True, slots=True)
class Setup:
    """How a farm is started: its renderers, by default one a core, and whether it keeps its pictures."""

    renderers: int | None = None
    keeps: bool = False


class Overhead(TypedDict):
    """Milliseconds that the endpoint adds to the engine's own time for one image; the floor, and the whole answer."""

    images: int
    p50_ms: float
    p95_ms: float
    floor_p50_ms: float
    floor_p95_ms: float
    whole_p50_ms: float
    whole_p95_ms: float


class CutIn(TypedDict):
    """The wait of urgent images behind bulk work, the overhead included; `identical`: of the job's pictures."""

    images: int
    wait_p50_ms: float
    wait_p95_ms: float
    step_p50_ms: float
    step_p95_ms: float
    bulk_images: int
    identical: int


class Rate(TypedDict):
    """Medians of one contender. `ratio`: the farm's images per second over its own, of the same round."""

    contender: str
    clients: int
    images_per_s: float
    ratio: float
    p50_ms: float
    p95_ms: float


class Measured(TypedDict):
    """All three."""

    overhead: Overhead
    cut_in: CutIn
    rates: list[Rate]


def measure(*, images: int, bulk: int, rounds: int, load: dict[int, int]) -> Measured:
    """`images`: single ones for the overhead; `bulk`: images of the job that is cut into; `load`: clients -> images."""
    return Measured(overhead=overhead(images), cut_in=cut_in(bulk), rates=rates(rounds, load))


def overhead(images: int) -> Overhead:
    """Ask for single images, one after another."""
    with farm() as port:
        drive(port, GENERATIONS, _requests(WARM_IMAGES, seed=0), clients=1)
        replies, _ = drive(port, GENERATIONS, _requests(images, seed=1), clients=1)
        client = Client(port)
        floor = [client.ask("/healthz") for _ in range(images)]
        client.close()
    added = percentiles([_added(reply) for reply in replies])
    least = percentiles([reply.seconds for reply in floor])
    whole = percentiles([reply.seconds for reply in replies])
    return Overhead(
        images=images,
        p50_ms=added[0],
        p95_ms=added[1],
        floor_p50_ms=least[0],
        floor_p95_ms=least[1],
        whole_p50_ms=whole[0],
        whole_p95_ms=whole[1],
    )


def cut_in(bulk: int) -> CutIn:
    """Render a job undisturbed, then again with single images between."""
    manifest = (
        f"name: {JOB}\nmodel: sketch\nprompts: {json.dumps(_prompts(bulk, seed=2))}\n"
        "seeds: {count: 1, from: slot}\noutput: {thumbnails: false}\n"
    )
    renderers = default_renderers(local_device(), stays=True)
    with tempfile.TemporaryDirectory(prefix="farm-bench-") as name:
        folder = Path(name)
        calm, wild = folder / "calm", folder / "wild"
        (folder / "bulk.yaml").write_text(manifest)
        env = os.environ | {"FARM_STORE": str(calm), "FARM_RUNTIME_DIR": str(folder / "runtime")}
        done = subprocess.run(
            # As many renderers as `farm up` starts: a plan's shards follow from them, and a picture names its plan.
            [FARM, "render", str(folder / "bulk.yaml"), "--renderers", str(renderers)],
            env=env,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"farm render ended with {done.returncode}:\n{done.stderr[-2000:]}")
        with farm(wild) as port:
            drive(port, GENERATIONS, _requests(WARM_IMAGES, seed=0), clients=4)
            waits = _disturb(port, manifest)
        steps, undisturbed = _stored(calm)
        _, disturbed = _stored(wild)
    wait, step = percentiles(waits), percentiles(steps)
    return CutIn(
        images=len(waits),
        wait_p50_ms=wait[0],
        wait_p95_ms=wait[1],
        step_p50_ms=step[0],
        step_p95_ms=step[1],
        bulk_images=len(undisturbed),
        identical=sum(disturbed.get(index) == sha256 for index, sha256 in undisturbed.items()),
    )


def rates(rounds: int, load: dict[int, int]) -> list[Rate]:
    """Every contender once a round."""
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    contenders = _contenders()
    for number in range(rounds):
        for name, contender in contenders.items():
            path = "/draw" if isinstance(contender, Peer) else GENERATIONS
            with _peer(contender) if isinstance(contender, Peer) else farm(setup=contender) as port:
                drive(port, path, _requests(WARM_IMAGES, seed=0), clients=WARM_IMAGES)
                for clients, images in load.items():
                    replies, seconds = drive(port, path, _requests(images, seed=3 + clients), clients=clients)
                    rate = images / seconds
                    found.setdefault((name, clients), []).append(
                        (rate, *percentiles([reply.seconds for reply in replies]))
                    )
                    print(f"  round {number + 1}: {name}, {clients} clients: {rate:.2f} images/s", file=sys.stderr)
    return [
        Rate(
            contender=name,
            clients=clients,
            images_per_s=round(statistics.median(rate for rate, _, _ in measured), 2),
            ratio=round(
                statistics.median(ours[0] / its[0] for ours, its in zip(found["farm", clients], measured, strict=True)),
                3,
            ),
            p50_ms=statistics.median(p50 for _, p50, _ in measured),
            p95_ms=statistics.median(p95 for _, _, p95 in measured),
        )
        for clients in load
        for name in contenders
        for measured in [found[name, clients]]
    ]


def _contenders() -> dict[str, Peer | Setup]:
    """By name: the farm, as it may be started, and its peers."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Peer | Setup] = {"farm": Setup(), "farm that keeps its pictures": Setup(keeps=True)}
    if cores > 1:
        found[f"farm, 1 renderer of {cores} threads"] = Setup(renderers=1)
    for title, module in (("serve.batch", "ray_serve"), ("LitServe", "lit_serve")):
        for replicas, threads in sorted({(1, cores), (cores, 1)}):
            found[f"{title}, {replicas} × {threads} thread{'s' * (threads > 1)}"] = Peer(module, replicas, threads)
    return found


def table(found: Measured) -> str:
    """Markdown."""
    added, cut = found["overhead"], found["cut_in"]
    lines = [
        f"One image at a time, {added['images']} of them, ms | p50 | p95",
        "|---|---|---|",
        f"| the endpoint's own time | {added['p50_ms']} | {added['p95_ms']} |",
        f"| the floor: `/healthz` | {added['floor_p50_ms']} | {added['floor_p95_ms']} |",
        f"| the whole answer | {added['whole_p50_ms']} | {added['whole_p95_ms']} |",
        "",
        f"| {cut['images']} urgent images while a job keeps every core busy, ms | p50 | p95 |",
        "|---|---|---|",
        f"| wait of an urgent image, overhead included | {cut['wait_p50_ms']} | {cut['wait_p95_ms']} |",
        f"| one step of the job's batches | {cut['step_p50_ms']} | {cut['step_p95_ms']} |",
        "",
        f"{cut['identical']} of the job's {cut['bulk_images']} pictures are byte-identical to an undisturbed run's.",
        "",
        "| | clients | images/s | the farm over it | p50, ms | p95, ms |",
        "|---|---|---|---|---|---|",
    ]
    lines[0] = f"| {lines[0]} |"
    lines += [
        f"| {row['contender']} | {row['clients']} | {row['images_per_s']:.2f} | {row['ratio']:.2f}× "
        f"| {row['p50_ms']:.0f} | {row['p95_ms']:.0f} |"
        for row in found["rates"]
    ]
    return "\n".join(lines)


@contextmanager
def farm(store: Path | None = None, *, setup: Setup = Setup(keeps=True)) -> Iterator[int]:
    """A farm of its own with its endpoint; yields the port."""
    with tempfile.TemporaryDirectory(prefix="farm-bench-") as name:
        folder, port = Path(name), free_port()
        env = {
            "FARM_STORE": str(store or folder / "store"),
            "FARM_RUNTIME_DIR": str(folder / "runtime"),
            "FARM_HTTP_PORT": str(port),
            **({} if setup.keeps else {"FARM_IMAGES_DAYS": "0"}),
        }
        command = [FARM, "up"] + (["--renderers", str(setup.renderers)] if setup.renderers else [])
        with running(command, port=port, folder=folder, env=env, ready=lambda client: client.ask("/readyz")):
            yield port


@contextmanager
def _peer(peer: Peer) -> Iterator[int]:
    port, batch = free_port(), find_card("sketch", load_settings()).batch["cpu"]
    command = [sys.executable, "-m", f"farm.bench.servers.{peer.module}", "--port", str(port), "--batch", str(batch)]
    command += ["--replicas", str(peer.replicas), "--threads", str(peer.threads)]
    first = _requests(1, seed=0)[0]
    with (
        tempfile.TemporaryDirectory(prefix="farm-bench-") as folder,
        running(
            command,
            port=port,
            folder=Path(folder),
            env={"RAY_worker_niceness": "0"},
            ready=lambda client: client.ask("/draw", first),
        ),
    ):
        yield port


def _disturb(port: int, manifest: str) -> list[float]:
    """Submit the job, ask for single images until it is done; returns the waits of those drawn while it was rendered."""
    rng, client, job = random.Random(4), Client(port), f"/v1/jobs/{JOB}"
    client.ask(job, manifest, method="PUT", kind="application/yaml")
    while not client.ask(job).body["done"]:
        time.sleep(0.1)
    waits, sure = list[float](), 0
    for number, body in enumerate(_requests(100_000, seed=5)):
        waits.append(_added(client.ask(GENERATIONS, body)))
        if number % LOOK_EVERY == LOOK_EVERY - 1:
            if client.ask(job).body["state"] != "open":
                break
            sure = len(waits)
        time.sleep(rng.uniform(*PAUSE_S))
    client.close()
    return waits[:sure]


def _added(reply: Reply) -> float:
    """Seconds of a reply that are not the engine's."""
    return reply.seconds - float(reply.body["data"][0]["seconds"])


def _stored(store: Path) -> tuple[list[float], dict[int, str | None]]:
    """Seconds of a step, one value a receipt, and the hash of each picture."""
    ledger = Ledger(open_store(str(store), load_settings()))
    plan = ledger.plan(JOB)
    steps, batch = plan.card.defaults.num_inference_steps, plan.numerics.batch
    per_step = [
        receipt.seconds["denoise"] / (steps * -(-len(receipt.rows) // batch)) for receipt in ledger.receipts(plan, 1)
    ]
    return per_step, {row.index: row.sha256 for row in ledger.rows(plan)}


def _prompts(count: int, *, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"a {rng.choice(COLORS)} {rng.choice(SHAPES)} on a {rng.choice(COLORS)} background" for _ in range(count)]


def _requests(count: int, *, seed: int) -> Sequence[dict[str, object]]:
    return [
        {"model": "sketch", "prompt": prompt, "seed": number, "response_format": "b64_json", "output_format": "png"}
        for number, prompt in enumerate(_prompts(count, seed=seed))
    ]


if __name__ == "__main__":
    measured = measure(images=100, bulk=480, rounds=3, load={1: 24, 8: 128, 64: 320})
    print(table(measured))
    print(json.dumps({"environment": environment(), "endpoint": measured}))
