"""Both clients against a real farm in one process: pictures, jobs, events, kept pictures, renderers."""

import asyncio
import inspect
from pathlib import Path

import pytest

import farm
from farm.client import AsyncClient, Client
from farm.errors import (
    ControlError,
    InputError,
    ManifestError,
    PlanChangedError,
    RequestError,
    UnknownImageError,
    UnknownJobError,
    UnknownModelError,
)
from tests.unit.client.conftest import Endpoint

JOB = {
    "name": "shapes",
    "model": "sketch",
    "prompts": ["a red circle", "a blue star"],
    "seeds": {"count": 2},
    "params": {"num_inference_steps": 2},
}


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, list[str]]:
        named = {name.removeprefix("a") if name == "aclose" else name: one for name, one in vars(kind).items()}
        return {
            name: list(inspect.signature(one).parameters)
            for name, one in named.items()
            if callable(one) and not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)
    assert (farm.Client, farm.AsyncClient) == (Client, AsyncClient)


def test_pictures_come_with_seed_seconds_and_metadata(endpoint: Endpoint, tmp_path: Path) -> None:
    with endpoint.client() as client:
        first, second = client.generate("a red circle", model="sketch", n=2, seed=7, num_inference_steps=2)
        assert (first.seed, second.seed) == (7, 8)
        assert first.seconds > 0
        assert first.metadata["model"] == "sketch"
        assert first.metadata["size"] == "64x64"
        assert first.pil().size == (64, 64)
        assert first.save(tmp_path / "circle.png").read_bytes() == first.data
        again = client.generate("a red circle", model="sketch", n=2, seed=7, num_inference_steps=2)
        assert [image.data for image in again] == [first.data, second.data]


def test_several_prompts_come_back_in_order(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        images = client.generate(
            ["a red circle", "a blue star"], model="sketch", seed=3, num_inference_steps=1, output_format="webp"
        )
        assert [image.suffix for image in images] == [".webp", ".webp"]
        assert images[0].data != images[1].data


def test_what_cannot_be_is_refused_by_the_farm_s_own_errors(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        with pytest.raises(UnknownModelError, match="sketchy"):
            client.generate("a red circle", model="sketchy")
        with pytest.raises(RequestError):
            client.generate("a red circle", model="sketch", size="63x63")
        with pytest.raises(UnknownJobError):
            client.status("nothing")
        with pytest.raises(UnknownJobError):
            list(client.watch("nothing"))
        with pytest.raises(UnknownImageError):
            client.content("0" * 26)
        with pytest.raises(InputError, match=r"'\.\.' is no name"):
            client.status("..")


def test_models_and_renderers_are_listed(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        assert "sketch" in [model.id for model in client.models()]
        assert client.model("sketch").readiness.state in ("loaded", "cold", "warm")
        assert [one.name for one in client.renderers()] == ["renderer-0"]
        assert client.drain("renderer-0").state in ("draining", "drained")
        assert client.drain("renderer-0", drained=False).state not in ("draining", "drained")


def test_a_job_is_submitted_watched_and_read(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        job = client.submit(JOB)
        assert (job.job, job.images) == ("shapes", 4)
        assert client.submit(JOB).created_at == job.created_at
        events = list(client.watch("shapes"))
        landed = [event.data["index"] for event in events if event.kind == "image"]
        assert sorted(landed) == [0, 1, 2, 3]
        assert events[-1].kind == "end"
        assert events[-1].data["state"] == "done"
        assert client.status("shapes").done == 4
        assert [one.job for one in client.jobs()] == ["shapes"]
        rows = list(client.images("shapes"))
        assert [row.index for row in rows] == [0, 1, 2, 3]
        assert client.picture("shapes", 3).startswith(b"\x89PNG")
        with pytest.raises(UnknownImageError, match="image 3 of shapes has no thumbnail"):
            client.picture("shapes", 3, thumbnail=True)
        assert client.sheet("shapes").startswith(b"\x89PNG")
        with pytest.raises(ControlError, match="shapes is done, 4 images; there is nothing to pause"):
            client.pause("shapes")
        with pytest.raises(PlanChangedError):
            client.submit({**JOB, "prompts": ["a green square"]})
        assert client.retry("shapes", images="0,3")["reopened"] == 2
        assert [event.kind for event in client.watch("shapes", images="none")][-1] == "end"


def test_words_to_a_job_hold(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        client.submit({**JOB, "name": "held", "seeds": {"count": 500}, "priority": 10})
        assert client.pause("held")["state"] == "paused"
        assert client.change("held", priority=80)["control"]["priority"] == 80
        assert client.status("held").priority == 80
        with pytest.raises(ControlError, match="nothing to change is given"):
            client.change("held")
        with pytest.raises(ControlError, match="has no pilot"):
            client.approve("held")
        assert client.resume("held")["state"] == "open"
        assert client.cancel("held")["state"] == "cancelled"


def test_a_manifest_s_file_and_line_stand_in_its_error(endpoint: Endpoint, tmp_path: Path) -> None:
    here, there = tmp_path / "here.yaml", tmp_path / "there.yaml"
    here.write_text("name: x\nmodel: sketch\nprompts: [a]\nsteps: 3\n")
    there.write_text("name: x\nmodel: sketch\nprompts:\n  file: captions.txt\n")
    with endpoint.client() as client:
        with pytest.raises(ManifestError, match=f"^{here}:4: "):
            client.submit(here)
        with pytest.raises(
            ManifestError, match=f"^{there}:4: prompts.file: a manifest sent over HTTP reads no files here"
        ):
            client.submit(there)
        with pytest.raises(ManifestError, match="the manifest's name must be a text, got None; it names the job"):
            client.submit({"model": "sketch"})


def test_kept_pictures_are_found_fetched_kept_and_discarded(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        image = client.generate("a yellow triangle", model="sketch", num_inference_steps=1)[0]
        found = _found(client, "yellow triangle")
        assert found.id == image.id
        assert client.single(image.id).seed == image.seed
        assert client.content(image.id) == image.data
        assert client.keep(image.id).record["keep_until"] is None
        client.discard(image.id)
        with pytest.raises(UnknownImageError):
            client.single(image.id)


def _found(client: Client, words: str) -> "farm.client.Single":
    for _ in range(200):
        found = list(client.singles(q=words))
        if found:
            return found[0]
    raise AssertionError(f"no picture of {words} is kept")


def test_the_client_that_awaits_does_the_same(endpoint: Endpoint) -> None:
    async def run() -> None:
        async with endpoint.async_client() as client:
            two = await asyncio.gather(
                *(client.generate("a red circle", model="sketch", seed=seed, num_inference_steps=1) for seed in (1, 2))
            )
            assert [images[0].seed for images in two] == [1, 2]
            await client.submit({**JOB, "name": "awaited"})
            kinds = [event.kind async for event in client.watch("awaited")]
            assert kinds.count("image") == 4
            assert kinds[-1] == "end"
            assert "awaited" in [one.job async for one in client.jobs()]
            assert [row.index async for row in client.images("awaited")] == [0, 1, 2, 3]
            with pytest.raises(UnknownJobError):
                await client.status("nothing")

    asyncio.run(run())
