"""The durable queue of jobs: DBOS's workflows in SQLite or Postgres, seen from outside by whoever asks for training.

A job is a workflow in the queue of its backbone, where each owner has a partition: whoever asks for many jobs does not
hold up another's first one. A job stands where its workflow stands, but for two words that DBOS does not have. A
cancelled workflow is a paused job, as it may be resumed. One that is marked as cancelled is cancelled for good.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.job import ENDED, Job, JobError, JobState, JobStatus, failure_of

if TYPE_CHECKING:
    from dbos import WorkflowStatus

APPLICATION, WORKFLOW = "prefixtune", "train"
PROTOCOL = "5"
"""What workers understand. Raised when a job's stored form changes: a worker takes no job of another version."""

_STATES: dict[str, JobStatus] = {
    "ENQUEUED": "queued",
    "PENDING": "running",
    "SUCCESS": "succeeded",
    "ERROR": "failed",
    "CANCELLED": "paused",
}
_ACTIVE = ["ENQUEUED", "PENDING"]
_CANCELLED = "cancelled"
_PAGE = 100
"""Jobs that are read at once."""
_MOST_WAITING = 1000


class QueueUnavailableError(PrefixError):
    """The database cannot be reached, or is locked; trying again later may help."""


def queue_name(backbone: str) -> str:
    """The queue of the jobs of a backbone, which only its workers claim from; see `backbone.identity`."""
    return f"train-{backbone}"


class JobQueue:
    """All jobs, for those who ask and look; every method may wait for the database, so call it in a thread.

    Args:
        database_url: `sqlite:///...` or `postgresql://...`; its tables are made or brought up to date.

    Raises:
        QueueUnavailableError: The database cannot be reached; every method may raise it, too.
    """

    def __init__(self, database_url: str) -> None:
        from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer

        # Its warnings hold statements with their values, and callers say themselves that the database is away.
        logging.getLogger("dbos").setLevel(logging.ERROR)
        with _reaching():
            DBOS.migrate(database_url)
            self._client = DBOSClient(
                system_database_url=database_url,
                # The default is pickle, which runs code.
                serializer=DBOSPortableJSONSerializer(),
                application_name=APPLICATION,
                retry_connection_errors=False,
            )

    def close(self) -> None:
        """Close the connections."""
        self._client.destroy()

    # --- asking -------------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """Queue a job; one with an id that is queued already is the same job."""
        options: Any = {
            "workflow_name": WORKFLOW,
            "queue_name": queue_name(job.backbone),
            "queue_partition_key": job.owner,
            "workflow_id": job.id,
            "app_version": PROTOCOL,
            "authenticated_user": job.owner,
            "attributes": {_CANCELLED: False},
        }
        with _reaching():
            self._client.enqueue(options, job.model_dump(mode="json"))

    def cancel(self, job_id: str) -> JobState:
        """Cancel a job for good, wherever it stands; one that has ended stays as it is. Returns how it stands then."""
        if self.pause(job_id).status not in ENDED:
            with _reaching():
                self._client.update_workflow_attributes(job_id, {_CANCELLED: True}, merge=True)
            if self._list(workflow_ids=[job_id], status=_ACTIVE):
                # Somebody has resumed it in the same moment.
                self.pause(job_id)
        return self.get(job_id)

    def pause(self, job_id: str) -> JobState:
        """Stop a job that waits or runs so that it can be resumed; returns how it stands then."""
        with _reaching():
            self._client.cancel_workflow(job_id)
        return self.get(job_id)

    def resume(self, job_id: str) -> JobState:
        """Queue a job again that is paused, or that nobody trains any more; returns how it stands then."""
        queue = queue_name(self.get(job_id).job.backbone)
        with _reaching():
            self._client.resume_workflow(job_id, queue_name=queue)
        state = self.get(job_id)
        # Nobody goes on with it if it was cancelled in the same moment.
        return self.pause(job_id) if state.status == "cancelled" else state

    # --- looking ------------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> JobState:
        """How a job stands.

        Raises:
            RequestError: There is none with this id.
        """
        for state in self.states([job_id]).values():
            return state
        raise RequestError(f"there is no job {job_id[:64]!r}.", hint="list the jobs first.")

    def iterate(self, owner: str | None = None, after: str = "") -> Iterator[JobState]:
        """The jobs of an owner, or of all, the newest first; read as far as they are asked for.

        Args:
            owner: None: all.
            after: The job behind which to begin; empty: the newest.

        Raises:
            RequestError: There is no job `after`.
        """
        query: dict[str, Any] = {"user": owner, "sort_desc": True, "limit": _PAGE}
        is_behind = not after
        if after:
            found = self._read(workflow_ids=[after], user=owner, load_input=False)
            if not found:
                raise RequestError(f"there is no job {after[:64]!r}.", hint="list the jobs first.")
            newest = datetime.fromtimestamp(((found[0].created_at or 0) + 1) / 1000, UTC)
            query["end_time"] = newest.isoformat()
        for offset in itertools.count(0, _PAGE):
            page = self._list(offset=offset, **query)
            for state in page:
                if is_behind:
                    yield state
                # Others may have been made in the same second.
                is_behind = is_behind or state.job.id == after
            if len(page) < _PAGE:
                return

    def unfinished(self) -> list[JobState]:
        """All jobs that have not ended, the oldest first."""
        # Without their inputs: those that were cancelled for good stay, and may be many.
        ids = self._read_ids(status=[*_ACTIVE, "CANCELLED"])
        states = self.states(ids)
        return [states[one] for one in ids if one in states and states[one].status not in ENDED]

    def waiting(self, backbone: str) -> list[str]:
        """The ids of a backbone's jobs that wait, the oldest first; at most 1,000."""
        return self._read_ids(status="ENQUEUED", queue_name=queue_name(backbone), limit=_MOST_WAITING)

    def has_work(self, backbone: str) -> bool:
        """Whether jobs of a backbone wait or run."""
        return bool(self._list(queue_name=queue_name(backbone), status=_ACTIVE, app_version=PROTOCOL, limit=1))

    def states(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """How jobs stand, by their ids; those that do not exist are left out."""
        return {state.job.id: state for state in (self._list(workflow_ids=list(job_ids)) if job_ids else ())}

    def _list(self, **query: Any) -> list[JobState]:
        """Jobs, the oldest first."""
        return list(map(_state, self._read(**query)))

    def _read_ids(self, **query: Any) -> list[str]:
        """The ids of jobs that are not cancelled for good."""
        found = self._read(load_input=False, **query)
        return [one.workflow_id for one in found if not (one.attributes or {}).get(_CANCELLED)]

    def _read(self, **query: Any) -> list[WorkflowStatus]:
        with _reaching():
            return self._client.list_workflows(name=WORKFLOW, load_output=query.get("load_input", True), **query)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    """Do something with the database; what its library raises when it is away becomes one error.

    Raises:
        QueueUnavailableError: The database is away or locked. A change may have been made all the same.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as error:
        # The library's message may hold the database's address and its password.
        reason = type(getattr(error, "orig", None) or error).__name__
        raise QueueUnavailableError(f"the database of jobs cannot be reached ({reason}).", hint="try later.") from error


def _state(workflow: WorkflowStatus) -> JobState:
    assert workflow.input is not None
    status = _STATES.get(workflow.status, "failed")
    if (workflow.attributes or {}).get(_CANCELLED):
        status = "cancelled"
    return JobState(
        Job.model_validate(workflow.input["args"][0]),
        status,
        finished=int(workflow.completed_at / 1000) if status in ENDED and workflow.completed_at else None,
        error=_error(workflow.error) if status == "failed" else None,
        worker=workflow.executor_id or "" if status == "running" else "",
    )


def _error(error: Any) -> JobError:
    """Why a workflow failed: what the worker stored, or what DBOS says of it."""
    return JobError(**error.data) if isinstance(getattr(error, "data", None), dict) else failure_of(Exception())
