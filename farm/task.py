"""A lease in a renderer's hands: how far it is, and whether it may still be asked back."""

import threading
from dataclasses import dataclass, field

from farm.drawing import ShardProgress
from farm.lease import Lease, Report


@dataclass(slots=True)
class Task:
    """Shared by the event loop and the shard's thread. `asks_next` turns true when its last batch starts.

    It is either begun or revoked, whichever comes first, and never both.
    """

    lease: Lease
    stop: threading.Event = field(default_factory=threading.Event)
    progress: ShardProgress = field(default_factory=ShardProgress)
    asks_next: bool = False
    cores: int = 0
    begun: bool = False
    revoked: bool = False
    ended: bool = False
    _deciding: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """Start on the device, unless it was revoked."""
        with self._deciding:
            self.begun = not self.revoked
            return self.begun

    def revoke(self) -> None:
        """Give up the lease, unless it was begun."""
        with self._deciding:
            self.revoked = not self.begun
        if self.revoked:
            self.stop.set()

    def report(self) -> Report:
        """Where the lease stands."""
        progress = self.progress
        return Report(
            self.lease.token,
            progress.stage,
            progress.ticks,
            progress.fraction,
            progress.in_hand,
            aside=progress.aside,
            aside_s=progress.aside_s,
        )
