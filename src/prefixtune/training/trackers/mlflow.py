"""A run in MLflow: in the run's folder, unless MLFLOW_TRACKING_URI says otherwise."""

from __future__ import annotations

import importlib.util
import os
import shlex
import time
from collections.abc import Mapping
from typing import Any

from prefixtune.training.trackers.tracker import Outcome, TrackedRun

__all__ = ["MLflow"]

_MAX_VALUE = 500
"""Characters of a parameter, at most: what the oldest servers take."""
_BATCH = 100
"""Parameters in a request, at most."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """A run in MLflow, by its id; what `mlflow.start_run` and `mlflow.set_tracking_uri` set is left alone."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # By default a server that does not answer is asked again for minutes, while training waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or run.identity.get("uri") or _local_store(run)
        if uri.startswith("file:"):
            # mlflow-skinny has no database; MLflow refuses folders, which it develops no further, without this.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client: Any = MlflowClient(tracking_uri=uri)
        self.logged = run.logged
        if run.identity:
            self._id = run.identity["id"]
            self._client.update_run(self._id, status="RUNNING")
            names = {"step": "train/loss", "evaluation": "eval/loss"}
            self.logged = {**run.logged, **{kind: self._last_step(name) for kind, name in names.items()}}
        else:
            project = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "prefixtune"
            # A database keeps files in the present folder unless it is told where.
            own = uri.startswith("sqlite:") and not os.environ.get("MLFLOW_TRACKING_URI")
            files = (run.folder.resolve() / "mlflow" / "artifacts").as_uri() if own else None
            self._id = self._client.create_run(self._experiment(project, files), run_name=run.name).info.run_id
            params = [Param(key, str(value)[:_MAX_VALUE]) for key, value in run.hyperparameters.items()]
            for start in range(0, len(params), _BATCH):
                self._client.log_batch(self._id, params=params[start : start + _BATCH])
        self.identity = {"id": self._id, "uri": uri}
        allow = "MLFLOW_ALLOW_FILE_STORE=true " if uri.startswith("file:") else ""
        self.how_to_see = f"{allow}mlflow ui --backend-store-uri {shlex.quote(uri)}"

    def _experiment(self, name: str, files: str | None) -> str:
        """The id of an experiment, which is made if there is none of that name, with its files there."""
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=files))

    def _last_step(self, name: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self._id, name)), default=0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Figures of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def log_text(self, title: str, text: str, step: int) -> None:
        """A text in Markdown, as an artifact of the run."""
        self._client.log_text(self._id, text, f"{title}/step_{step:06d}.md")

    def finish(self, outcome: Outcome) -> None:
        """Set how the run ended."""
        self._client.set_terminated(self._id, _STATUS[outcome])


def _local_store(run: TrackedRun) -> str:
    """A database in the run's folder; without what that needs, which mlflow-skinny leaves out, a folder."""
    folder = run.folder.resolve() / "mlflow"
    if not all(map(importlib.util.find_spec, ("sqlalchemy", "alembic"))):
        return folder.as_uri()
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"
