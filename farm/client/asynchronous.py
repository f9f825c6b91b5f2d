"""The client that awaits: what `blocking.py` does, for event loops."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2

from farm.client import calls
from farm.client.address import find_address, timeouts, tls_of
from farm.client.answers import Event, Image, Job, JobImage, Model, Renderer, Single
from farm.client.attempts import Attempts
from farm.client.watching import MAX_EVENT_BYTES, SILENT_S, Watch
from farm.errors import ManifestError

T = TypeVar("T")

PATIENCE_S = 60.0
PICTURE_S = 1800.0


class AsyncClient:
    """A farm's endpoint, for one event loop. `async with` or `aclose()` ends its connections.

    `url`, `key`: of the farm; FARM_URL, FARM_KEY and farm.toml where left out. `ca_file`: PEM of the CA that signed its
    certificate, where this machine does not trust it; SSL_CERT_FILE says the same. `patience_s`: how long a farm that is away
    or refuses for now is asked again; a farm that says it will be longer is not waited for. `picture_s`: how long to wait for
    pictures. Every method raises the farm's own errors (`farm.errors`), FarmUnavailableError where none answers.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        ca_file: Path | None = None,
        patience_s: float = PATIENCE_S,
        picture_s: float = PICTURE_S,
        transport: httpx2.AsyncBaseTransport | None = None,
    ):
        self._address = find_address(url, key)
        self._patience_s = patience_s
        self._picture_s = picture_s
        self._http = httpx2.AsyncClient(
            headers=self._address.headers,
            verify=tls_of(self._address, ca_file),
            trust_env=not self._address.loopback,
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"AsyncClient({self._address.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End its connections."""
        await self._http.aclose()

    @property
    def url(self) -> str:
        """The farm's address."""
        return self._address.url

    # Pictures at once

    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        model: str | None = None,
        n: int | None = None,
        size: str | None = None,
        width: int | None = None,
        height: int | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        quality: str | None = None,
        output_format: str | None = None,
        output_compression: int | None = None,
    ) -> list[Image]:
        """Draw `n` pictures of a prompt, or of each of several, and return them in order. Images of jobs wait meanwhile.

        What is left out the model's card says. `seed` is the first picture's. `size`: as "1024x1024". `output_format`: png,
        webp or jpeg.
        """
        options = {
            "model": model,
            "n": n,
            "size": size,
            "width": width,
            "height": height,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "quality": quality,
            "output_format": output_format,
            "output_compression": output_compression,
        }
        return await self._do(calls.generate(prompt, options, wait_s=self._picture_s))

    async def models(self) -> list[Model]:
        """List the farm's models."""
        return await self._do(calls.models())

    async def model(self, name: str) -> Model:
        """Show one model, and how soon it could draw. Raises UnknownModelError."""
        return await self._do(calls.model(name))

    # Jobs

    async def submit(self, manifest: calls.Manifest, *, append: bool = False) -> Job:
        """Submit a manifest: a YAML file, or plain data. To submit the same twice is to submit it once.

        `append`: render rows that a keyed prompt file has got since. Raises ManifestError, PlanChangedError.
        """
        call = calls.submit(manifest, append=append)
        try:
            return await self._do(call)
        except ManifestError as exc:
            raise calls.named(exc, manifest) from exc

    async def jobs(self) -> AsyncIterator[Job]:
        """Yield all jobs, newest first."""
        async for page in self.job_pages():
            for item in page.items:
                yield item

    async def job_pages(self) -> AsyncIterator[calls.Page[Job]]:
        """Yield all jobs, newest first, in pages, which name the jobs too that the farm cannot read."""
        cursor: str | None = None
        while True:
            page = await self._do(calls.jobs(cursor))
            yield page
            if (cursor := page.cursor) is None:
                return

    async def status(self, job: str) -> Job:
        """Show how a job stands. Raises UnknownJobError."""
        return await self._do(calls.job(job))

    async def images(self, job: str) -> AsyncIterator[JobImage]:
        """Yield a job's images that have a row, in order."""
        cursor: str | None = None
        while True:
            page = await self._do(calls.images(job, cursor))
            for item in page.items:
                yield item
            if (cursor := page.cursor) is None:
                return

    async def watch(self, job: str, *, images: calls.Tell = "all") -> AsyncIterator[Event]:
        """Yield what happens to a job until it is done, cancelled or deleted: progress, images as they land, its state.

        `images`: tell of all of them, of those that land from now on ("new"), or of none.

        A connection that breaks is made again where it broke. Raises FarmUnavailableError where the farm stays away for
        longer than `patience_s`.
        """
        watch = Watch(self._address, patience_s=self._patience_s, now=time.monotonic())
        path, timeout = calls.events(job, images), timeouts(SILENT_S)
        while not watch.ended:
            broken: httpx2.TransportError | None = None
            try:
                async with self._http.stream(
                    "GET", self._address.at(path), headers=watch.headers, timeout=timeout
                ) as response:
                    if not response.is_success:
                        await response.aread()
                        wait = watch.refused(response, now=time.monotonic(), chance=random.random())
                        await asyncio.sleep(wait)
                        continue
                    async for sent in httpx2.EventSource(response, MAX_EVENT_BYTES):
                        if (event := watch.take(sent, now=time.monotonic())) is not None:
                            yield event
                        if watch.ended:
                            return
            except httpx2.TransportError as exc:
                broken = exc
            await asyncio.sleep(watch.broke(broken, now=time.monotonic(), chance=random.random()))

    async def pause(self, job: str) -> dict[str, Any]:
        """Hold a job until `resume`; what is stored stays."""
        return await self._do(calls.say(job, "pause"))

    async def resume(self, job: str) -> dict[str, Any]:
        """Let a job that was paused or cancelled go on."""
        return await self._do(calls.say(job, "resume"))

    async def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job; what is stored stays."""
        return await self._do(calls.say(job, "cancel"))

    async def approve(self, job: str) -> dict[str, Any]:
        """Let the images follow that a job's pilot left out."""
        return await self._do(calls.say(job, "approve"))

    async def change(
        self,
        job: str,
        *,
        priority: int | None = None,
        max_images: int | None = None,
        gpu_hours: float | None = None,
        finish_by: str | None = None,
    ) -> dict[str, Any]:
        """Change a job's priority or limits. `finish_by`: ISO 8601 with an offset."""
        said = calls.changes(priority=priority, max_images=max_images, gpu_hours=gpu_hours, finish_by=finish_by)
        return await self._do(calls.say(job, "change", said))

    async def retry(
        self, job: str, *, images: str | None = None, damaged: bool = False, run: str | None = None
    ) -> dict[str, Any]:
        """Render images of a job again: those that failed, or with `images` "all" or listed ones, as "7,9,20-29"."""
        return await self._do(calls.retry(job, images=images, damaged=damaged, run=run))

    async def picture(self, job: str, index: int, *, run: str | None = None, thumbnail: bool = False) -> bytes:
        """Fetch a picture file of a job. `run` is needed where the job has several. Raises UnknownImageError."""
        return await self._do(calls.picture(job, index, run, thumbnail=thumbnail))

    async def sheet(self, job: str) -> bytes:
        """Fetch a job's contact sheet, a PNG."""
        return await self._do(calls.sheet(job))

    # Kept pictures

    async def singles(
        self, *, q: str | None = None, owner: str | None = None, model: str | None = None
    ) -> AsyncIterator[Single]:
        """Yield pictures of the endpoint that the farm keeps, newest first; `q` is looked for in their prompts."""
        cursor: str | None = None
        while True:
            page = await self._do(calls.singles(cursor, q=q, owner=owner, model=model))
            for item in page.items:
                yield item
            if (cursor := page.cursor) is None:
                return

    async def single(self, image: str) -> Single:
        """Show a kept picture's record. Raises UnknownImageError."""
        return await self._do(calls.single(image))

    async def content(self, image: str) -> bytes:
        """Fetch a kept picture's file. Raises UnknownImageError."""
        return await self._do(calls.content(image))

    async def keep(self, image: str, *, days: float | None = None) -> Single:
        """Keep a picture for so many days from now; for good where left out."""
        return await self._do(calls.keep(image, days))

    async def discard(self, image: str) -> None:
        """Delete a kept picture."""
        return await self._do(calls.discard(image))

    # Renderers

    async def renderers(self) -> list[Renderer]:
        """List the farm's renderers."""
        return await self._do(calls.renderers())

    async def drain(self, renderer: str, *, drained: bool = True) -> Renderer:
        """Give a renderer no more work, or with `drained=False` work again. Raises UnknownRendererError."""
        return await self._do(calls.drain(renderer, drained=drained))

    async def _do(self, call: calls.Call[T]) -> T:
        address = self._address
        attempts = Attempts(address, repeatable=call.repeatable, patience_s=self._patience_s, now=time.monotonic())
        while True:
            try:
                response = await self._http.request(
                    call.method,
                    address.at(call.path),
                    params=call.query or None,
                    content=call.content,
                    headers=call.headers,
                    timeout=timeouts(call.wait_s),
                )
            except httpx2.TransportError as exc:
                wait: float | None = attempts.failed(exc, now=time.monotonic(), chance=random.random())
            else:
                wait = attempts.answered(response, now=time.monotonic(), chance=random.random())
            if wait is None:
                return call.read(response, address.url)
            await asyncio.sleep(wait)
