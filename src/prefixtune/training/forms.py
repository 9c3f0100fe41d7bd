"""Which form a run's data has, before it is read: a configuration whose task and form are settled."""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.data import Example, ExampleLike, resolve_task
from prefixtune.data.forms import FORMS, Form, describe_data
from prefixtune.data.tasks.records import example_form
from prefixtune.errors import PrefixError
from prefixtune.training.config import TrainConfig

__all__ = ["describe_run_data", "settle_form"]


def settle_form(config: TrainConfig, examples: Sequence[ExampleLike] | None = None) -> TrainConfig:
    """The configuration with the form of its training data, and the task that this belongs to.

    Only the first row is read. A configuration that names templates or another task, or whose data are wrong, stays as
    it is: what is wrong is said when the data are read, together with all else.

    Args:
        config: The run.
        examples: To train on; None: `config.train` is read.
    """
    if config.task != "records" or config.source or config.target:
        return config
    try:
        form = _find_form(config, examples)
    except PrefixError:
        return config
    return config if form is None else config.replace(task=form.task, form=form.name)


def _find_form(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> Form | None:
    if examples is not None:
        return example_form(examples, form=config.form)
    if not config.train:
        return None
    return resolve_task(config.task, config.train, split="train", form=config.form)[1]


def describe_run_data(
    config: TrainConfig,
    train: Sequence[Example],
    dev: Sequence[Example],
    *,
    given: bool = False,
) -> list[str]:
    """One line for each file that was read by its form.

    Args:
        config: As `settle_form` returns it.
        train: To train on, in full.
        dev: To choose the best prefix by.
        given: They were not read from files.
    """
    if not config.form or given:
        return []
    files = [(config.train, train), *([(config.dev, dev)] if config.dev else [])]
    form = FORMS[config.form]
    return [describe_data(form, some, path, some[0].fields) for path, some in files if some]
