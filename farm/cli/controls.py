"""`farm pause`, `resume`, `cancel`, `approve`, `change`: what is said to a job.

A control is an object in the store, written before the command answers. A farm at work on the job looks for it every
second and stops within a denoising step; nothing here attaches to one, which takes longer than that. With an endpoint's
address the control is said to that farm, which writes it.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli import remote
from farm.cli.exits import Exit
from farm.cli.jobs import Job
from farm.cli.moment import now_iso, whoami
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json
from farm.errors import ControlError

if TYPE_CHECKING:
    from farm.controls import Said


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "pause", remote=True)(pause)
    command(app, "resume", remote=True)(resume)
    command(app, "cancel", remote=True)(cancel)
    command(app, "approve", remote=True)(approve)
    command(app, "change", remote=True)(change)


def pause(options: Options, job: Job) -> Exit:
    """Hold a job until `farm resume`; what is stored stays.

    Renderers at work on it stop within a denoising step and take other jobs. `farm render` does not lift a pause by itself.
    """
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.show_said(options, farm.pause(job))
    from farm import controls

    return _ended(options, controls.pause(options.open_ledger(), job, at=now_iso(), by=whoami()))


def resume(options: Options, job: Job) -> Exit:
    """Let a job that was paused or cancelled go on.

    Starts nothing: a farm that runs goes on with it within seconds.
    """
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.show_said(options, farm.resume(job))
    from farm import controls

    said = controls.resume(options.open_ledger(), job, at=now_iso(), by=whoami())
    ended = _ended(options, said, needs_farm=said.control is not None)
    if said.control is None and said.state == "open" and not options.json:
        note(f"a farm that had stopped it tries again with: farm retry {job}, or farm render of its manifest")
    return ended


def cancel(options: Options, job: Job) -> Exit:
    """Stop a job; what is stored stays.

    Renderers at work on it stop within a denoising step. `farm resume`, or `farm render` of its manifest, goes on with it.
    """
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.show_said(options, farm.cancel(job))
    from farm import controls

    return _ended(options, controls.cancel(options.open_ledger(), job, at=now_iso(), by=whoami()))


def approve(options: Options, job: Job) -> Exit:
    """Let the images follow that a job's pilot left out.

    Look at the pilot's contact sheet first; `farm status JOB` says where it is. Said before the pilot is done, the job does
    not wait.
    """
    if (farm := options.endpoint()) is not None:
        with farm:
            return remote.show_said(options, farm.approve(job))
    from farm import controls

    return _ended(options, controls.approve(options.open_ledger(), job, at=now_iso(), by=whoami()), needs_farm=True)


def change(
    options: Options,
    job: Job,
    priority: Annotated[
        int | None, typer.Option("--priority", metavar="N", help="0 to 100; higher goes first.")
    ] = None,
    max_images: Annotated[
        int | None, typer.Option("--max-images", metavar="N", help="Stop when so many images are rendered.")
    ] = None,
    gpu_hours: Annotated[
        float | None, typer.Option("--gpu-hours", metavar="H", help="Stop when its GPUs worked so many hours.")
    ] = None,
    finish_by: Annotated[
        str | None,
        typer.Option("--finish-by", metavar="T", help="Stop at this moment, as 2026-12-01T09:00+08:00."),
    ] = None,
) -> Exit:
    """Change a job's priority or limits; the manifest stays as it is.

    A job that stopped at a limit goes on when the limit is raised.
    """
    from farm.limits import Changes

    changes = Changes(priority=priority, finish_by=finish_by, gpu_hours=gpu_hours, max_images=max_images)
    if not changes.given:
        raise ControlError(
            f"nothing to change of {job} is given; give --priority, --max-images, --gpu-hours or --finish-by"
        )
    if (farm := options.endpoint()) is not None:
        with farm:
            given = dataclasses.asdict(changes)
            return remote.show_said(options, farm.change(job, **given))
    from farm import controls

    said = controls.change(options.open_ledger(), job, changes, at=now_iso(), by=whoami())
    limited = any(limit is not None for limit in (finish_by, gpu_hours, max_images))
    return _ended(options, said, needs_farm=limited and said.control is not None)


def goes_on(job: str) -> str:
    """Say what renders a job to which something was said that lets it go on."""
    return f"a farm that runs goes on with it; where none runs: farm retry {job}, or farm render of its manifest"


def _ended(options: Options, said: "Said", *, needs_farm: bool = False) -> Exit:
    if options.json:
        control = said.control.model_dump(exclude={"version"}, exclude_none=True) if said.control else None
        print_json({"job": said.job, "state": said.state, "control": control, "message": said.message})
        return Exit.OK
    note(said.message)
    if needs_farm and said.state == "open":
        note(goes_on(said.job))
    return Exit.OK
