"""Where weights are found, which they are, and how they get here from the hub and from buckets."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from farm import weights
from farm.cardparts import Adapter, Denoiser, Source
from farm.errors import ModelCardError, NumericsError, StoreFullError, StoreUnavailableError
from farm.hub import FILES as FILES_OF_THE_HUB
from farm.settings import Settings, load_settings
from farm.storage.base import ObjectStore
from farm.storage.local import LocalStore
from farm.weights import are_here, export, locate, locate_file, locate_source, pinned
from tests.drawing import card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": b"{}",
    "transformer/config.json": b"{}",
    "transformer/a.safetensors": b"a" * 100,
    "vae/config.json": b"{}",
    "vae/v.safetensors": b"v",
    "transformer/old.bin": b"pickle",
}
CODE = {"pipeline.py": b"import os", "transformer/other.py": b"import sys"}
GGUF = Denoiser(s3="s3://farm/ggufs", file="q/m-Q4.gguf", format="gguf")
ADAPTER = Adapter(s3="s3://farm/ggufs", file="l.safetensors", name="l")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(weights=tmp_path / "copies")


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of the buckets that are opened; each is a folder."""
    urls: list[str] = []

    def open_store(url: str, settings: Settings) -> ObjectStore:
        urls.append(url)
        return LocalStore(tmp_path / url.removeprefix("s3://"))

    monkeypatch.setattr(weights, "open_store", open_store)
    model = LocalStore(tmp_path / "farm" / "model")
    for key, data in (FILES | CODE).items():
        model.put(key, data)
    ggufs = LocalStore(tmp_path / "farm" / "ggufs")
    for key in ("q/m-Q4.gguf", "q/m-Q8.gguf", "l.safetensors"):
        ggufs.put(key, key.encode())
    return urls


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `some/model` in an empty cache of the hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--some--model"


def files_in(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


BUCKET = card().model_copy(update={"source": Source(s3="s3://farm/model")})
CODED = BUCKET.model_copy(update={"code": {"pipeline.py": "0" * 64}})


def test_a_model_in_a_bucket_is_copied_once(opened: list[str], settings: Settings, tmp_path: Path) -> None:
    assert not are_here(BUCKET, settings=settings)
    folder = locate(BUCKET, settings=settings)
    assert files_in(folder) == sorted(set(FILES) - {"transformer/old.bin"})
    assert folder.parent.parent == tmp_path / "copies"
    assert folder.parent.name.startswith("farm-model-")
    assert are_here(BUCKET, settings=settings)
    assert locate(BUCKET, settings=settings) == folder


def test_a_copy_of_the_planned_revision_needs_no_bucket(opened: list[str], settings: Settings) -> None:
    planned = pinned(BUCKET, settings=settings)
    folder = locate(planned, settings=settings)
    opened.clear()
    assert locate(planned, settings=settings) == folder
    assert are_here(planned, settings=settings)
    assert opened == []


def test_other_weights_in_the_bucket_than_the_plans_are_refused(
    opened: list[str], settings: Settings, tmp_path: Path
) -> None:
    planned = pinned(BUCKET, settings=settings)
    LocalStore(tmp_path / "farm" / "model").put("vae/v.safetensors", b"w")
    now = pinned(BUCKET, settings=settings).source.revision
    with pytest.raises(NumericsError) as caught:
        locate(planned, settings=settings)
    assert caught.value.message.startswith(
        f"model sketch: the plan was made with weights {planned.source.revision}, s3://farm/model holds {now}; put the old"
    )


def test_of_a_part_that_the_card_replaces_only_settings_are_copied(opened: list[str], settings: Settings) -> None:
    replaced = BUCKET.model_copy(update={"denoiser": GGUF})
    assert files_in(locate(replaced, settings=settings)) == [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "vae/v.safetensors",
    ]
    replaced = BUCKET.model_copy(update={"decoder": Source(s3="s3://farm/model/vae")})
    assert "vae/v.safetensors" not in files_in(locate(replaced, settings=settings))
    assert replaced.decoder is not None
    assert files_in(locate_source(replaced, replaced.decoder, settings=settings)) == ["config.json", "v.safetensors"]


def test_code_in_a_bucket_is_copied_where_the_card_pins_it(opened: list[str], settings: Settings) -> None:
    locate(BUCKET, settings=settings)
    assert not are_here(CODED, settings=settings)
    assert sorted(set(files_in(locate(CODED, settings=settings))) & CODE.keys()) == ["pipeline.py"]
    assert are_here(CODED, settings=settings)
    planned = pinned(CODED, settings=settings)
    assert planned.source.revision != pinned(BUCKET, settings=settings).source.revision
    opened.clear()
    assert (locate(planned, settings=settings) / "pipeline.py").is_file()
    assert opened == []


def test_of_a_bucket_with_many_files_the_one_that_is_named_is_copied(opened: list[str], settings: Settings) -> None:
    file = locate_file(BUCKET, GGUF, settings=settings)
    assert file.read_bytes() == b"q/m-Q4.gguf"
    assert files_in(file.parents[1]) == ["q/m-Q4.gguf"]
    absent = GGUF.model_copy(update={"file": "q/m-Q5.gguf"})
    with pytest.raises(ModelCardError, match=r"s3://farm/ggufs/q/m-Q5\.gguf is not there; mend the card"):
        locate_file(BUCKET, absent, settings=settings)


def test_a_prefix_without_weights_is_refused(opened: list[str], settings: Settings) -> None:
    empty = BUCKET.model_copy(update={"source": Source(s3="s3://farm/nothing")})
    with pytest.raises(ModelCardError, match="looked for in a bucket and s3://farm/nothing has none; mend the card"):
        locate(empty, settings=settings)


def test_a_store_that_is_away_stays_a_stores_error(
    opened: list[str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: LocalStore, prefix: str, *, after: str = "") -> None:
        raise StoreUnavailableError("the store is away")

    monkeypatch.setattr(LocalStore, "list", away)
    with pytest.raises(StoreUnavailableError, match="the store is away"):
        pinned(BUCKET, settings=settings)


def test_pinned_covers_every_source_and_follows_each(opened: list[str], settings: Settings, tmp_path: Path) -> None:
    whole = BUCKET.model_copy(
        update={"denoiser": GGUF, "decoder": Source(path=str(tmp_path / "farm/model/vae")), "adapters": (ADAPTER,)}
    )

    def revisions() -> tuple[str | None, ...]:
        found = pinned(whole, settings=settings)
        assert found.denoiser is not None
        assert found.decoder is not None
        return (
            found.source.revision, found.denoiser.revision, found.decoder.revision, found.adapters[0].revision
        )  # fmt: skip

    before = revisions()
    assert len(set(before)) == 4
    assert all(revision is not None and revision.startswith("sha256:") for revision in before)
    ggufs = LocalStore(tmp_path / "farm" / "ggufs")
    ggufs.put("q/m-Q8.gguf", b"another size is nothing to this card")
    assert revisions() == before
    ggufs.put("l.safetensors", b"retrained")
    assert [now == then for now, then in zip(revisions(), before, strict=True)] == [True, True, True, False]


def test_a_file_in_a_folder_is_found_and_pinned_by_itself(tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    adapter = Adapter(path=str(folder), file="l.safetensors", name="l")
    owner = card().model_copy(update={"adapters": (adapter,)})
    with pytest.raises(ModelCardError, match=r"loras/l\.safetensors is not there; fetch it, or mend the card"):
        locate_file(owner, adapter)
    (folder / "l.safetensors").write_bytes(b"one")
    assert locate_file(owner, adapter) == folder / "l.safetensors"
    planned = pinned(owner).adapters[0]
    (folder / "other.safetensors").write_bytes(b"")
    assert locate_file(owner, planned) == folder / "l.safetensors"
    (folder / "l.safetensors").write_bytes(b"two")
    with pytest.raises(NumericsError, match="put the old weights back"):
        locate_file(owner, planned)


def test_a_cached_hub_id_needs_no_network(hub: Path) -> None:
    snapshot = hub / "snapshots" / COMMIT
    (snapshot / "unsloth").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "unsloth" / "q.gguf").write_bytes(b"")
    source = Source(hub="some/model", revision=COMMIT)
    here = card().model_copy(update={"source": source})
    assert are_here(here)
    assert locate(here) == snapshot
    file = Denoiser(hub="some/model", file="unsloth/q.gguf", format="gguf")
    assert locate_file(here, file) == snapshot / "unsloth" / "q.gguf"
    absent = here.model_copy(update={"denoiser": file.model_copy(update={"file": "q8.gguf"})})
    assert not are_here(absent)


def test_what_the_cache_lacks_is_fetched_without_the_replaced_part(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def snapshot_download(
        hub_id: str, *, local_files_only: bool = False, dry_run: bool = False, **more: object
    ) -> object:
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        if dry_run:
            return [
                SimpleNamespace(file_size=600, will_download=True),
                SimpleNamespace(file_size=400, will_download=False),
            ]
        asked.append({"hub": hub_id, **more})
        return str(hub / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    fetched = card().model_copy(update={"source": Source(hub="some/model", revision=COMMIT), "denoiser": GGUF})
    told: list[tuple[int, int]] = []
    assert locate(fetched, report=lambda done, total: told.append((done, total))) == hub / "snapshots" / COMMIT
    assert told[-1] == (1000, 1000)
    (call,) = asked
    assert call["ignore_patterns"] == ["transformer/*.safetensors", "unet/*.safetensors"]
    assert "*.bin" not in str(call["allow_patterns"])


def test_code_of_a_hub_id_is_fetched_where_the_card_pins_it(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    asked: list[object] = []

    def snapshot_download(hub_id: str, *, local_files_only: bool = False, **more: object) -> str:
        if not local_files_only:
            asked.append(more["allow_patterns"])
            (snapshot / "pipeline.py").write_bytes(b"")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    coded = CODED.model_copy(update={"source": Source(hub="some/model", revision=COMMIT)})
    plain = coded.model_copy(update={"code": {}})
    assert (are_here(plain), are_here(coded)) == (True, False)
    assert locate(plain) == locate(coded) == snapshot
    assert asked == [[*FILES_OF_THE_HUB, "pipeline.py"]]
    assert are_here(coded)
    assert not any(".py" in pattern for pattern in FILES_OF_THE_HUB)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (ConnectionError("no route"), ModelCardError, "cannot be fetched from the hub: no route; check the network"),
        (OSError(errno.ENOSPC, "No space left on device"), StoreFullError, "no room for some/model in .*HF_HUB_CACHE"),
    ],
)
def test_a_fetch_that_fails_says_why(
    error: Exception, raised: type[Exception], message: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hf_hub_download(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(raised, match=message):
        locate_file(card(), Denoiser(hub="some/model", file="q.gguf", format="gguf"))


def test_a_source_that_names_no_place_is_refused() -> None:
    with pytest.raises(ModelCardError, match="without a path, a hub id or a bucket has no weights; mend the card"):
        locate(card().model_copy(update={"source": Source()}))


def test_a_renderer_finds_weights_by_the_settings_of_who_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("FARM_S3_ENDPOINT", "FARM_S3_REGION", "FARM_S3_ADDRESSING", "FARM_WEIGHTS", "FARM_REMOTE_CODE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    export(Settings(s3_endpoint="http://store:9000", s3_addressing="path", weights=Path("/fast")))
    found = load_settings()
    assert (found.s3_endpoint, found.s3_addressing, found.weights) == ("http://store:9000", "path", Path("/fast"))
    export(Settings(weights=Path("/other")))
    assert os.environ["FARM_WEIGHTS"] == "/fast"


@pytest.mark.parametrize(
    ("own", "given", "allowed"),
    [(None, ("0" * 64,), ("0" * 64,)), (None, None, ()), ("[]", ("0" * 64,), ()), (f'["{"1" * 64}"]', (), ("1" * 64,))],
    ids=["who started it allows", "nobody does", "the node does not", "the node does"],
)
def test_what_a_node_says_of_code_goes_before_who_started_the_renderer(
    monkeypatch: pytest.MonkeyPatch, own: str | None, given: tuple[str, ...] | None, allowed: tuple[str, ...]
) -> None:
    monkeypatch.setenv("FARM_REMOTE_CODE", own or "")  # so that it is put back
    if own is None:
        monkeypatch.delenv("FARM_REMOTE_CODE")
    export(Settings() if given is None else Settings(remote_code=given))
    assert load_settings().remote_code == allowed


def test_what_a_nodes_own_file_says_of_code_goes_before_who_started_the_renderer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_REMOTE_CODE", "")  # so that it is put back
    monkeypatch.delenv("FARM_REMOTE_CODE")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "farm.toml").write_text("remote_code = []\n")
    export(Settings(remote_code=("0a" * 32,)))
    assert load_settings().remote_code == ()
