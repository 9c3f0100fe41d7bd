"""How a cluster is divided among the workers of a study; studies on one are in tests/integrations."""

from __future__ import annotations

import os

import pytest

from prefixtune.errors import ConfigError
from prefixtune.studies import StudyConfig
from prefixtune.studies.cluster import run_on_ray, share_resources


@pytest.mark.parametrize("workers", [(os.cpu_count() or 1) + 1, 1_000_000])
def test_a_machine_has_no_more_workers_than_cpus(workers: int) -> None:
    with pytest.raises(ConfigError, match=f"there are {workers} workers, but this machine has") as error:
        run_on_ray(StudyConfig(), workers)
    assert "give at most" in error.value.hint


def test_a_cluster_is_too_small() -> None:
    with pytest.raises(ConfigError, match="the cluster has 4 CPUs, too few for 5 workers"):
        share_resources([{"CPU": 2.0}, {"CPU": 2.0}], 5)
