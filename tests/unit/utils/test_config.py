"""Configurations: one model, values from files, variables, options and Python, and all faults in one answer."""

import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from prefixtune.errors import ConfigError
from prefixtune.utils.config import CommaList, Config, Layer, TextList


class Recipe(Config):
    """A configuration with a field of each kind."""

    hint = "see the cook book."

    servings: int = Field(2, ge=1, le=50)
    rate: float = Field(0.1, ge=0)
    oven: Literal["", "gas", "electric"] = ""
    vegan: bool = False
    seed: int | None = None
    steps: CommaList[Annotated[int, Field(ge=1)]] = (1,)
    names: CommaList[str] = ()
    stop: TextList = ()

    def conflicts(self):
        if self.vegan and self.oven == "gas":
            yield ("vegan", "oven"), "vegan does not go with oven 'gas'"


def options_layer(values):
    """As the command line makes it."""
    return Layer(values, lambda field: f"--{field.replace('_', '-')}")


def refusal(make, *arguments, **values):
    with pytest.raises(ConfigError) as caught:
        make(*arguments, **values)
    return caught.value.message


def test_wrong_values_are_named_all_at_once():
    values = [
        ({"servings": 10**5000}, ["servings"]),
        ({"steps": [1, "a"]}, ["steps.1", "'a'"]),
        ({"stop": ["\ud800"]}, ["stop"]),
        ({"vegan": True, "oven": "gas"}, ["vegan", "'gas'"]),
        ({"serving": 3}, ["serving", "'servings'"]),
        ({"servings": 0, "rate": math.nan, "lr": 1}, ["servings", "rate", "lr"]),
    ]
    for given, named in values:
        message = refusal(Recipe, **given)
        assert [part for part in named if part not in message] == []
        assert "\n" not in message
        assert len(message) < 1000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "servings = 1\nservings = 2"),
        ("a.toml", "x = " + "[" * 100_000),
        ("a.toml", "seed = " + "9" * 5000),
        ("a.toml", b"\xff\xfe\x00"),
        ("nowhere/a.toml", None),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(Recipe.from_file, tmp_path / name)
    assert name in message
    assert "\n" not in message


def test_layers_are_stacked_and_each_fault_is_named_as_its_source_writes_it(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("servings = 4\nrate = -1.0\n")
    layers = [
        Layer.from_file(path, Recipe.model_fields),
        Layer.from_environment("COOK_", {"COOK_SEED": "x", "COOK_VEGAN": "true", "COOK_OVN": "", "PATH": "/bin"}),
        options_layer({"steps": ["1,2", "b"], "oven": "gaz"}),
    ]
    message = refusal(Recipe.from_layers, *layers)
    for part in (f"rate in {str(path)!r}", "-1.0", "COOK_SEED", "'x'", "COOK_OVN", "--steps.2", "'b'", "--oven"):
        assert part in message, message


def test_texts_become_values_and_the_last_layer_wins():
    recipe = Recipe.from_layers(
        Layer({"servings": 3, "seed": 1}),
        Layer.from_environment("COOK_", {"COOK_SERVINGS": "4", "COOK_VEGAN": "on", "COOK_RATE": "1e-3"}),
        options_layer({"servings": "5", "steps": "3,4", "names": ["a, b", "c"], "stop": ["x,y", "z"]}),
    )
    assert recipe == Recipe(
        servings=5, seed=1, vegan=True, rate=1e-3, steps=(3, 4), names=("a", "b", "c"), stop=("x,y", "z")
    )


def test_a_configuration_survives_toml_and_json(tmp_path):
    recipe = Recipe(servings=7, rate=0.25, names=("ä", 'q"\\\n\x7f'), oven="gas", seed=-1)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.from_file(tmp_path / "recipe.toml") == recipe == Recipe(**recipe.to_dict())


def test_a_function_takes_an_object_a_dict_or_keywords_but_not_two_of_these():
    assert Recipe.from_arguments(None, {"servings": 3}) == Recipe.from_arguments({"servings": 3}, {})
    for arguments in ((Recipe(), {"seed": 1}), (3, {})):
        with pytest.raises(ConfigError):
            Recipe.from_arguments(*arguments)


def test_paths_are_texts_and_a_path_to_write_to_may_begin_with_the_home():
    class Written(Config):
        data: str = ""
        output: str = "out"
        files: tuple[str, ...] = ()

    written = Written(data="~/a", output="~/b", files=[Path("c"), "d"])
    assert written == Written(data="~/a", output=str(Path.home() / "b"), files=("c", "d"))
    assert Written(output=Path("e")).output == "e"
