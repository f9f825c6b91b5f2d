"""The words that the dispatcher and its renderers exchange. Plain records, small enough to send every second."""

from dataclasses import dataclass, field
from typing import Literal

from farm.devices import DeviceInfo

LEASE_S = 30.0
"""A renderer that was not heard of for this long loses what it holds."""
CONFIRM_S = 5.0
"""A lease that its renderer, which is heard of, does not report within this time never reached it, and goes back."""
RENEW_S = 1.0
"""How often a renderer reports, with leases or without."""
POLL_S = 10.0
"""How long a renderer's question for work stays parked when there is none."""

Stage = Literal["waiting", "load", "encode", "denoise", "decode", "write", "finalise"]

STAGE_LIMIT_S: dict[Stage, float] = {
    "waiting": 3600.0,
    "load": 1800.0,
    "encode": 300.0,
    "denoise": 600.0,
    "decode": 300.0,
    "write": 600.0,
    "finalise": 3600.0,
}
"""Seconds without progress after which a renderer counts as stuck and ends its own process."""
STUCK_GRACE_S = 30.0
"""How much later the dispatcher gives up a renderer that is stuck and could not even end itself."""
BEATS_PER_S = 200.0
"""Beats that the dispatcher wishes to hear at most; with more renderers each reports less often."""


def beat_s(renderers: int) -> float:
    """Return the pause between one renderer's beats in a farm of so many: a third of a lease at most."""
    return min(max(RENEW_S, renderers / BEATS_PER_S), LEASE_S / 3)


@dataclass(frozen=True, slots=True)
class Lease:
    """A renderer's temporary right to one shard of a run's pass, or to finalise the pass.

    `alone`: indexes to render one at a time, outside their batch. `skip`: indexes that ended every renderer that tried
    them; they become failed rows. `images`: how many images the shard has. `twin`: another renderer is at this shard too,
    and slow: whichever receipt is first counts. `cautious`: it ended renderers with no image in hand; every image is encoded
    and drawn by itself, and announced before.
    """

    token: str
    task: Literal["render", "finalise"]
    job: str
    run: str
    pass_number: int
    shard: int
    images: int
    attempt: int
    alone: frozenset[int] = frozenset()
    skip: frozenset[int] = frozenset()
    twin: bool = False
    cautious: bool = False


@dataclass(frozen=True, slots=True)
class Hello:
    """How a renderer introduces itself, at first and again whenever it meets a dispatcher that it does not know.

    `incarnation` names its process; of two, the one of a process that was born later is the greater. `machine`: what its
    node renders on. `drained`: a dispatcher told it that a person wants it to have no more work.
    """

    renderer: str
    incarnation: str
    device: str
    held: tuple[Lease, ...] = ()
    machine: DeviceInfo | None = None
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """A renderer's question for work. Asking twice with one `sequence` gives the same lease."""

    renderer: str
    incarnation: str
    epoch: str
    sequence: int
    loaded_model: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """Where one lease stands. `ticks` counts steps and finished pictures: it only grows while there is progress.

    `fraction`: share of the shard's work done, 0..1. `in_hand`: indexes of the batch on the device at this moment. A lease
    in stage `waiting` has not begun and may be revoked. `aside`: an urgent image has its place on the device at this moment;
    `aside_s`: seconds for which urgent images have had it, all together.
    """

    token: str
    stage: Stage
    ticks: int
    fraction: float
    in_hand: tuple[int, ...] = ()
    aside: bool = False
    aside_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What a renderer is at besides its leases. `loading`: a model comes to its device at this moment.

    `urgent`: images of the endpoint that it has, drawn or waiting. `load_s`: what loading `loaded_model` took, 0 where
    that was not measured. `urgent_ticks` counts steps and finished batches of urgent images: it only grows.
    """

    loaded_model: str | None
    loading: bool = False
    urgent: int = 0
    load_s: float = 0.0
    urgent_ticks: int = 0


@dataclass(frozen=True, slots=True)
class Beat:
    """A renderer's sign of life, with a report on every lease that it holds: one that is missing never reached it, or ended."""

    renderer: str
    incarnation: str
    epoch: str
    reports: tuple[Report, ...]
    standing: Standing | None = None


@dataclass(frozen=True, slots=True)
class Renewal:
    """The answer to a beat: tokens to drop, and seconds until the next beat.

    `meet`: say hello first; nothing is to be dropped before that. `replaced`: another process has this renderer's name, and
    this one should end. `drained`: a person wants it to have no more work; to be told the next dispatcher by its hello, and
    without meaning where `meet` or `replaced`.
    """

    epoch: str
    gone: tuple[str, ...] = ()
    meet: bool = False
    every_s: float = RENEW_S
    replaced: bool = False
    drained: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """A lease's good end: its receipt is in the store."""

    lease: Lease
    renderer: str
    ok: int
    failed: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GiveBack:
    """A lease's other end. `code` and `message` are those of the error.

    `cancelled`, `retired` and `revoked` (asked back before it had begun) blame nobody.
    """

    lease: Lease
    renderer: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The dispatcher's answer to a question for work.

    `meet`: the renderer is not known here, or knows an older dispatcher: say hello, then ask again. `late`: this question
    was answered before, or a newer one was asked: it is never answered with a lease, so waiting for one is in vain.
    `replaced`: another process has this renderer's name, and this one should end.
    """

    epoch: str
    lease: Lease | None = None
    meet: bool = False
    late: bool = False
    replaced: bool = False

    @property
    def is_final(self) -> bool:
        """Whether waiting longer would bring nothing else."""
        return self.lease is not None or self.meet or self.late or self.replaced


# What the dispatcher's rules ask of the process around them.


@dataclass(frozen=True, slots=True)
class Drop:
    """Tell a renderer to stop working on a lease, within a denoising step."""

    renderer: str
    token: str


@dataclass(frozen=True, slots=True)
class Revoke:
    """Ask a renderer to give a lease back (`revoked`) if it has not begun with it."""

    renderer: str
    token: str


@dataclass(frozen=True, slots=True)
class End:
    """End a renderer's process: nothing was heard of it (`silent`), or nothing progresses there (`stuck`)."""

    renderer: str
    why: Literal["silent", "stuck"]


@dataclass(frozen=True, slots=True)
class Check:
    """Find out whether a shard that came back has a receipt after all, and tell `Dispatch.checked`."""

    job: str
    run: str
    pass_number: int
    shard: int


@dataclass(frozen=True, slots=True)
class Read:
    """Read a job from the ledger again, and tell `Dispatch.take_up`."""

    job: str


Effect = Drop | Revoke | End | Check | Read
