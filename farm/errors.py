"""Every error that the farm raises on purpose, under one root.

A message says what is wrong, which value, where, and what to do next. `code` is stable: it stands in receipts, in
`--json` output and in metrics. Exit codes are mapped in `farm/cli/exits.py` alone.
"""

from typing import Any, ClassVar, Self


class FarmError(Exception):
    """Root of all errors below. Carries one readable line; survives pickling, since errors cross Ray."""

    code: ClassVar[str] = "farm_error"

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.message,)


# What people write


class InputError(FarmError):
    """Root of what the person who typed it can mend."""

    code = "input"


class SettingsError(InputError):
    """Raised when a `FARM_*` variable, `farm.toml` or a flag has a value that cannot be."""

    code = "settings"


class ManifestError(InputError):
    """Raised when a manifest cannot be read, parsed, or means nothing that can be rendered."""

    code = "manifest"


class PromptError(InputError):
    """Raised when a prompt file, or a row of one, cannot be used."""

    code = "prompts"


class ModelCardError(InputError):
    """Raised when a model card is malformed, or its weights are not where it says."""

    code = "model_card"


class UnknownModelError(InputError):
    """Raised when no model card has the name asked for."""

    code = "unknown_model"


class UnknownJobError(InputError):
    """Raised when the store has no job of that name."""

    code = "unknown_job"


class PictureError(InputError):
    """Raised when a picture file cannot be read or carries no provenance of ours."""

    code = "picture"


class ControlError(InputError):
    """Raised when what is asked of a job cannot be done in the state that it is in."""

    code = "control"


class UnknownRendererError(InputError):
    """Raised when the farm has no renderer of that name."""

    code = "unknown_renderer"


class UnknownImageError(InputError):
    """Raised when no single image of that id is kept."""

    code = "unknown_image"


class RequestError(InputError):
    """Raised when a request to the endpoint asks for what cannot be, or in words that it does not know.

    `param`: the field to mend, where it is one.
    """

    code = "request"

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.message, self.param)


class PlanChangedError(InputError):
    """Raised when a job of that name exists and was planned from something else."""

    code = "plan_changed"


class RowsAppendedError(PlanChangedError):
    """Raised when the only change is rows added to a keyed prompt file: `--append` renders just those."""

    code = "rows_appended"


class NumericsError(FarmError):
    """Raised when this machine cannot render a plan as it was frozen: other library versions, no such device."""

    code = "numerics"


# Stores


class StoreError(FarmError):
    """Root of what object stores answer."""

    code = "store"


class StoreUnavailableError(StoreError):
    """Raised when the store does not answer, or answers that it cannot now. Trying again later may work."""

    code = "store_unavailable"


class StoreDeniedError(StoreError):
    """Raised when the store refuses the credentials, or they lack a right."""

    code = "store_denied"


class BucketMissingError(StoreError):
    """Raised when the bucket is not there."""

    code = "bucket_missing"


class StoreFullError(StoreError):
    """Raised when the disk or the quota is full."""

    code = "store_full"


class ObjectMissingError(StoreError):
    """Raised when an object that was asked for is not there."""

    code = "object_missing"


class RecordError(StoreError):
    """Raised when a record in the store does not parse, or contradicts another."""

    code = "record"


class NewerVersionError(RecordError):
    """Raised when a record was written by a newer farm than this one."""

    code = "newer_version"


class VerifyError(FarmError):
    """Raised when objects differ from what their receipts say."""

    code = "verify"


# Rendering


class RenderError(FarmError):
    """Raised when the pipeline fails on a batch."""

    code = "render"


class PlacementError(FarmError):
    """Raised before anything loads, when a model cannot fit or the device cannot run it soundly."""

    code = "does_not_fit"


class OutOfMemoryError(RenderError):
    """Raised when the device has no memory left for a batch."""

    code = "out_of_memory"


class DeviceLostError(FarmError):
    """Raised when the device itself failed, not the work on it; the renderer's process must end."""

    code = "device_lost"


class CancelledError(FarmError):
    """Raised inside a render when somebody asked it to stop; nothing of the unfinished batch is kept."""

    code = "cancelled"


# The endpoint


class UnauthorizedError(FarmError):
    """Raised when a request has no key, or one that is not known, has expired or was revoked."""

    code = "unauthorized"


class ForbiddenError(FarmError):
    """Raised when a key lacks the scope, or a job or image is somebody else's."""

    code = "forbidden"


class LaterError(FarmError):
    """Root of what is refused now and may be granted later. `retry_after_s`: when to ask again, None if nobody knows."""

    code = "later"

    def __init__(self, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.message, self.retry_after_s)


class LimitedError(LaterError):
    """Raised when a key has used up what it may for now."""

    code = "limited"


class BusyError(LaterError):
    """Raised when the farm cannot take more urgent images for now."""

    code = "busy"


# The live farm


class WaitingError(FarmError):
    """Raised when a job goes no further until a person has spoken: it is paused, a pilot waits, a limit is reached."""

    code = "waiting"


class FarmUnavailableError(FarmError):
    """Raised when Ray or the farm's actors cannot be started or reached."""

    code = "farm_unavailable"


class RendererDiedError(FarmError):
    """Raised, and written into a failed row, when an image ended the renderer that tried it."""

    code = "renderer_died"


class NodeDiedError(RendererDiedError):
    """Raised when a renderer ended with its whole node: nothing that it had in hand is to blame."""

    code = "node_died"


class JobFailedError(FarmError):
    """Raised when a job ended and some of its images failed."""

    code = "images_failed"


def error_of(code: str, message: str) -> FarmError:
    """Return the error that has this code, as it was before it was written down; RenderError for codes not of ours."""
    classes = [FarmError]
    for known in classes:
        classes += known.__subclasses__()
    return next((known for known in classes if known.code == code), RenderError)(message)
