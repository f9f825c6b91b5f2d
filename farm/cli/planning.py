"""From a manifest's file to a checked request and its plan, as `farm plan` and `farm render` both need it."""

from pathlib import Path
from typing import TYPE_CHECKING

from farm.cli.moment import now_iso, user_name, whoami
from farm.cli.terminal import note
from farm.errors import NumericsError

if TYPE_CHECKING:
    from farm.ledger import Ledger
    from farm.settings import Settings
    from farm.submission import Request, Submission


def read_request(manifest: Path, settings: "Settings") -> "Request":
    """Read a manifest and check it against its model card and this machine. Raises InputError, PlacementError."""
    from farm.devices import default_renderers, local_device
    from farm.manifest import load_manifest
    from farm.submission import prepare

    loaded = load_manifest(manifest)
    device = local_device()
    settings = settings.model_copy(update={"owner": settings.owner or user_name()})
    return prepare(loaded, settings, device=device, renderers=settings.renderers or default_renderers(device))


def submit_request(request: "Request", ledger: "Ledger", *, append: bool) -> "Submission":
    """Create or find the job. Raises NumericsError where what is left of it would be rendered with other versions."""
    from farm.devices import PACKAGES
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
    # A renderer has these or must not render; the rest it takes from the plan.
    enforced = {"device", *PACKAGES}
    differ = [one for one in submission.numerics_differ if one.partition(":")[0] in enforced]
    if differ and not ledger.finished(plan):
        raise NumericsError(
            f"job {plan.job} was planned with other numerics ({'; '.join(differ)}) and would mix pictures that differ; "
            "install what it was planned with, or give the manifest a new name"
        )
    return submission
