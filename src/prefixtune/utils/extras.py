"""Optional libraries: import one, or say which extra of this package installs it."""

from __future__ import annotations

import importlib
from typing import Any

from prefixtune.errors import ConfigError

__all__ = ["require"]


_EXTRAS = {
    "torchao": "quantize",
    "peft": "lora",
    "ray": "ray",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}
"""Optional library -> the extra of this package that installs it."""


def require(module: str, what: str) -> Any:
    """Import an optional library.

    Raises:
        ConfigError: It is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f"{what} needs {package}, which is not installed.", hint=f"pip install 'prefixtune[{_EXTRAS[package]}]'."
        ) from error
