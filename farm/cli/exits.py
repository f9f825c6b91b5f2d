"""Exit codes: the one place where an error becomes one."""

from enum import IntEnum

from farm.errors import (
    CancelledError,
    DeviceLostError,
    FarmError,
    FarmUnavailableError,
    ForbiddenError,
    InputError,
    JobFailedError,
    LaterError,
    NumericsError,
    PlacementError,
    RendererDiedError,
    RenderError,
    StoreError,
    UnauthorizedError,
    VerifyError,
    WaitingError,
)


class Exit(IntEnum):
    """What a script may rely on."""

    OK = 0
    UNEXPECTED = 1
    INPUT = 2
    STORE = 3
    MODEL = 4
    IMAGES_FAILED = 5
    UNAVAILABLE = 6
    DIFFERENT = 7
    CANCELLED = 8
    WAITING = 9
    WARNED = 10
    INTERRUPTED = 130
    BROKEN_PIPE = 141


MEANINGS = {
    Exit.OK: "done",
    Exit.UNEXPECTED: "an error that should not be: run again with -v for the traceback",
    Exit.INPUT: "bad input: a flag, a manifest, a prompt file, a setting, a key",
    Exit.STORE: "the store: away, refused, full, or a record in it is damaged",
    Exit.MODEL: "the model cannot run here, or not as the job was planned",
    Exit.IMAGES_FAILED: "the job ended and some images failed",
    Exit.UNAVAILABLE: "the farm cannot be started or reached, is busy, or no renderer lives",
    Exit.DIFFERENT: "verify or reproduce found differences, doctor found a fault",
    Exit.CANCELLED: "the job was cancelled or deleted before it was done",
    Exit.WAITING: "the job waits for a person: paused, a pilot done, a limit reached",
    Exit.WARNED: "farm lint --strict warns of more than the model's licence",
    Exit.INTERRUPTED: "interrupted; the same command goes on",
}

EPILOG = "Exit codes:\n" + "\n".join(f"{int(code):>4}  {meaning}" for code, meaning in MEANINGS.items())

# The first class that fits counts.
_CODES: tuple[tuple[type[FarmError], Exit], ...] = (
    (InputError, Exit.INPUT),
    (UnauthorizedError, Exit.INPUT),
    (ForbiddenError, Exit.INPUT),
    (LaterError, Exit.UNAVAILABLE),
    (StoreError, Exit.STORE),
    (VerifyError, Exit.DIFFERENT),
    (CancelledError, Exit.CANCELLED),
    (WaitingError, Exit.WAITING),
    (JobFailedError, Exit.IMAGES_FAILED),
    (FarmUnavailableError, Exit.UNAVAILABLE),
    (RendererDiedError, Exit.UNAVAILABLE),
    (DeviceLostError, Exit.UNAVAILABLE),
    (NumericsError, Exit.MODEL),
    (PlacementError, Exit.MODEL),
    (RenderError, Exit.MODEL),
)


def exit_code(error: FarmError) -> Exit:
    """Return the exit code of an error of the farm."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), Exit.UNEXPECTED)


def exit_code_of(code: str) -> Exit:
    """Return the exit code of an error that is known by its stable `code` only."""
    kinds: list[type[FarmError]] = [FarmError]
    for kind in kinds:
        if kind.code == code:
            return exit_code(kind(code))
        kinds.extend(kind.__subclasses__())
    return Exit.UNEXPECTED
