"""The parts of the library of jobs that are used though they are private: another version may lack them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer

from prefixtune.jobs.queue import migrate


@pytest.fixture
def client(tmp_path: Path) -> Iterator[DBOSClient]:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    migrate(url)
    made = DBOSClient(system_database_url=url, serializer=DBOSPortableJSONSerializer())
    yield made
    made.destroy()


def test_a_client_holds_the_tables_of_workflows(client: DBOSClient) -> None:
    database = client._sys_db
    with database.engine.begin() as connection:
        assert connection.execute(database.tables.workflow_status.select()).all() == []
    assert set(database.tables.workflow_status.c.keys()) >= {
        *("workflow_uuid", "name", "status", "queue_name", "completed_at", "attributes", "owner_xid"),
        *("deduplication_id", "started_at_epoch_ms", "recovery_attempts", "updated_at", "executor_id"),
    }


def test_pending_workflows_of_a_worker_can_be_queued_again() -> None:
    assert callable(DBOS._recover_pending_workflows)
