"""`farm verify`, `farm reproduce`, `farm pull`: what is done with pictures that are there."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.exits import Exit
from farm.cli.following import counting, spinner
from farm.cli.jobs import Job
from farm.cli.options import Options, command
from farm.cli.terminal import note, print_json, say
from farm.cli.wording import count, cut, size
from farm.errors import PictureError

if TYPE_CHECKING:
    from farm.verify import Finding, Verification

SHOWN_FINDINGS = 100
JSON_FINDINGS = 10_000


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "verify")(verify)
    command(app, "reproduce")(reproduce)
    command(app, "pull")(pull)


def verify(
    options: Options,
    job: Job,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, metavar="N", help="Read only so many pictures, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides which pictures a sample has.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="Pictures read at a time.")] = 8,
    rewrite: Annotated[
        bool, typer.Option("--rewrite", help="First write the dataset, sheet and totals again from the receipts.")
    ] = False,
) -> Exit:
    """Compare a job's rows with its pictures and its dataset.

    Every picture is read again: that it is there, its size, sha256 and that it decodes; every receipt is compared with
    the plan, and the dataset with the receipts. Objects that no row names are counted and harmless.
    """
    from farm.export import finalise
    from farm.verify import verify as verify_run

    ledger = options.open_ledger()
    ledger.plan(job)
    results: list[Verification] = []
    findings: list[Finding] = []

    def report(finding: "Finding") -> None:
        if len(findings) < JSON_FINDINGS:
            findings.append(finding)
        if not options.json and len(findings) <= SHOWN_FINDINGS:
            say(f"{finding.kind}: {finding.message}")
        if not options.json and len(findings) == SHOWN_FINDINGS + 1:
            note(f"more than {SHOWN_FINDINGS} findings; the rest is counted, --json lists {JSON_FINDINGS:,}")

    for plan in ledger.plans(job):
        if rewrite:
            finalise(ledger, plan, ledger.passes(plan), rewrite=True)
        with counting("verifying", min(sample or plan.images, plan.images), quiet=options.json) as counted:
            results.append(
                verify_run(
                    ledger,
                    plan,
                    sample=sample,
                    seed=seed,
                    threads=threads,
                    report=report,
                    progress=lambda result: counted(result.checked),
                )
            )
    sound = all(result.sound for result in results)
    if options.json:
        print_json(
            {"job": job, "sound": sound, "runs": [_record(one) for one in results], "findings": _dicts(findings)}
        )
    else:
        for result in results:
            say(_sentence(result))
    return Exit.OK if sound else Exit.DIFFERENT


def pull(
    options: Options,
    job: Job,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder; one that a pull began is gone on with.")],
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="Pictures copied at a time.")] = 8,
) -> Exit:
    """Copy a job's pictures and dataset into a folder.

    Hugging Face datasets reads it as an ImageFolder. Stopped half way, the same command goes on; files that are not the
    farm's are never written over.
    """
    from farm.pull import pull as pull_runs
    from farm.status import job_status

    ledger = options.open_ledger()
    ledger.plan(job)
    found = job_status(ledger, job)
    if found.state != "done":
        note(f"note: {job} is not done; what is there is copied ({found.done:,} of {found.images:,} images)")
    with counting("copying", found.images, quiet=options.json) as counted:
        pulled = pull_runs(ledger, ledger.plans(job), to, threads=threads, progress=lambda now: counted(now.pictures))
    if options.json:
        print_json({"job": job, "to": str(to), **dataclasses.asdict(pulled)})
    else:
        kept = f", {pulled.kept:,} of them were there" if pulled.kept else ""
        say(f"{job}: {count(pulled.pictures, 'picture')}, {size(pulled.size_bytes)} in {to}{kept}")
        if pulled.failed:
            note(f"{count(pulled.failed, 'image')} failed and has no picture; the dataset's rows say why")
    return Exit.OK


def reproduce(
    options: Options,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A picture that the farm made.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Keep the new rendering here.")] = None,
    tolerance: Annotated[
        int, typer.Option("--tolerance", min=0, max=255, help="Levels of 255 that a pixel may differ by.")
    ] = 2,
) -> Exit:
    """Render a picture again from its own provenance, and compare."""
    from farm.devices import local_device
    from farm.engine import Engine
    from farm.modelcard import find_card
    from farm.provenance import encode_picture, read_picture
    from farm.reproduce import reproduce as render_again
    from farm.weights import pinned

    settings = options.settings()
    picture = read_picture(file)
    if out is not None and out.exists():
        raise PictureError(f"{out} exists and is not written over; name another file")
    device = "cuda:0" if local_device().kind == "cuda" else "cpu"
    card = pinned(find_card(str(picture.provenance.model["name"]), settings), settings=settings)
    with spinner(f"rendering it again with {card.name}"):
        found = render_again(
            picture,
            card,
            engine=lambda card, numerics: Engine(card, numerics, device, settings.vram_gib),
            device=device,
        )
    if out is not None:
        _write(out, encode_picture(found.pixels, found.provenance))
    same = found.identical or found.max_difference <= tolerance
    if options.json:
        print_json(
            {
                "file": str(file),
                "identical": found.identical,
                "max_difference": found.max_difference,
                "differing": found.differing,
                "notes": list(found.notes),
                "out": str(out) if out else None,
            }
        )
    else:
        provenance = found.provenance
        say(f"{file}: image {provenance.index}, seed {provenance.seed}: {cut(provenance.prompt, 100)}")
        if found.identical:
            say("  every pixel is the same")
        else:
            say(
                f"  {100 * found.differing:.2g} % of the pixels differ, by {found.max_difference} of 255 levels at most"
            )
        for one in found.notes:
            say(f"  note: {one}")
    return Exit.OK if same else Exit.DIFFERENT


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as exc:
        raise PictureError(f"{path} cannot be written: {exc.strerror}; name another file") from exc


def _record(result: "Verification") -> dict[str, Any]:
    return {**dataclasses.asdict(result), "findings": dict(result.findings), "sound": result.sound}


def _dicts(findings: list["Finding"]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(finding) for finding in findings]


def _sentence(result: "Verification") -> str:
    said = [
        f"{result.job}, run {result.run}: {result.rows:,} rows of {count(result.images, 'image')}",
        f"{result.failed:,} failed",
        f"{count(result.checked, 'picture')} read ({size(result.bytes_read)})",
    ]
    if result.orphans:
        said.append(f"{count(result.orphans, 'object')} that no row names (harmless)")
    said.append("all sound" if result.sound else f"{count(result.findings.total(), 'finding')}")
    return ", ".join(said)
