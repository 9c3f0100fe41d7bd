"""The durable queue of jobs: DBOS's workflows in SQLite or Postgres, seen from outside by whoever asks for training.

A job is a workflow in the queue of its backbone, where each owner has a partition: whoever asks for many jobs does not
hold up another's first one. A job stands where its workflow stands, but for two words that DBOS does not have: a
cancelled workflow is a paused job, as it may be resumed, and one that is marked as cancelled is cancelled for good.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.job import ENDED, Job, JobError, JobResult, JobState, JobStatus

if TYPE_CHECKING:
    from dbos import WorkflowStatus

APPLICATION, WORKFLOW = "prefixtune", "train"
PROTOCOL = "2"
"""What workers understand. Raised when a job's stored form changes: a worker takes no job of another version."""

_T = TypeVar("_T")
_STATES: dict[str, JobStatus] = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "PENDING": "running",
    "SUCCESS": "succeeded",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
    "CANCELLED": "paused",
}
_ACTIVE = ["ENQUEUED", "DELAYED", "PENDING"]
_CANCELLED = "cancelled"
_PAGE = 100
"""Jobs that are read at once."""


class QueueUnavailableError(PrefixError):
    """The database cannot be reached, or is locked; trying again later may help."""


class Standing(NamedTuple):
    """Where a job stands, and which worker has it; empty: none."""

    status: JobStatus
    worker: str = ""


class UnfinishedJob(NamedTuple):
    """A job that waits, runs or is paused.

    Attributes:
        id: `ftjob-...`.
        owner: Whose.
        name: What its result will be served as.
        status: Where it stands.
    """

    id: str
    owner: str
    name: str
    status: JobStatus


def queue_name(backbone: str) -> str:
    """The queue of the jobs of a backbone, which only its workers claim from; see `backbone.identity`."""
    return f"train-{backbone}"


def migrate(database_url: str) -> None:
    """Make the database's tables, or bring them up to date; safe beside others that do the same.

    Raises:
        QueueUnavailableError: It cannot be reached.
    """
    from dbos import DBOS

    _reach(lambda: DBOS.migrate(database_url))


class JobQueue:
    """All jobs, for those who ask and look; every method may wait for the database, so call it in a thread.

    Args:
        database_url: `sqlite:///...` or `postgresql://...`; its tables exist (`migrate`).

    Raises:
        QueueUnavailableError: The database cannot be reached; every method may raise it, too.
    """

    def __init__(self, database_url: str) -> None:
        from dbos import DBOSClient, DBOSPortableJSONSerializer

        # Its warnings hold statements with their values, and callers say themselves that the database is away.
        logging.getLogger("dbos").setLevel(logging.ERROR)
        self._client: DBOSClient = _reach(
            lambda: DBOSClient(
                system_database_url=database_url,
                # The default is pickle, which runs code.
                serializer=DBOSPortableJSONSerializer(),
                application_name=APPLICATION,
                retry_connection_errors=False,
            )
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.destroy()

    # --- asking -------------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Queue a job; one with an id that is queued already is the same job."""
        _reach(
            lambda: self._client.enqueue(
                {
                    "workflow_name": WORKFLOW,
                    "queue_name": queue_name(job.backbone),
                    "queue_partition_key": job.owner,
                    "workflow_id": job.id,
                    "app_version": PROTOCOL,
                    "authenticated_user": job.owner,
                    "attributes": {"name": job.name, _CANCELLED: False},
                },
                job.model_dump(mode="json"),
            )
        )

    def cancel(self, job_id: str) -> JobState:
        """Cancel a job for good, wherever it stands; one that has ended stays as it is. Returns how it stands then."""
        _reach(lambda: self._client.cancel_workflow(job_id))
        if self.get(job_id).status not in ENDED:
            # Now nobody goes on with it, even if somebody resumes it in the same moment.
            _reach(lambda: self._client.update_workflow_attributes(job_id, {_CANCELLED: True}, merge=True))
        return self.get(job_id)

    def pause(self, job_id: str) -> JobState:
        """Stop a job that waits or runs so that it can be resumed; returns how it stands then."""
        _reach(lambda: self._client.cancel_workflow(job_id))
        return self.get(job_id)

    def resume(self, job_id: str) -> JobState:
        """Queue a paused job again; returns how it stands then."""
        queue = queue_name(self.get(job_id).job.backbone)
        _reach(lambda: self._client.resume_workflow(job_id, queue_name=queue))
        return self.get(job_id)

    def give_back(self, worker: str, backbone: str) -> list[str]:
        """Queue the jobs of a worker that trains no more again; returns their ids."""
        queue = queue_name(backbone)
        jobs = self._list(status="PENDING", queue_name=queue, executor_id=worker, load_input=False)
        ids = [job.workflow_id for job in jobs]
        if ids:
            _reach(lambda: self._client.resume_workflows(ids, queue_name=queue))
        return ids

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended."""
        _reach(lambda: self._client.delete_workflow(job_id))

    # --- looking ------------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> JobState:
        """How a job stands.

        Raises:
            RequestError: There is none with this id.
        """
        found = self._list(workflow_ids=[job_id])
        if not found:
            raise RequestError(f"there is no job {job_id[:64]!r}.", hint="list the jobs first.")
        return _state(found[0])

    def iterate(self, owner: str | None = None) -> Iterator[JobState]:
        """The jobs of an owner, or of all, the newest first; read as far as they are asked for."""
        seen = set[str]()
        for offset in itertools.count(0, _PAGE):
            page = self._list(user=owner, sort_desc=True, limit=_PAGE, offset=offset)
            # One that was added meanwhile moves the others.
            yield from (_state(job) for job in page if job.workflow_id not in seen)
            seen |= {job.workflow_id for job in page}
            if len(page) < _PAGE:
                return

    def unfinished(self) -> list[UnfinishedJob]:
        """All jobs that have not ended; those that wait are in the order of their turns, about: owners take turns."""
        found = self._list(status=[*_ACTIVE, "CANCELLED"], load_input=False)
        turns = defaultdict[str, int](int)
        jobs: list[tuple[int, UnfinishedJob]] = []
        for job in found:
            owner, status = job.authenticated_user or "", _standing(job).status
            if status not in ENDED:
                jobs.append((turns[owner], UnfinishedJob(job.workflow_id, owner, _attributes(job)["name"], status)))
                turns[owner] += status == "queued"
        return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]

    def has_work(self, backbone: str) -> bool:
        """Whether jobs of a backbone wait or run."""
        return bool(self._list(queue_name=queue_name(backbone), status=_ACTIVE, app_version=PROTOCOL, limit=1))

    def workers(self, backbone: str) -> set[str]:
        """The names of workers that have jobs of a backbone; some may be dead."""
        running = self._list(queue_name=queue_name(backbone), status="PENDING", load_input=False)
        return {job.executor_id for job in running if job.executor_id}

    def standings(self, job_ids: Sequence[str]) -> dict[str, Standing]:
        """Where jobs stand, and who has them; those that do not exist are left out."""
        found = [
            job
            for start in range(0, len(job_ids), _PAGE)
            for job in self._list(workflow_ids=list(job_ids[start : start + _PAGE]), load_input=False)
        ]
        return {job.workflow_id: _standing(job) for job in found}

    def _list(self, *, load_input: bool = True, **query: Any) -> list[WorkflowStatus]:
        """Jobs, the oldest first; without their inputs, their outputs are not read either."""
        return _reach(
            lambda: self._client.list_workflows(name=WORKFLOW, load_input=load_input, load_output=load_input, **query)
        )


def _reach(action: Callable[[], _T]) -> _T:
    """Do something with the database; what its library raises when it is away becomes one error.

    Raises:
        QueueUnavailableError: The database is away or locked. A change may have been made all the same.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return action()
    except SQLAlchemyError as error:
        # The library's message may hold the database's address and its password.
        reason = type(getattr(error, "orig", None) or error).__name__
        raise QueueUnavailableError(
            f"the database of jobs cannot be reached ({reason}).", hint="try again later."
        ) from error


def _attributes(workflow: WorkflowStatus) -> Mapping[str, Any]:
    return {"name": "", **(workflow.attributes or {})}


def _standing(workflow: WorkflowStatus) -> Standing:
    if _attributes(workflow).get(_CANCELLED):
        return Standing("cancelled")
    status = _STATES[workflow.status]
    return Standing(status, workflow.executor_id or "" if status == "running" else "")


def _state(workflow: WorkflowStatus) -> JobState:
    assert workflow.input is not None
    (stored,), (status, worker) = workflow.input["args"], _standing(workflow)
    return JobState(
        Job.model_validate(stored),
        status,
        finished=int(workflow.completed_at / 1000) if status in ENDED and workflow.completed_at else None,
        result=JobResult.model_validate(workflow.output) if status == "succeeded" else None,
        error=_error(workflow.error) if status == "failed" else None,
        worker=worker,
    )


def _error(error: Any) -> JobError:
    """Why a workflow failed: what the worker stored, or what DBOS says of it."""
    data = getattr(error, "data", None)
    if isinstance(data, dict):
        return JobError.model_validate(data)
    return JobError(code="internal_error", message="the training failed for a reason that was not foreseen.")
