"""The live farm, as the endpoint sees it: a small protocol, so that the server runs in a test without Ray.

Behind it are the dispatcher and the renderers. Every method may be repeated; each raises FarmUnavailableError while what it
speaks to is away, which passes by itself when a dispatcher restarts.
"""

from collections.abc import Sequence
from typing import Protocol

from farm.portion import Allowance, Answer, Entry, Placing, PoolView, Portion, Refusal, SeatEnd
from farm.run import JobProgress
from farm.tally import Snapshot


class FarmLink(Protocol):
    """What the endpoint asks of the farm. Safe from one event loop."""

    async def enter(self, entry: Entry) -> Placing:
        """Ask for seats; waits for nothing."""

    async def draw(self, renderer: str, portion: Portion) -> Answer:
        """Have a portion drawn; returns when its pictures are encoded.

        Raises RendererDiedError where the renderer ended or does not know the seat, CancelledError where it was dropped, and
        what loading the model raises.
        """

    async def drop(self, renderer: str, token: str) -> None:
        """Stop drawing a portion, within a denoising step."""

    async def leave(self, token: str, *, seconds: float, end: SeatEnd = "done") -> None:
        """Give a seat, or all of an entry's, back, drawn or not: also where the entry's answer never came.

        `seconds`: device time, charged to its owner.
        """

    async def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot) -> None:
        """Show life every HOLD_S: which seats are still needed, and what this gateway counted."""

    async def charge(self, key: str, allowance: Allowance, images: int) -> Refusal | None:
        """Count a job's images for the day's quota of a key; a refusal counts nothing."""

    async def submit(self, job: str) -> None:
        """Have the dispatcher read a job from the store: after a plan, a pass or a control was written."""

    async def progress(self, job: str) -> tuple[JobProgress | None, str | None]:
        """A job's snapshot, None where it is not known there, and the error code of what stalled it."""

    async def pool(self) -> PoolView:
        """How the farm stands."""

    async def drain(self, renderer: str, drained: bool) -> None:
        """Give a renderer no more work, or again. Raises UnknownRendererError."""

    async def metrics(self) -> Sequence[Snapshot]:
        """What every process of the farm counted, the dispatcher's own last."""
