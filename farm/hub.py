"""Which commit of a Hugging Face hub id a plan renders: settled once, at planning, so that every renderer loads the same.

A commit that the card names is taken as it stands. A branch or tag is looked up in the local cache first, then on the
hub. Where no branch is named, the one commit that is cached will do: a job goes on with what it began with. Imports no
torch.
"""

import re
from pathlib import Path

from farm.errors import ModelCardError

COMMIT = re.compile(r"[0-9a-f]{40}")
TIMEOUT_S = 10.0
INDEX_FILE = "model_index.json"


def commit_of(model: str, hub: str, revision: str | None) -> str:
    """Return the commit that `revision` of a hub id, or `main`, stands for. Raises ModelCardError where none can be had."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    wanted = revision or "main"
    try:
        cached = try_to_load_from_cache(hub, INDEX_FILE, revision=wanted)
        if isinstance(cached, str):
            return Path(cached).parent.name
        if revision is None and (only := _only_snapshot(hub)):
            return only
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


def _only_snapshot(hub: str) -> str | None:
    """The one commit of which files are cached; a commit fetched by its name leaves no branch in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub, repo_type="model") / "snapshots"
    commits = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return commits[0] if len(commits) == 1 and COMMIT.fullmatch(commits[0]) else None
