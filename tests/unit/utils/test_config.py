"""Configurations: one model, values from files, variables, options and Python, and all faults in one answer."""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from prefixtune.errors import ConfigError, DataError
from prefixtune.utils.config import CommaList, Config, DeviceName, Layer, Table, TextList


class Recipe(Config):
    """A configuration with a field of each kind."""

    hint = "see the cook book."
    other_names = {"lr": "it is called rate here."}  # noqa: RUF012

    servings: int = Field(2, ge=1, le=50)
    rate: float = Field(0.1, ge=0)
    oven: Literal["", "gas", "electric"] = ""
    device: DeviceName = "auto"
    vegan: bool = False
    seed: int | None = None
    steps: CommaList[int] = (1,)
    names: CommaList[str] = ()
    stop: TextList = ()

    def conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.vegan and self.oven == "gas":
            yield ("vegan", "oven"), "vegan does not go with oven 'gas'"


def options_layer(values: dict[str, Any], **more: Any) -> Layer:
    """As the command line makes it."""
    return Layer(values, "option", lambda field: f"--{field.replace('_', '-')}", text=True, **more)


def refusal(make: Any, *arguments: Any, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*arguments, **values)
    assert caught.value.hint == Recipe.hint
    return caught.value.message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"servings": 0}, "servings is 0, but must be between 1 and 50."),
        ({"servings": True}, "servings is True, but must be a whole number."),
        ({"servings": 2.0}, "servings is 2.0, but must be a whole number."),
        ({"servings": "2"}, "servings is '2', but must be a whole number."),
        ({"seed": 2**63}, f"seed is {2**63}, but must be between {-(2**63)} and {2**63 - 1}."),
        ({"rate": math.nan}, "rate is nan, but must be a finite number at least 0."),
        ({"rate": math.inf}, "rate is inf, but must be a finite number at least 0."),
        ({"servings": 10**5000}, "servings is a number of 16610 bits, but must be between 1 and 50."),
        ({"steps": [10**5000]}, f"steps has a number of 16610 bits, but must be between {-(2**63)} and {2**63 - 1}."),
        ({"names": 10**5000}, "names is a number of 16610 bits, but must be a list."),
        ({"device": [10**5000]}, "device is [a number of 16610 bits], but must be text."),
        ({"rate": False}, "rate is False, but must be a number."),
        ({"vegan": 1}, "vegan is 1, but must be true or false."),
        ({"oven": "gaz"}, "oven is 'gaz', but must be one of 'gas', 'electric' (did you mean 'gas'?)."),
        ({"device": "gpu"}, "device is 'gpu', but must be cpu, cuda, cuda:0, mps or auto."),
        ({"device": "cuda:x"}, "device is 'cuda:x', but must be cpu, cuda, cuda:0, mps or auto."),
        ({"device": 0}, "device is 0, but must be text."),
        ({"steps": [1, "a"]}, "steps[1] is 'a', but must be a whole number."),
        ({"names": {"a": 1}}, "names is of type dict, but must be a list."),
        ({"stop": ["\ud800"]}, "stop has '\\ud800', but must be UTF-8 text."),
        ({"vegan": True, "oven": "gas"}, "vegan does not go with oven 'gas'."),
        ({"serving": 3}, "unknown option 'serving' (did you mean 'servings'?)."),
        ({"lr": 3}, "unknown option 'lr' (it is called rate here)."),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values: dict[str, Any], message: str) -> None:
    assert refusal(Recipe, **values) == message


def test_all_faults_come_in_one_answer() -> None:
    message = refusal(Recipe, servings=0, rate="x", lr=1, vegan=True, oven="gas")
    for part in ("servings is 0", "rate is 'x'", "unknown option 'lr'", "vegan does not go with oven 'gas'"):
        assert part in message
    # A conflict with a value that is wrong itself would mislead.
    assert "does not go" not in refusal(Recipe, vegan="yes", oven="gas")


def test_values_are_converted_only_where_nothing_is_lost() -> None:
    recipe = Recipe(rate=1, steps=[1, 2], names="a, b", stop="end")
    assert (recipe.rate, recipe.steps, recipe.names, recipe.stop) == (1.0, (1, 2), ("a", "b"), ("end",))
    assert isinstance(recipe.rate, float)


def test_it_is_frozen_and_every_copy_is_validated() -> None:
    recipe = Recipe(servings=3)
    with pytest.raises(ConfigError, match="Recipe is frozen: 'servings' cannot be set") as caught:
        recipe.servings = 4  # type: ignore[misc]
    assert caught.value.hint == "make a changed copy: config.replace(servings=4)"
    with pytest.raises(ConfigError, match="Recipe is frozen: 'servings' cannot be deleted"):
        del recipe.servings
    assert recipe.servings == 3
    assert recipe.replace(servings=4) == Recipe(servings=4) == recipe.model_copy(update={"servings": 4})
    assert copy.deepcopy(recipe) == copy.copy(recipe) == recipe
    assert hash(recipe.replace()) == hash(recipe)
    for change in (recipe.replace, lambda **changes: recipe.model_copy(update=changes)):
        assert "servings is 0" in refusal(change, servings=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.toml", 'servings = 4\nrate = 1e-3\noven = "gas"\nsteps = [1, 2]\n'),
        ("recipe.yaml", "servings: 4\nrate: 1e-3\noven: gas\nsteps: [1, 2]\n"),
        ("recipe.yml", "# a comment\nservings: 4\nrate: +.1e-2\noven: 'gas'\nsteps:\n- 1\n- 2\n"),
    ],
)
def test_files_of_both_kinds_are_read_alike(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert Recipe.from_file(tmp_path / name) == Recipe(servings=4, rate=1e-3, oven="gas", steps=(1, 2))
    assert Recipe.from_file(tmp_path / name, servings=5).servings == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "servings = 1\nservings = 2", "is not TOML"),
        ("a.toml", "servings: 1", "is not TOML"),
        ("a.toml", "x = " + "[" * 100_000, "is not TOML"),
        ("a.toml", f"names = '{'a' * 2**20}'", "larger than 1 MiB"),
        ("a.yaml", "servings: 1\nservings: 2", "the key 'servings' is there twice"),
        ("a.yaml", "names: &x [a]\nsteps: *x", "aliases"),
        ("a.yaml", "servings: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("a.yaml", "[" * 100_000, "is not YAML"),
        ("a.yaml", "- servings", "must hold keys and values"),
        ("a.toml", "seed = " + "9" * 5000, "is not TOML: a number has too many digits."),
        ("a.yaml", "seed: " + "9" * 5000, "a number has too many digits (at line 1, column 7)"),
        ("a.toml", "seed = 0x" + "f" * 5000, "seed is a number of 20000 bits"),
        ("a.yaml", "servings: !!bool x", "tags (!name) are not supported (at line 1, column 11)"),
        ("a.yaml", "!!map\nservings: !!timestamp x", "tags (!name) are not supported (at line 1, column 1)"),
        ("a.yaml", "vegan: yes", "vegan is 'yes', but must be true or false"),
        ("a.yaml", "servings: 0100", "servings is 100, but must be between 1 and 50"),
        ("a.yaml", "servings: 1:30", "servings is '1:30', but must be a whole number"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        Recipe.from_file(tmp_path / name)
    assert name in caught.value.message
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        Recipe.from_file(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", ""), ("a.yaml", ""), ("a.yml", "# a comment\n"), ("b.yaml", "\ufeff"), ("b.toml", "\ufeff")],
)
def test_an_empty_file_has_only_defaults(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert Recipe.from_file(tmp_path / name) == Recipe()


def test_a_message_about_a_hostile_file_is_quick_and_short(tmp_path: Path) -> None:
    names = "\n".join(f"key{index}: 1" for index in range(20_000))
    (tmp_path / "many.yaml").write_text(names)
    message = refusal(Recipe.from_file, tmp_path / "many.yaml")
    assert message.endswith("; and 19950 more.")
    assert message.count("known: ") == 1
    assert len(message) < 4000
    message = refusal(Recipe, **{"z" * 10**6: 1}, oven="z" * 10**6, names=["z" * 10**6, 1], device="z" * 10**6)
    assert len(message) < 4000
    message = refusal(Recipe, steps=["x"] * 80)
    assert message.endswith("steps[49] is 'x', but must be a whole number; and 30 more.")


def test_layers_are_stacked_and_each_fault_is_named_as_its_source_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("servings = 4\nrate = -1.0\nnmaes = ['a']\n")
    layers = [
        Layer.from_file(path),
        Layer.from_environment("COOK_", {"COOK_SEED": "x", "COOK_VEGAN": "true", "COOK_OVN": "", "PATH": "/bin"}),
        options_layer({"steps": ["1,2", "b"], "oven": "gaz"}, faults=["unknown option '--ovn'"]),
    ]
    message = refusal(Recipe.from_layers, *layers)
    for part in (
        "rate is -1.0",
        "unknown key 'nmaes' (did you mean 'names'?)",
        "COOK_SEED is 'x', but must be a whole number",
        "unknown variable 'COOK_OVN' (did you mean 'COOK_OVEN'?)",
        "--steps[2] is 'b'",
        "--oven is 'gaz'",
        "unknown option '--ovn'",
    ):
        assert part in message, message
    assert message.index("'--ovn'") < message.index(repr(str(path))) < message.index("rate is -1.0")


def test_an_unreadable_file_is_no_reason_to_miss_what_may_be_in_it(tmp_path: Path) -> None:
    missing, servings = Layer.from_file(tmp_path / "nowhere.toml"), options_layer({"servings": "0"})
    with pytest.raises(ConfigError, match="cannot read the configuration") as caught:
        Recipe.from_layers(missing, Layer({"vegan": True, "oven": "gas"}))
    assert "does not go" not in caught.value.message
    assert caught.value.hint == "check the path."
    message = refusal(Recipe.from_layers, missing, servings)
    assert "cannot read the configuration" in message
    assert "--servings is 0" in message


class Guest(Table):
    name: str
    seats: int = Field(default=1, ge=1, le=9)


class Party(Config):
    guests: Mapping[str, Guest] = {}
    queue: tuple[Guest, ...] = Field((), strict=False)


def test_faults_in_tables_are_named_with_the_way_to_them() -> None:
    with pytest.raises(ConfigError) as caught:
        Party(guests={"a": {"name": 3, "seats": 0}, "b": {"naem": "x"}}, queue=[{"name": "x", "seat": 2}])
    for part in (
        "guests.a.name is 3, but must be text",
        "guests.a.seats is 0, but must be at least 1",
        "guests.b has the unknown key 'naem' (did you mean 'name'?)",
        "guests.b.name is missing",
        "queue[0] has the unknown key 'seat' (did you mean 'seats'?)",
    ):
        assert part in caught.value.message


def test_texts_become_values_and_the_last_layer_wins() -> None:
    recipe = Recipe.from_layers(
        Layer({"servings": 3, "seed": 1}),
        Layer.from_environment("COOK_", {"COOK_SERVINGS": "4", "COOK_VEGAN": "on", "COOK_RATE": "1e-3"}),
        options_layer({"servings": "5", "steps": "3,4", "names": ["a,b", "c"], "stop": ["x,y", "z"]}),
    )
    assert recipe == Recipe(
        servings=5, seed=1, vegan=True, rate=1e-3, steps=(3, 4), names=("a", "b", "c"), stop=("x,y", "z")
    )


def test_a_wrong_text_is_refused_even_if_a_later_layer_replaces_it() -> None:
    variables = Layer.from_environment("COOK_", {"COOK_SERVINGS": "x", "COOK_SEED": "1", "COOK_STEPS": "1,b"})
    message = refusal(Recipe.from_layers, variables, options_layer({"servings": "5", "steps": "1", "seed": "2"}))
    assert message == (
        "COOK_SERVINGS is 'x', but must be a whole number; COOK_STEPS[1] is 'b', but must be a whole number."
    )


def test_a_configuration_survives_toml_and_json(tmp_path: Path) -> None:
    recipe = Recipe(servings=7, rate=0.25, names=("ä", 'q"\\\n\x7f'), oven="gas", seed=-1)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.from_file(tmp_path / "recipe.toml") == recipe == Recipe(**recipe.to_dict())
    assert Recipe.model_json_schema()["properties"]["servings"] == {
        "default": 2,
        "maximum": 50,
        "minimum": 1,
        "title": "Servings",
        "type": "integer",
    }


def test_the_schema_allows_what_files_may_hold() -> None:
    properties = Recipe.json_schema()["properties"]
    for name, kind in (("steps", "integer"), ("names", "string"), ("stop", "string")):
        assert properties[name]["type"] == ["array", "string"]
        assert properties[name]["items"] == {"type": kind}


def test_a_configuration_inside_another_reports_all_faults_at_once() -> None:
    class Menu(Config):
        dishes: Mapping[str, Recipe] = {}

    assert Menu(dishes={"a": {"servings": 3}, "b": Recipe()}).dishes == {"a": Recipe(servings=3), "b": Recipe()}
    with pytest.raises(ConfigError) as caught:
        Menu(dishes={"a": {"servings": 0, "rate": "x"}, "b": {"nmaes": 1}})
    for part in (
        "dishes.a.servings is 0, but must be at least 1",
        "dishes.a.rate is 'x'",
        "dishes.b has the unknown key 'nmaes' (did you mean 'names'?)",
    ):
        assert part in caught.value.message


def test_a_function_takes_an_object_a_dict_or_keywords_but_not_two_of_these() -> None:
    assert Recipe.from_arguments(None, {"servings": 3}) == Recipe.from_arguments({"servings": 3}, {})
    with pytest.raises(ConfigError, match="both a config and seed"):
        Recipe.from_arguments(Recipe(), {"seed": 1})
    with pytest.raises(ConfigError, match="of type Recipe, or a dict"):
        Recipe.from_arguments(3, {})


def test_bounds_of_the_items_of_a_list_hold_for_texts_too() -> None:
    class Sizes(Config):
        sizes: CommaList[Annotated[int, Field(ge=1)]] = ()

    assert Sizes.from_layers(options_layer({"sizes": ["1,2", "3"]})).sizes == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"--sizes\[1\] is 0, but must be at least 1"):
        Sizes.from_layers(options_layer({"sizes": "5,0"}))


def test_a_copy_knows_which_values_were_given_and_another_error_may_be_raised() -> None:
    class Plate(Recipe):
        error_class = DataError

    assert Plate(servings=3).replace(rate=0.5).model_fields_set == {"servings", "rate"}
    with pytest.raises(DataError, match="servings is 0"):
        Plate(servings=0)
    assert "Attributes:" in (Plate.__doc__ or "")


def test_paths_are_texts_and_a_path_to_write_to_may_begin_with_the_home() -> None:
    class Written(Config):
        data: str = Field("", description="read")
        output: str = Field("out", description="written")
        count: int = Field(1, description="no path")
        files: tuple[str, ...] = Field((), strict=False, description="read")

    written = Written(data=Path("a/b"), output=Path("~/c"))
    assert (written.data, written.output) == ("a/b", str(Path.home() / "c"))
    assert Written.from_layers(Layer({"output": "~/c"}, text=True)).output == str(Path.home() / "c")
    assert Written(data="~/a").data == "~/a"
    assert Written(files=[Path("a"), "b"]).files == ("a", "b")
    with pytest.raises(ConfigError, match="count is 'a'"):
        Written(count=Path("a"))
