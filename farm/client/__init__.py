"""A farm from afar: its endpoint, by an address and a key. Imports neither torch nor Ray, numpy nor a store.

`Client` blocks, `AsyncClient` awaits; both make the same calls (`calls.py`), try them again by the same rule (`attempts.py`)
and raise the errors of `farm/errors.py` that the farm itself raised.
"""

from farm.client.answers import Event, Image, Job, JobImage, Model, Progress, Renderer, Single
from farm.client.asynchronous import AsyncClient
from farm.client.blocking import Client

__all__ = ["AsyncClient", "Client", "Event", "Image", "Job", "JobImage", "Model", "Progress", "Renderer", "Single"]
