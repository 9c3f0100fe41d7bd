"""Old names, until their users have moved."""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import ExampleLike
from prefixtune.training.config import TrainConfig
from prefixtune.training.prepare import Teach, prepare, with_backbone
from prefixtune.training.run import Run

__all__ = ["open_run", "with_backbone"]


def open_run(
    config: TrainConfig,
    backbone: Backbone,
    *,
    examples: Sequence[ExampleLike] | None = None,
    dev_examples: Sequence[ExampleLike] | None = None,
    teach: Teach | None = None,
) -> Run:
    """As `prepare` with `resume`."""
    return prepare(config, backbone, examples, dev_examples, resume=True, teach=teach)
