"""Keep transformers, and what it imports, quiet while it loads or converts something."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

from prefixtune.errors import PrefixWarning

# transformers imports torchao where it is installed, and that makes torch warn in its log. The hub's library logs every
# try; what fails in the end is an error here. The exporter of graphs logs what is not installed.
_LOGGERS = ("torch.utils._pytree", "torch.onnx", "torchao", "huggingface_hub", "transformers")
_SWITCH = threading.Lock()
"""Held while settings change, not while a block runs: they belong to the process."""
_num_blocks = 0
_settings = contextlib.ExitStack()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """While the block runs, no progress bars, advice or warnings of these libraries reach the terminal.

    The first of several blocks, in any threads, makes them quiet, and the last one restores what was set. What other
    threads print or log, and this project's own warnings, are not concerned.
    """
    global _num_blocks
    with _SWITCH:
        if not _num_blocks:
            _make_quiet(_settings)
        _num_blocks += 1
    try:
        yield
    finally:
        with _SWITCH:
            _num_blocks -= 1
            if not _num_blocks:
                _settings.close()


def _make_quiet(settings: contextlib.ExitStack) -> None:
    from transformers.utils import logging as transformers_logging

    for logger in map(logging.getLogger, _LOGGERS):
        settings.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
    if transformers_logging.is_progress_bar_enabled():
        settings.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()
    settings.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", PrefixWarning)
