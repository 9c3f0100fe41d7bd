"""The durable queue of jobs: DBOS's workflows in SQLite or Postgres, seen from outside by whoever asks for training.

A job is a workflow that workers claim from the queue of their backbone. Its status in the database is the only truth
about where it stands, and it changes in one statement, so that it ends exactly once. A paused job is a cancelled
workflow that may be resumed: an attribute tells it from one that is cancelled for good.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from prefixtune.errors import PrefixError, RequestError
from prefixtune.jobs.job import UNFINISHED, Job, JobError, JobResult, JobState, JobStatus

if TYPE_CHECKING:
    from dbos import DBOSClient, WorkflowStatus
    from sqlalchemy import ColumnElement, Select, Table

__all__ = [
    "APPLICATION",
    "PROTOCOL",
    "WORKFLOW",
    "JobQueue",
    "OutcomeUnknownError",
    "QueueUnavailableError",
    "Standing",
    "UnfinishedJob",
    "migrate",
    "queue_name",
]


APPLICATION, WORKFLOW = "prefixtune", "train"
PROTOCOL = "1"
"""What workers understand. Raised when a job's stored form changes: a worker takes no job of another version."""

_T = TypeVar("_T")
_STATES: dict[str, JobStatus] = {
    "ENQUEUED": "queued",
    "DELAYED": "queued",
    "PENDING": "running",
    "SUCCESS": "succeeded",
    "ERROR": "failed",
    "MAX_RECOVERY_ATTEMPTS_EXCEEDED": "failed",
    "CANCELLED": "cancelled",
}
_WORKFLOW_STATES: dict[JobStatus, list[str]] = {
    status: [name for name, meaning in _STATES.items() if meaning == status] for status in set(_STATES.values())
} | {"paused": ["CANCELLED"]}
_PAUSED = "paused"
_PAGE = 100
"""Jobs that are read at once."""


class QueueUnavailableError(PrefixError):
    """The database cannot be reached, or is locked; trying again later may help."""


class OutcomeUnknownError(QueueUnavailableError):
    """The database went away during a change, which may have been made: it is not to be tried again unseen."""


class Standing(NamedTuple):
    """Where a job stands, and who may end it.

    Attributes:
        status: Where it stands.
        token: Of the claim that trains it, the last one; empty: none does.
    """

    status: JobStatus
    token: str = ""


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
        """Queue a job; one with an id that is queued already is the same job.

        Raises:
            RequestError: An unfinished job has its name.
            OutcomeUnknownError: The database went away meanwhile.
        """
        from dbos import error as dbos_error

        def enqueue() -> None:
            self._client.enqueue(
                {
                    "workflow_name": WORKFLOW,
                    "queue_name": queue_name(job.backbone),
                    "workflow_id": job.id,
                    "app_version": PROTOCOL,
                    "authenticated_user": job.owner,
                    "priority": self._turn(job.owner),
                    # Of two jobs that wait or run, one has a name. A paused one gets it back when it is resumed;
                    # until then, whoever adds a job heeds its name.
                    "deduplication_id": job.name,
                    "attributes": {"name": job.name, _PAUSED: False},
                },
                job.model_dump(mode="json"),
            )

        try:
            _change(enqueue)
        except dbos_error.DBOSQueueDeduplicatedError as error:
            raise _name_taken(job.name) from error

    def _turn(self, owner: str) -> int:
        """The turn of an owner's next job: owners take turns, however many jobs each of them asked for.

        Start-time fair queueing (Goyal, Vin & Cheng 1996): one more than the owner's last unfinished job, and not
        before those that run now, so that nobody waits forever.
        """
        unfinished = self._unfinished()
        own = [job.priority or 0 for job in unfinished if job.authenticated_user == owner]
        running = [job.priority or 0 for job in unfinished if job.status == "PENDING"]
        return max([1, min(running, default=1), *(turn + 1 for turn in own)])

    def _unfinished(self) -> list[WorkflowStatus]:
        return self._all(status=["ENQUEUED", "DELAYED", "PENDING"], load_input=False, load_output=False)

    def cancel(self, job_id: str) -> JobState:
        """Cancel a job for good, wherever it stands; one that has ended stays as it is. Returns how it stands then."""
        return self._move(job_id, UNFINISHED, "CANCELLED")

    def pause(self, job_id: str, token: str | None = None) -> JobState:
        """Stop a job that waits or runs so that it can be resumed; returns how it stands then.

        Args:
            job_id: Which one.
            token: Only if this claim trains it; None: whoever does.
        """
        before: tuple[JobStatus, ...] = ("queued", "running") if token is None else ("running",)
        return self._move(job_id, before, "CANCELLED", paused=True, token=token)

    def resume(self, job_id: str) -> JobState:
        """Queue a paused job again, in the turn of one that is new; any other one stays as it is.

        Returns how it stands then.

        Raises:
            RequestError: Another job that waits or runs has its name.
        """
        return self._move(job_id, ("paused",), "ENQUEUED")

    def _move(
        self,
        job_id: str,
        before: Sequence[JobStatus],
        status: str,
        *,
        paused: bool = False,
        token: str | None = None,
    ) -> JobState:
        """Change a job's status if it stands at one of `before`, in one statement: of two at once, one wins.

        With a token, only if its claim is the last one.

        Raises:
            RequestError: There is no such job, or another one has its name.
            OutcomeUnknownError: The database went away meanwhile.
        """
        import sqlalchemy as sa
        from sqlalchemy.exc import IntegrityError

        # The library's own methods do not ask where the job stands: they would resume one that was cancelled.
        table, state = self._table, self.get(job_id)
        now = int(time.time() * 1000)
        if status == "ENQUEUED":
            place = {
                "queue_name": queue_name(state.job.backbone),
                "deduplication_id": state.job.name,
                "completed_at": None,
                # With its old turn it would overtake everybody after a long pause, or wait behind them.
                "priority": self._turn(state.job.owner),
            }
        else:
            place = {"queue_name": None, "deduplication_id": None, "completed_at": now}
        names = sorted({name for some in before if some != _PAUSED for name in _WORKFLOW_STATES[some]})
        move = (
            sa.update(table)
            .where(table.c.workflow_uuid == job_id, table.c.name == WORKFLOW)
            .where(sa.or_(table.c.status.in_(names), *([self._is_paused] if _PAUSED in before else [])))
            .where(sa.true() if token is None else sa.func.coalesce(table.c.owner_xid, "") == token)
            .values(
                status=status,
                attributes={"name": state.job.name, _PAUSED: paused},
                # Nobody who claimed it before may end it.
                owner_xid=None,
                started_at_epoch_ms=None,
                recovery_attempts=0,
                updated_at=now,
                **place,
            )
        )

        def execute() -> JobState:
            try:
                with self._client._sys_db.engine.begin() as connection:
                    connection.execute(move)
            except IntegrityError as error:
                raise _name_taken(state.job.name) from error
            return self.get(job_id)

        return _change(execute)

    # --- looking ------------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> JobState:
        """How a job stands.

        Raises:
            RequestError: There is none with this id.
        """
        found = self._list(workflow_ids=[job_id], limit=1)
        if not found:
            raise RequestError(f"there is no job {job_id[:64]!r}.", hint="list the jobs first.")
        return _state(found[0])

    def iterate(self, owner: str | None = None) -> Iterator[JobState]:
        """The jobs of an owner, or of all, the newest first; read as far as they are asked for."""
        return map(_state, self._iterate(owner))

    def unfinished(self) -> list[UnfinishedJob]:
        """All jobs that have not ended; those that wait are in the order of their turns."""
        import sqlalchemy as sa

        active = [*_WORKFLOW_STATES["queued"], *_WORKFLOW_STATES["running"]]
        # Not those that are cancelled for good, of which there may be many.
        where = sa.or_(self._table.c.status.in_(active), self._is_paused)
        found = self._all(where=where, load_input=False, load_output=False)[::-1]
        found.sort(key=lambda job: (job.priority or 0, job.created_at or 0))
        jobs = []
        for job in found:
            if (status := _status(job.status, job.attributes)) in UNFINISHED:
                name = str((job.attributes or {}).get("name", ""))
                jobs.append(UnfinishedJob(job.workflow_id, job.authenticated_user or "", name, status))
        return jobs

    def has_work(self, backbone: str) -> bool:
        """Whether jobs of a backbone wait or run."""
        active = [*_WORKFLOW_STATES["queued"], *_WORKFLOW_STATES["running"]]
        found = self._list(queue_name=queue_name(backbone), status=active, limit=1, load_input=False, load_output=False)
        return bool(found)

    def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus]:
        """Where jobs stand; those that do not exist are left out."""
        return {job_id: standing.status for job_id, standing in self.standings(job_ids).items()}

    def standings(self, job_ids: Sequence[str]) -> dict[str, Standing]:
        """Where jobs stand, and who may end them; those that do not exist are left out."""
        import sqlalchemy as sa

        table = self._table
        columns = table.c.workflow_uuid, table.c.status, table.c.attributes, table.c.owner_xid
        found: dict[str, Standing] = {}
        for start in range(0, len(job_ids), _PAGE):
            some = job_ids[start : start + _PAGE]
            rows = self._read(sa.select(*columns).where(table.c.name == WORKFLOW, table.c.workflow_uuid.in_(some)))
            found |= {
                one: Standing(_status(status, attributes), token or "") for one, status, attributes, token in rows
            }
        return found

    def workers(self) -> list[str]:
        """The names of workers that have claimed unfinished jobs; some may be dead."""
        running = self._all(status=["PENDING"], load_input=False, load_output=False)
        return sorted({workflow.executor_id for workflow in running if workflow.executor_id})

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended."""
        _reach(lambda: self._client.delete_workflow(job_id))

    def _all(self, **query: Any) -> list[WorkflowStatus]:
        return list(self._iterate(**query))

    def _iterate(
        self, user: str | None = None, where: ColumnElement[bool] | None = None, **query: Any
    ) -> Iterator[WorkflowStatus]:
        """Workflows by pages, the newest first; those that are added or change meanwhile hide and double no other."""
        import sqlalchemy as sa

        table = self._table
        # SQLite's times are whole seconds; its rows are numbered as they were added.
        is_sqlite = self._client._sys_db.engine.dialect.name == "sqlite"
        tie = sa.literal_column("rowid", sa.BigInteger) if is_sqlite else table.c.workflow_uuid
        keys = (
            sa.select(table.c.workflow_uuid, table.c.created_at, tie)
            .where(table.c.name == WORKFLOW)
            .where(sa.or_(table.c.application_name == APPLICATION, table.c.application_name.is_(None)))
            .order_by(table.c.created_at.desc(), tie.desc())
            .limit(_PAGE)
        )
        if user is not None:
            keys = keys.where(table.c.authenticated_user == user)
        if where is not None:
            keys = keys.where(where)
        if "status" in query:
            keys = keys.where(table.c.status.in_(query["status"]))
        page = self._read(keys)
        while page:
            found = {one.workflow_id: one for one in self._list(workflow_ids=[key[0] for key in page], **query)}
            yield from (found[key[0]] for key in page if key[0] in found)
            if len(page) < _PAGE:
                return
            # An offset would move with what others add and delete.
            last = sa.tuple_(sa.literal(page[-1][1], sa.BigInteger), sa.literal(page[-1][2], tie.type))
            page = self._read(keys.where(sa.tuple_(table.c.created_at, tie) < last))

    @property
    def _is_paused(self) -> ColumnElement[bool]:
        import sqlalchemy as sa

        return sa.and_(self._table.c.status == "CANCELLED", self._table.c.attributes[_PAUSED].as_boolean())

    @property
    def _table(self) -> Table:
        return self._client._sys_db.tables.workflow_status

    def _read(self, query: Select[Any]) -> list[Any]:
        def execute() -> list[Any]:
            with self._client._sys_db.engine.connect() as connection:
                return [tuple(row) for row in connection.execute(query)]

        return _reach(execute)

    def _list(self, **query: Any) -> list[WorkflowStatus]:
        return _reach(lambda: self._client.list_workflows(name=WORKFLOW, **query))


def _reach(action: Callable[[], _T]) -> _T:
    """Do something with the database; what its library raises when it is away becomes one error.

    Raises:
        PrefixError: Another program has a workflow of the same id there.
        QueueUnavailableError: The database is away or locked.
    """
    from dbos import error as dbos_error
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError

    try:
        return action()
    except dbos_error.DBOSConflictingWorkflowError as error:
        raise PrefixError(
            f"the database has a workflow {error.workflow_id!r} of another program.",
            hint="name another database by --database-url.",
        ) from error
    except (OperationalError, InterfaceError, PoolTimeoutError, DBAPIError) as error:
        # The library's message may hold the database's address and its password.
        reason = type(getattr(error, "orig", None) or error).__name__
        raise QueueUnavailableError(
            f"the database of jobs cannot be reached ({reason}).", hint="try again later."
        ) from error


def _change(action: Callable[[], _T]) -> _T:
    """As `_reach`, for a change.

    Raises:
        OutcomeUnknownError: The database is away or locked: the change may have been made.
    """
    try:
        return _reach(action)
    except QueueUnavailableError as error:
        raise OutcomeUnknownError(error.message, hint="see whether the change was made.") from error


def _name_taken(name: str) -> RequestError:
    return RequestError(f"another job will be served as {name!r}.", hint="choose another name.")


def _status(stored: str, attributes: Mapping[str, Any] | None) -> JobStatus:
    status = _STATES[stored]
    paused = (attributes or {}).get(_PAUSED, False)
    return "paused" if status == "cancelled" and paused else status


def _state(workflow: WorkflowStatus) -> JobState:
    assert workflow.input is not None
    (stored,), status = workflow.input["args"], _status(workflow.status, workflow.attributes)
    ended = status in ("succeeded", "failed", "cancelled")
    return JobState(
        Job.model_validate(stored),
        status,
        finished=int(workflow.completed_at / 1000) if ended and workflow.completed_at else None,
        result=JobResult.model_validate(workflow.output) if status == "succeeded" else None,
        error=_error(workflow.error) if status == "failed" else None,
        worker=workflow.executor_id or "" if status == "running" else "",
    )


def _error(error: Any) -> JobError:
    """Why a workflow failed: what `worker` stored, or what DBOS says of it."""
    data = getattr(error, "data", None)
    if isinstance(data, dict):
        return JobError.model_validate(data)
    return JobError(code="internal_error", message="the training failed for a reason that was not foreseen.")
