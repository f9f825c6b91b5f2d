"""The renderers' processes as Ray actors: found, started, told and ended by name."""

import asyncio
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from actors.names import NAMESPACE, renderer_name
from actors.renderer import RendererActor
from farm import __version__
from farm.errors import FarmUnavailableError, NodeDiedError, RendererDiedError
from farm.settings import Settings

NODE_DIED = "its node has died"
"""Words in Ray's message about an actor that ended with its node; nothing else in the error tells."""


class RayPool:
    """A `farm.crew.Pool` of `slots` renderers with `cores` each, on a GPU each where `gpu`.

    A renderer of another version than this process is ended and never worked with.
    """

    def __init__(self, settings: Settings, slots: int, *, cores: int, gpu: bool):
        self.names = tuple(renderer_name(slot) for slot in range(slots))
        self._settings = settings
        self._cores = cores
        self._gpu = gpu
        self._handles: dict[str, Any] = {}

    def find(self) -> tuple[str, ...]:
        """Names of the renderers that live already."""
        for name in self.names:
            try:
                self._handles[name] = ray.get_actor(name, NAMESPACE)
            except ValueError:
                continue
        return tuple(self._handles)

    async def work(self, renderer: str) -> None:
        """Have it work until it is retired; its death ends the wait within milliseconds."""
        handle = self._handles.get(renderer)
        try:
            if handle is None:
                handle = self._handles[renderer] = await asyncio.to_thread(self._create, renderer)
            await handle.work.remote(__version__)
        except RayError as exc:
            if handle is not None and not isinstance(exc, ActorDiedError):
                ray.kill(handle)  # unreachable, or its work failed: what is left of it must not keep the device
            self._handles.pop(renderer, None)
            if isinstance(exc, RayTaskError) and isinstance(exc.cause, FarmUnavailableError):
                raise exc.cause from None
            reason = str(exc).strip().splitlines()[-1]
            if "creation" in str(exc):
                raise FarmUnavailableError(reason) from exc
            raise (NodeDiedError if NODE_DIED in str(exc) else RendererDiedError)(reason) from exc

    def drop(self, renderer: str, token: str) -> None:
        """Tell it to stop working on a lease, or on a portion of urgent images."""
        self._tell("drop", renderer, token)

    def revoke(self, renderer: str, token: str) -> None:
        """Ask it to give a lease back that it has not begun."""
        self._tell("revoke", renderer, token)

    def warm(self, renderer: str, model: str) -> None:
        """Ask it to load a model when its device is free."""
        self._tell("warm", renderer, model, len(self.names))

    def retire(self, renderer: str) -> None:
        """Tell it to put everything down."""
        self._tell("retire", renderer)

    def end(self, renderer: str) -> None:
        """End its process; Ray does so after some seconds even where it is stopped and cannot listen."""
        handle = self._handles.get(renderer)
        if handle is not None:
            ray.kill(handle)

    def _tell(self, method: str, renderer: str, *arguments: object) -> None:
        handle = self._handles.get(renderer)
        if handle is not None:
            getattr(handle, method).remote(*arguments)

    def _create(self, name: str) -> Any:
        return RendererActor.options(  # type: ignore[attr-defined]
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_gpus=1 if self._gpu else 0,
            num_cpus=0 if self._gpu else 1,
            max_restarts=0,
            get_if_exists=True,
        ).remote(name, self._settings, self._cores)
