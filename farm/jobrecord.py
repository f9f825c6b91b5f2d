"""A job's standing as JSON: what `farm status --json` prints, and what the endpoint answers.

Says nothing that `farm.status` does not know; fields may be added, and keep their meaning.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from farm.records import Totals
from farm.status import JobStatus


class RunRecord(BaseModel):
    """One run of a job; more than one where rows were appended."""

    model_config = ConfigDict(frozen=True)

    run: str
    pass_number: int = Field(description="of the latest pass; each retry opens one")
    images: int
    pilot: int | None = Field(description="images of its pilot, null without one")
    done: int
    failed: int
    finished: bool
    shards: int = Field(description="of the latest pass")
    shards_done: int
    created_at: str
    totals: dict[str, Any] | None = Field(description="what the latest pass came to, null while it is open")


class JobRecord(BaseModel):
    """How a job stands."""

    model_config = ConfigDict(frozen=True)

    job: str
    state: str = Field(description="open, paused, cancelled, pilot (done, waits for approval), done or deleted")
    model: str
    owner: str
    priority: int
    finish_by: str | None
    gpu_hours: float | None
    max_images: int | None
    approved: bool
    said_last: dict[str, Any] | None = Field(description="the last control, null without one")
    images: int
    done: int = Field(description="images that have a row, failed ones too")
    failed: int
    created_at: str = Field(description="ISO 8601, UTC; empty for a job that is being deleted")
    finished_at: str | None
    runs: tuple[RunRecord, ...]


def job_record(one: JobStatus) -> JobRecord:
    """Return a job's standing as a record."""
    limits = one.limits
    return JobRecord(
        job=one.job,
        state=one.state,
        model=one.model,
        owner=one.owner,
        priority=limits.priority,
        finish_by=limits.finish_by,
        gpu_hours=limits.gpu_hours,
        max_images=limits.max_images,
        approved=one.approved,
        said_last=one.last.model_dump(exclude={"version"}, exclude_none=True) if one.last else None,
        images=one.images,
        done=one.done,
        failed=one.failed,
        created_at=one.created_at,
        finished_at=one.finished_at,
        runs=tuple(
            RunRecord(
                run=run.run,
                pass_number=run.pass_number,
                images=run.images,
                pilot=run.pilot,
                done=run.done,
                failed=run.failed,
                finished=run.finished,
                shards=run.shards,
                shards_done=run.shards_done,
                created_at=run.created_at,
                totals=totals_record(run.totals) if run.totals else None,
            )
            for run in one.runs
        ),
    )


def totals_record(totals: Totals) -> dict[str, Any]:
    """Totals as JSON."""
    return {**totals.model_dump(exclude={"version"}), "gpu_seconds": totals.gpu_seconds}
