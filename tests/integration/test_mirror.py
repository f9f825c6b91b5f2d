"""A model's weights in a real bucket: pinned, copied once by racing processes, drawn with."""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import farm.sketch
from farm.cardparts import Source
from farm.devices import local_device, numerics_for
from farm.engine import Engine, Picture
from farm.errors import ModelCardError, NumericsError
from farm.modelcard import ModelCard, find_card
from farm.plan import ImageSpec
from farm.settings import Settings
from farm.storage.s3 import S3Store
from farm.weights import export, locate, pinned
from tests.integration.servers import S3Server

WEIGHTS = Path(farm.sketch.__file__).parent / "weights"


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A prefix with the sketch model in it, and a pickle and a program that nobody wants."""
    store = s3_server.store(monkeypatch)
    for file in WEIGHTS.rglob("*"):
        if file.is_file():
            store.put(str(file.relative_to(WEIGHTS)), file.read_bytes())
    store.put("vae/old.bin", b"pickle")
    store.put("run.py", b"import os")
    return store


@pytest.fixture
def settings(s3_server: S3Server, tmp_path: Path) -> Settings:
    return Settings(s3_endpoint=s3_server.endpoint, s3_addressing="path", weights=tmp_path / "copies")


def card_of(store: S3Store) -> ModelCard:
    return find_card("sketch", Settings()).model_copy(update={"source": Source(s3=store.url)})


def locate_here(card: ModelCard, settings: Settings) -> str:
    return str(locate(card, settings=settings))


def draw(card: ModelCard) -> np.ndarray:
    pictures: list[Picture] = []
    engine = Engine(card, numerics_for(card, device=local_device(), renderers=1), "cpu", 16.0)
    engine.load()
    spec = ImageSpec(index=0, row=0, key=None, prompt="a red circle", seed=3, params=card.defaults, carry={})
    engine.render([spec], on_picture=pictures.append, on_step=lambda step: None, cancelled=lambda: False)
    engine.unload()
    return np.asarray(pictures[0].pixels)


def test_processes_that_ask_at_once_share_one_copy(bucket: S3Store, settings: Settings) -> None:
    card = pinned(card_of(bucket), settings=settings)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        asked = [pool.submit(locate_here, card, settings) for _ in range(4)]
        (folder,) = {Path(one.result()) for one in asked}
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == {
        info.key for info in bucket.list("") if not info.key.endswith((".bin", ".py", ".md"))
    }
    assert json.loads((folder / "model_index.json").read_text()) == json.loads(
        (WEIGHTS / "model_index.json").read_text()
    )
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_model_from_a_bucket_draws_as_the_same_model_from_a_folder(
    bucket: S3Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FARM_S3_ENDPOINT", "FARM_S3_ADDRESSING", "FARM_WEIGHTS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    export(settings)
    assert np.array_equal(draw(pinned(card_of(bucket))), draw(find_card("sketch", Settings())))


def test_a_changed_bucket_is_another_revision(bucket: S3Store, settings: Settings) -> None:
    planned = pinned(card_of(bucket), settings=settings)
    copied = locate(planned, settings=settings)
    bucket.put("model_index.json", b"{ }")
    assert locate(planned, settings=settings) == copied
    shutil.rmtree(copied)
    with pytest.raises(NumericsError, match="put the old weights back"):
        locate(planned, settings=settings)


def test_a_bucket_that_is_not_there_is_named(s3_server: S3Server, bucket: S3Store, settings: Settings) -> None:
    elsewhere = card_of(bucket).model_copy(update={"source": Source(s3="s3://no-such-bucket-here/x")})
    with pytest.raises(ModelCardError, match="'no-such-bucket-here' is not at"):
        locate(elsewhere, settings=settings)
