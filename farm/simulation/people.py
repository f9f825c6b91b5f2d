"""People: they submit jobs, say things to them, and come back until something answers."""

from collections.abc import Sequence
from typing import Any

from farm.records import Control
from farm.simulation.farm import Farm
from farm.simulation.jobs import Books, SimJob, SimRun
from farm.simulation.store import UNAVAILABLE
from farm.simulation.world import World

AGAIN_S = 2.0
SWEEP_S = 20.0
"""How long after its tombstone a job's objects go."""


class People:
    """Whoever types commands. What they say is in the bucket first; the dispatcher hears of it at once or finds it."""

    def __init__(self, world: World, books: Books, farms: Sequence[Farm]):
        self.jobs: list[SimJob] = []
        self._world = world
        self._books = books
        self._farms = farms

    def submit(self, job: SimJob) -> None:
        """Open marker first, then the plan, then word of it."""
        self.jobs.append(job)
        self._books.store.put(("open", job.name), None)
        self._put_plan(job)

    def _put_plan(self, job: SimJob) -> None:
        self._world.say(f"somebody submits {job.name}: {[(run.run, run.images, run.model) for run in job.runs]}")
        self._books.store.put(("plan", job.name), job)
        self._tell(job.name)

    def append(self, name: str, run: SimRun) -> None:
        """Add a run to a job that is there."""
        job = self._books.job(name)
        if job is not None:
            more = SimJob(
                job.name, job.owner, job.priority, (*job.runs, run), job.max_images, job.max_gpu_s, job.finish_by
            )
            self._books.store.put(("open", name), None)
            self._put_plan(more)

    def say(self, name: str, action: Any, **changes: Any) -> None:
        """Append a control under the next free number, as often as it takes."""
        if self._books.job(name) is None:
            return
        seq = len(self._books.controls(name)) + 1
        control = Control(seq=seq, action=action, at="", by="somebody", **changes)

        def written(won: Any) -> None:
            if won is UNAVAILABLE:
                self._world.after(AGAIN_S, self._heard_or_again, name, control, action, changes)
            elif won:
                self._world.say(f"somebody says {action} {changes or ''} to {name}")
                self._tell(name)
            else:
                self.say(name, action, **changes)

        self._books.store.write(("control", name, seq), control, written)

    def _heard_or_again(self, name: str, control: Control, action: Any, changes: dict[str, Any]) -> None:
        if self._books.store.get(("control", name, control.seq)) is control:
            self._tell(name)
        else:
            self.say(name, action, **changes)

    def retry(self, name: str) -> None:
        """Open a new pass over the failed images of a job whose last pass is closed."""
        job = self._books.job(name)
        if job is None or not self._books.finished(job):
            return
        for run in job.runs:
            failed = tuple(sorted(index for index, ok in self._books.rows(run).items() if not ok))
            if failed:
                number = self._books.passes(run) + 1
                self._world.say(f"somebody retries {failed} of {name} as pass {number}")
                self._books.store.put(("open", name), None)
                self._books.store.create(("pass", run.run, number), failed)
        self._tell(name)

    def delete(self, name: str) -> None:
        """Lay a tombstone; what is under it goes later."""
        if self._books.job(name) is None:
            return
        self._world.say(f"somebody deletes {name}")
        self._books.store.put(("deleted", name), None)
        self._books.store.objects.pop(("open", name), None)
        self._tell(name)
        self._world.after(SWEEP_S, self._sweep, name)

    def _sweep(self, name: str) -> None:
        objects = self._books.store.objects
        job: SimJob | None = self._books.store.get(("plan", name))
        runs = {run.run for run in job.runs} if job else set()
        for key in [key for key in objects if key[1] == name or key[1] in runs]:
            if key[0] != "deleted":
                del objects[key]

    def settle(self) -> None:
        """At the end of all trouble whatever waits for a person gets what it waits for, and what stalled starts again."""
        self._world.after(60.0, self.settle)
        for job in self.jobs:
            name = job.name
            current = self._books.job(name)
            if current is None:
                continue
            said = self._books.standing(name)
            if said.state == "paused":
                self.say(name, "resume")
            if not said.approved and any(run.pilot for run in current.runs):
                self.say(name, "approve")
        for farm in self._farms:
            if farm.up and farm.dispatch is not None:
                for job in self.jobs:
                    if farm.dispatch.stall_code(job.name) is not None:
                        self._world.say(f"somebody starts {job.name} again")
                        farm.tell_of(job.name)

    def _tell(self, name: str) -> None:
        for farm in self._farms:
            if not self._world.chance(self._world.faults.request_lost):
                self._world.after(0.01, farm.tell_of, name)
