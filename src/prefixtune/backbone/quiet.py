"""Keep transformers, and what it imports, quiet while it loads or converts something."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator

_ALONE = threading.RLock()
"""What is set belongs to the process: of two threads, the second would keep what the first one set."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """While the block runs, no progress bars, advice or warnings of these libraries reach the terminal."""
    from transformers.utils import logging as transformers_logging

    with _ALONE:
        # transformers imports torchao where it is installed, and that makes torch warn in its log. The hub's library
        # logs every try; what fails in the end is an error here. The exporter of graphs logs what is not installed.
        names = ("torch.utils._pytree", "torch.onnx", "torchao", "huggingface_hub", "transformers")
        levels = {logger: logger.level for logger in map(logging.getLogger, names)}
        bars = transformers_logging.is_progress_bar_enabled()
        for logger in levels:
            logger.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        try:
            # Its reader of GGUF files has a progress bar of its own.
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
