"""Libraries are quiet while something loads; other threads are heard, and do not wait."""

import contextlib
import logging
import sys
import threading
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import PrefixWarning

LOGGER = logging.getLogger("transformers")


@pytest.fixture
def settings():
    """What is set, with progress bars and advice on."""
    level = LOGGER.level
    transformers_logging.enable_progress_bar()
    LOGGER.setLevel(logging.INFO)
    yield lambda: (LOGGER.level, transformers_logging.is_progress_bar_enabled(), list(warnings.filters))
    LOGGER.setLevel(level)
    transformers_logging.disable_progress_bar()


def test_other_threads_print_and_load_meanwhile(settings, capsys):
    before, loading, enough = settings(), threading.Event(), threading.Event()

    def load():
        with quiet_transformers():
            loading.set()
            enough.wait(60)

    thread = threading.Thread(target=load)
    thread.start()
    assert loading.wait(60)
    print("an important line", file=sys.stderr)
    assert "an important line" in capsys.readouterr().err
    inside = []

    def load_too():
        with quiet_transformers():
            inside.append(settings()[:2])

    other = threading.Thread(target=load_too)
    other.start()
    other.join(10)
    enough.set()
    thread.join(60)
    other.join(60)
    assert inside == [(logging.ERROR, False)]
    assert settings() == before


def test_the_last_of_several_blocks_restores_the_settings(settings):
    before = settings()
    with contextlib.suppress(KeyError), quiet_transformers():
        with quiet_transformers():
            pass
        assert settings()[:2] == (logging.ERROR, False)
        raise KeyError
    assert settings() == before


def test_warnings_of_libraries_are_hushed_and_our_own_are_not():
    with warnings.catch_warnings(record=True) as caught, quiet_transformers():
        warnings.warn("old", FutureWarning, stacklevel=1)
        warnings.warn("cut", PrefixWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["cut"]
