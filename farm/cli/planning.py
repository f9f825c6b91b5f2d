"""From a manifest's file to a checked request and its plan, as `farm plan` and `farm render` both need it."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from farm.cli.moment import now_iso, user_name, whoami
from farm.cli.terminal import note
from farm.errors import NumericsError

if TYPE_CHECKING:
    from farm.devices import DeviceInfo
    from farm.ledger import Ledger
    from farm.manifest import LoadedManifest
    from farm.settings import Settings
    from farm.submission import Request, Submission

STDIN = "-"


def read_request(manifest: Path, settings: "Settings", *, device: "DeviceInfo | None" = None) -> "Request":
    """Read a manifest and check it against its model card and this machine, or another device. Raises InputError,
    PlacementError."""
    from farm.devices import default_renderers, local_device
    from farm.submission import prepare

    loaded = load(manifest, settings)
    device = device or local_device()
    settings = settings.model_copy(update={"owner": settings.owner or user_name()})
    return prepare(loaded, settings, device=device, renderers=settings.renderers or default_renderers(device))


def load(manifest: Path, settings: "Settings") -> "LoadedManifest":
    """Read a manifest, of `-` what comes on stdin, with what it includes. Raises ManifestError."""
    from farm.errors import ManifestError
    from farm.manifest import load_manifest, manifest_in
    from farm.sources import read_object
    from farm.storage.opening import open_store
    from farm.yamlfile import MAX_BYTES, parse_yaml

    read_url = partial(read_object, open_store=partial(open_store, settings=settings), most_bytes=MAX_BYTES)
    if str(manifest) != STDIN:
        return load_manifest(manifest, read_url=read_url)
    document = parse_yaml(sys.stdin.buffer.read(MAX_BYTES + 1), "stdin", ManifestError, what="manifest")
    return manifest_in(document, Path.cwd(), read_url=read_url)


def submit_request(request: "Request", ledger: "Ledger", *, append: bool) -> "Submission":
    """Create or find the job. Raises NumericsError where what is left of it would be rendered with other versions."""
    from farm.submission import submit

    submission = submit(request, ledger, now=now_iso(), by=whoami(), append=append)
    plan = submission.plan
    if submission.changed:
        note(f"the manifest changes {plan.job}: {'; '.join(submission.changed)}")
    if submission.kept:
        holds = "; ".join(submission.kept)
        note(f"note: what was said to {plan.job} holds, unlike the manifest: {holds}; farm change says otherwise")
    if submission.outcome == "created" and submission.numerics_differ:
        note(
            f"note: the added rows are rendered with other numerics than the run before them: "
            f"{'; '.join(submission.numerics_differ)}"
        )
        return submission
    # A renderer has these or must not render; the rest it takes from the plan. What is not here at all may be where it renders.
    enforced = {"device", *request.numerics.versions}
    differ = [one for one in submission.numerics_differ if one.partition(":")[0] in enforced]
    if differ and not ledger.finished(plan):
        raise NumericsError(
            f"job {plan.job} was planned with other numerics ({'; '.join(differ)}) and would mix pictures that differ; "
            "install what it was planned with, or give the manifest a new name"
        )
    return submission
