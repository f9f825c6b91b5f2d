"""Weights from Hugging Face's hub: which commit of an id a plan renders, and its files in the local cache.

The commit is settled once, at planning, so that every renderer loads the same. One that the card names is taken as it
stands. A branch or tag is looked up in the local cache first, then on the hub. Where no branch is named, the one commit
that is cached will do: a job goes on with what it began with. Files are fetched where the cache lacks some; never pickles,
and code where it is named. Imports no torch.
"""

import errno
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from farm.errors import ModelCardError, StoreFullError

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S = 10.0
REPORT_S = 0.5
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
"""What is fetched of a whole model. A GGUF file is fetched by its name alone: its repository has it in many sizes."""


def commit_of(model: str, hub: str, revision: str | None) -> str:
    """Return the commit that `revision` of a hub id, or `main`, stands for. Raises ModelCardError where none can be had."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    wanted = revision or "main"
    try:
        if (commit := _cached_commit(hub, revision)) is not None:
            return commit
        found = HfApi().model_info(hub, revision=wanted, timeout=TIMEOUT_S).sha
    except (HTTPError, HFValidationError, OSError) as exc:
        line = " ".join(str(exc).split())[:300].rstrip(".")
        raise ModelCardError(
            f"model {model}: the commit of {hub} at revision {wanted} is neither in the cache nor to be had from the hub: "
            f"{line}; check the network, the id, the revision and HF_TOKEN, or name a commit as the card's source.revision"
        ) from exc
    if found is None:
        raise ModelCardError(
            f"model {model}: the hub names no commit of {hub} at revision {wanted}; name one in the card"
        )
    return found


def cached(
    hub: str, revision: str | None, *, file: str | None = None, left_out: Sequence[str] = (), code: Sequence[str] = ()
) -> Path | None:
    """Return the folder of a hub id's files in the local cache, or None where it lacks some of those wanted; see `fetch`."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        commit = _cached_commit(hub, revision)
        if file is not None:
            found = try_to_load_from_cache(hub, file, revision=commit or revision or "main")
            return _folder_of(Path(found), file) if isinstance(found, str) else None
        folder = Path(
            snapshot_download(
                hub,
                revision=commit or revision,
                allow_patterns=[*FILES, *code],
                ignore_patterns=list(left_out),
                local_files_only=True,
            )
        )
        return folder if all((folder / name).is_file() for name in code) else None
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def fetch(
    model: str,
    hub: str,
    revision: str | None,
    *,
    file: str | None = None,
    left_out: Sequence[str] = (),
    code: Sequence[str] = (),
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Return the folder of a hub id's files, or of one, downloading at its revision what is not cached.

    A download that was killed is taken up again. `left_out`: patterns of files that are not wanted; `code`: names of Python
    files that are. Raises ModelCardError, StoreFullError.
    """
    if (here := cached(hub, revision, file=file, left_out=left_out, code=code)) is not None:
        return here
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    wanted = [file] if file else [*FILES, *code]
    try:
        with _reported(hub, revision, wanted, left_out, report):
            if file is not None:
                return _folder_of(Path(hf_hub_download(hub, file, revision=revision)), file)
            return Path(
                snapshot_download(hub, revision=revision, allow_patterns=wanted, ignore_patterns=list(left_out))
            )
    except (HTTPError, HFValidationError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError(
                f"model {model}: no room for {hub} in {_cache()}: {exc.strerror}; make room there, or name another folder in "
                "HF_HUB_CACHE"
            ) from exc
        raise ModelCardError(
            f"model {model}: {hub} at revision {revision or 'main'} cannot be fetched from the hub: {exc}; check "
            f"the network, the id, the revision and HF_TOKEN"
        ) from exc


@contextmanager
def _reported(
    hub: str,
    revision: str | None,
    wanted: Sequence[str],
    left_out: Sequence[str],
    report: Callable[[int, int], None] | None,
) -> Iterator[None]:
    """Tell `report` now and then how many bytes of a download have come; the cache's files say it, whatever fetches them."""
    if report is None:
        yield
        return
    from huggingface_hub import snapshot_download

    plan = snapshot_download(
        hub, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(left_out), dry_run=True
    )
    total = sum(info.file_size or 0 for info in plan)
    missing = sum(info.file_size or 0 for info in plan if info.will_download)
    blobs = _repository(hub) / "blobs"
    before = _bytes_in(blobs)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(REPORT_S):
            report(total - missing + min(missing, max(0, _bytes_in(blobs) - before)), total)

    watcher = threading.Thread(target=watch, name="farm-hub-report", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    report(total, total)


def _bytes_in(folder: Path) -> int:
    """Bytes on disk; a download may reserve a file's whole length before its bytes come."""
    found = 0
    for path in folder.glob("*"):
        try:
            found += path.stat().st_blocks * 512
        except FileNotFoundError:  # renamed just now
            continue
    return found


def _cached_commit(hub: str, revision: str | None) -> str | None:
    """The commit of which files are cached: that of a branch or tag, else, where no branch is named, the only one there is.

    A commit fetched by its name leaves no branch in the cache.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    validate_repo_id(hub)
    folder = _repository(hub)
    branch = folder / "refs" / (revision or "main")
    if branch.is_file() and (folder / "snapshots" / (commit := branch.read_text().strip())).is_dir():
        return commit
    snapshots = folder / "snapshots"
    commits = [path.name for path in snapshots.iterdir()] if revision is None and snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 and COMMIT.fullmatch(commits[0]) else None


def _folder_of(found: Path, file: str) -> Path:
    return found.parents[len(Path(file).parts) - 1]


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repository(hub: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return _cache() / repo_folder_name(repo_id=hub, repo_type="model")
