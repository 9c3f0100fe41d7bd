"""Which form a run's data has, before it is read: a configuration whose task and form are settled."""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example, ExampleLike, form_that_fits, resolve_task
from prefixtune.data.forms import FORMS, Form, describe_data
from prefixtune.data.given import example_form
from prefixtune.data.tokenized import TokenizedDataset
from prefixtune.data.windows import DEFAULT_WINDOW, TEXT_FORMAT
from prefixtune.errors import ConfigError
from prefixtune.training.config import TrainConfig

__all__ = ["check_form", "check_texts_alone", "describe_run_data", "describe_windows", "settle_form"]


def settle_form(config: TrainConfig, examples: Sequence[ExampleLike] | None = None) -> TrainConfig:
    """The configuration with the form of its training data, and the task that this belongs to.

    Only the first row is read. A configuration that names templates or another task stays as it is.

    Args:
        config: The run.
        examples: To train on; None: `config.train` is read.
    """
    if config.task != "records" or config.source or config.target:
        return config
    form = _find_form(config, examples)
    if form is None:
        return config
    return config.replace(task=form.task, form=form.name, **(_text_format(config) if form.name == "text" else {}))


def _text_format(config: TrainConfig) -> dict[str, str]:
    """What is around a text, where the user does not say it."""
    return {
        "prompt_format": config.prompt_format or TEXT_FORMAT.prompt,
        "target_format": config.target_format or TEXT_FORMAT.target,
    }


def _find_form(config: TrainConfig, examples: Sequence[ExampleLike] | None) -> Form | None:
    if examples is not None:
        return example_form(examples, form=config.form)
    if not config.train:
        return None
    return resolve_task(config.task, config.train, split="train", form=config.form)[1]


def check_form(config: TrainConfig, backbone: Backbone) -> None:
    """Refuse texts where they cannot be learned.

    Raises:
        ConfigError: The backbone reads a source apart.
    """
    if config.form == "text" and backbone.kind != "decoder":
        raise ConfigError(
            f"{backbone.name!r} is an {backbone.kind}, which does not go on with a text, but the data is texts alone.",
            hint="choose a decoder-only model, or give sources and targets.",
        )


def check_texts_alone(config: TrainConfig) -> None:
    """Refuse to start from texts as if they were solved examples, before a backbone loads.

    Raises:
        ConfigError: The data is texts alone, and the start is solved examples.
    """
    if config.form == "text" and config.trains_prefix and config.initialization == "examples":
        raise ConfigError(
            "initialization is 'examples', but texts alone are no solved examples.",
            hint="start from words (without --preset quick, which starts from examples), or from a text: "
            "--initialization text --init-text @FILE.",
        )


def describe_windows(config: TrainConfig, texts: Sequence[Example], data: TokenizedDataset) -> str:
    """One line, if texts were divided into windows; else empty.

    Args:
        config: As `settle_form` returns it.
        texts: The training examples.
        data: The same as tokens.
    """
    if config.form != "text" or len(data.examples) == len(texts):
        return ""
    length = config.max_length or DEFAULT_WINDOW
    return (
        f"texts longer than {length:,} positions (max_length) are learned in windows: {len(texts):,} texts, "
        f"{len(data.examples):,} windows"
    )


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
    files = [(config.train, train, FORMS[config.form])]
    if config.dev:
        form = resolve_task(
            "records", config.dev, split="dev", form=form_that_fits(config.task, config.dev, config.form, split="dev")
        )[1]
        files.append((config.dev, dev, form or FORMS[config.form]))
    return [describe_data(form, some, path, some[0].fields) for path, some, form in files if some]
