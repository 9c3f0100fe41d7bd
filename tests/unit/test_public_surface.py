"""The public names of the package: which they are, and what their documentation must say."""

import builtins
import inspect
import re

import pytest

import prefixtune as pt

FUNCTIONS = ("evaluate", "generate", "load", "load_backbone", "load_prefix", "save_prefix", "train")
CONFIGURATIONS = ("EngineConfig", "GenerateConfig", "ServeConfig", "TrainConfig")
CLASSES = ("Example", "Model", "Prefix", "PrefixError", "TorchEngine")
OTHERS = ("PrefixWarning", "__version__")


def section(name, title):
    """The text under a title of a docstring, empty where there is none."""
    match = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", (inspect.getdoc(getattr(pt, name)) or "") + "\n", re.MULTILINE)
    return match[1] if match else ""


def test_the_names_are_these_and_no_others():
    assert sorted(pt.__all__) == sorted([*FUNCTIONS, *CONFIGURATIONS, *CLASSES, *OTHERS])
    assert sorted(dir(pt)) == sorted(pt.__all__)
    assert all(getattr(pt, name).__name__ == name for name in pt.__all__ if name != "__version__")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_its_arguments_and_its_errors(name):
    documented = set(re.findall(r"^    \*{0,2}(\w+):", section(name, "Args"), re.MULTILINE))
    assert documented == set(inspect.signature(getattr(pt, name)).parameters)
    errors = re.findall(r"^    (\w+): ", section(name, "Raises"), re.MULTILINE)
    known = [getattr(pt.errors, error, None) or getattr(builtins, error) for error in errors]
    assert any(issubclass(error, pt.PrefixError) for error in known)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_documents_every_field(name):
    attributes = set(re.findall(r"^    (\w+): \S", section(name, "Attributes"), re.MULTILINE))
    assert attributes == getattr(pt, name).model_fields.keys()
    assert "ConfigError" in section(name, "Raises")
