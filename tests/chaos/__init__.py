"""Do to a rendering farm what machines, networks and servers do, then look whether anything was lost.

One job is rendered undisturbed into a folder. The same manifest is rendered into an S3 bucket (Ceph's gateway on loopback)
while processes are killed or stopped, nodes cut off, requests refused, delayed and broken off, all of it drawn from a seed.
Whenever the command ends it is typed again, and it may end only in ways that what was done to it explains. In the end the
bucket must hold each image exactly once, `farm verify` must find every object as its receipt says, every picture must equal
the undisturbed one byte for byte, and nothing may be left running.

    python -m tests.chaos [--round kills|stop|store|cluster|cut|two-farms|all] [--seed N]
"""

from tests.chaos.processes import end, title

__all__ = ["end", "title"]
