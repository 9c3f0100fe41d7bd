"""A study's configuration: defaults of each study, files and flags, learning rates, and all faults at once."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from prefixtune.errors import ConfigError
from prefixtune.studies import STUDIES, StudyConfig, plan
from prefixtune.training.config import TrainConfig, default_learning_rate

FILES = sorted((Path(__file__).resolve().parents[3] / "studies").glob("**/*.toml"))


def refusal(name: str = "methods", **values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        StudyConfig(name=name, **values)
    assert error.value.hint
    return error.value.message


def test_the_papers_studies_are_there():
    assert [*STUDIES][:6] == ["methods", "low-data", "unseen", "length", "initialization", "position"]
    assert [*STUDIES][6:] == ["ceiling", "summarization", "dart", "scale"]
    low = StudyConfig(name="low-data")
    # Li & Liang 2021, section 6.3: five subsets of each size, two seeds, a development set of 30 %.
    assert (low.sizes, low.subsets, low.seeds, low.dev_share) == ((50, 100, 200, 500), 5, 2, 0.3)
    assert StudyConfig(name="unseen").task == "webnlg"
    for name, kind in STUDIES.items():
        config = StudyConfig(name=name)
        assert config.folder == Path(f"runs/{name}")
        assert all(getattr(config, key) == value for key, value in kind.defaults.items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_that_come_with_the_project_are_sound(path: Path):
    name = tomllib.loads(path.read_text(encoding="utf-8")).get("name", path.stem.replace("_", "-"))
    config = StudyConfig.from_file(path, name=name)
    for key, value in tomllib.loads(path.read_text(encoding="utf-8")).items():
        stored = config.to_dict()[key]
        assert stored == value, key
    assert plan(config)


def test_flags_win_over_the_file_and_the_file_over_the_study(tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_text("sizes = [20, 30]\nsubsets = 2\ndev_share = 1\n[train_settings.full]\nbatch_size = 4\n")
    config = StudyConfig.from_file(path, name="low-data", sizes="40, 50", methods="full")
    assert (config.sizes, config.methods, config.subsets, config.seeds) == ((40, 50), ("full",), 2, 2)
    assert config.dev_share == 1.0
    assert config.settings_of("full") == {"batch_size": 4}
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("sizes = [", "is not TOML", "write lines such as"),
        ("name = 'length'", "for the study 'length', not for 'methods'", "the file of that study"),
        ("sizs = [1]", "unknown key 'sizs' (did you mean 'sizes'?)", "--help"),
    ],
)
def test_an_error_names_the_wrong_file(tmp_path: Path, text: str, message: str, hint: str):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        StudyConfig.from_file(path, name="methods")
    assert message in error.value.message
    assert "study.toml" in error.value.message
    assert hint in error.value.hint
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        StudyConfig.from_file(tmp_path / "nowhere.toml", name="methods")


def test_an_unknown_study():
    with pytest.raises(ConfigError, match=r"name is 'lenght', .*did you mean 'length'\?"):
        StudyConfig(name="lenght")


def test_all_wrong_keys_and_types_are_reported():
    message = refusal(sizs=[1], tries="three", sizes=[1.5], methods=3, lengths="1,x", keep_weights=1, train_settings=2)
    for fault in (
        "unknown option 'sizs' (did you mean 'sizes'?)",
        "tries is 'three', but must be a whole number",
        "sizes[0] is 1.5, but must be a whole number",
        "methods is 3, but must be a list",
        "lengths[1] is 'x', but must be a whole number",
        "keep_weights is 1, but must be true or false",
        "train_settings is 2, but must be a table",
    ):
        assert fault in message
    assert "sizes[0] is True" in refusal(sizes=[True])


def test_all_wrong_values_are_reported():
    message = refusal(
        task="e2ee",
        methods=["prefix", "lorra", "prefix:3", "adapter:", "lora:0", "full:2"],
        starts=["tasks"],
        sizes=[-1],
        lengths=[0],
        tries=0,
        try_steps=-1,
        budget=float("nan"),
        dev_share=-0.5,
        sample="sentences",
        steps_by_size={"many": 3, "50": 0},
        learning_rates={"lorra": [1e-3], "full": ["a"], "prefix": [], "top": [1e-3, 1e-3]},
        train_settings={"batch_sice": 3, "reparameterization": "mpl", "seed": 1, "quantize": "int8", "full": 3},
    )
    for fault in (
        "task 'e2ee' is unknown (did you mean 'e2e'?)",
        "methods[1] is 'lorra' (did you mean 'lora'?)",
        "methods[2] is 'prefix:3', but a size goes with top, adapter and lora",
        "methods[3] is 'adapter:', but",
        "methods[4] is 'lora:0', but",
        "methods[5] is 'full:2', but",
        "starts[0] is 'tasks', but must be one of 'task', 'unrelated', 'random', 'prompt', 'examples' (did you mean "
        "'task'?)",
        "sizes[0] is -1, but must be at least 0",
        "lengths[0] is 0, but must be at least 1",
        "tries is 0, but must be between 1 and 21",
        "try_steps is -1, but must be at least 0",
        "budget is nan, but must be a finite number at least 0",
        "dev_share is -0.5, but must be at least 0",
        "sample is 'sentences', but must be one of 'sources', 'pairs'",
        "a key of steps_by_size is 'many', but must be a number of training targets",
        "steps_by_size.50 is 0, but must be at least 1",
        "a key of learning_rates is 'lorra' (did you mean 'lora'?)",
        "learning_rates.full[0] is 'a', but must be a number",
        "learning_rates.prefix is []",
        "learning_rates.top is [0.001, 0.001], but must be a list of positive numbers, none twice",
        "unknown key 'train_settings.batch_sice' (did you mean 'train_settings.batch_size'?)",
        "train_settings.reparameterization is 'mpl', but must be one of 'none', 'mlp', 'residual', 'scaled' "
        "(did you mean 'mlp'?)",
        "train_settings has 'seed', which the study sets itself",
        "train_settings has 'quantize', which the study sets itself",
        "train_settings.full is 3, but must be a table",
    ):
        assert fault in message, fault
    assert message.count("batch_sice") == 1, "a fault of all methods is reported once"


@pytest.mark.parametrize("name", ["methods", "starts", "sizes", "lengths"])
def test_lists_hold_something_and_nothing_twice(name: str):
    value = {"methods": "full", "starts": "task"}.get(name, 3)
    assert "must have at least one value" in refusal(**{name: [value, value]})
    assert "must have at least one value" in refusal(**{name: []})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tries": 3000}, "tries is 3000, but must be between 1 and 21"),
        ({"repetitions": 100_000_000}, "the study has 600,000,002 runs, but at most 100,000 are allowed"),
        ({"subsets": 10**9, "seeds": 10**9}, "runs, but at most 100,000 are allowed"),
        ({"methods": ["adapter:9999999999999"]}, "a size goes with top, adapter and lora"),
        ({"methods": ["adapter:999999"]}, "method_size is 999999, but must be between 0 and 65536"),
        ({"train_settings": {"epochs": 1e308}}, "train_settings.epochs is 1e+308, but must be"),
    ],
)
def test_a_grid_has_an_end(values: dict[str, Any], message: str):
    assert message in refusal(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["adapter", "adapter:64"]}, "methods has 'adapter' and 'adapter:64', which are the same"),
        ({"methods": ["lora:8", "lora:08"]}, "methods has 'lora:8' and 'lora:08', which are the same"),
        (
            {"methods": ["top", "top:1"], "train_settings": {"top": {"method_size": 1}}},
            "methods has 'top' and 'top:1', which are the same",
        ),
        (
            {
                "name": "scale",
                "backbones": ["gpt2", "gpt2-medium"],
                "methods": ["full", "medium-full"],
                "variants": {"medium-full": {"method": "full"}},
            },
            "'medium-full' on 'gpt2' and 'full' on 'gpt2-medium' would be called the same",
        ),
    ],
)
def test_no_two_runs_are_the_same(values: dict[str, Any], message: str):
    assert message in refusal(**values)
    other = {"methods": ["adapter", "adapter:64"], "train_settings": {"adapter": {"method_size": 8}}}
    assert plan(StudyConfig(**other))


def test_a_study_is_of_a_task_that_generates():
    assert "'classification' is for classification; studies are for tasks that generate" in refusal(
        task="classification"
    )


def test_rates_are_tried_around_the_default_as_many_for_each_method():
    config = StudyConfig(name="methods", tries=3, methods=["prefix", "full", "adapter:8"])
    for method, usual in (("prefix", "scaled"), ("full", "full"), ("adapter:8", "adapter")):
        low, middle, high = config.rates(method)
        assert middle == default_learning_rate(usual)
        assert (middle / low, high / middle) == pytest.approx((3, 3), rel=0.02)
    assert StudyConfig(name="methods", tries=1).rates("lora") == (default_learning_rate("lora"),)
    low, high = StudyConfig(name="methods", tries=2).rates("lora")
    assert low == default_learning_rate("lora") < high
    bare = StudyConfig(name="methods", train_settings={"reparameterization": "none"}, tries=1)
    assert bare.rates("prefix") == (default_learning_rate("none"),)
    variants = {"prefix-muon": {"method": "prefix", "optimizer": "muon"}}
    other = StudyConfig(name="methods", methods=["prefix-muon"], variants=variants, tries=1)
    assert other.rates("prefix-muon") == (default_learning_rate("scaled", "muon"),)


def test_configured_rates_are_used_and_each_method_has_as_many():
    rates = {"prefix": [1e-3, 2e-3], "adapter": [1e-4, 1e-3], "adapter:8": [5e-4, 5e-3]}
    config = StudyConfig(name="methods", methods=["prefix", "adapter:4", "adapter:8"], learning_rates=rates)
    assert config.rates("adapter:4") == (1e-4, 1e-3)
    assert config.rates("adapter:8") == (5e-4, 5e-3)
    unequal = {"methods": ["prefix", "full", "zero-shot"], "learning_rates": {"full": [1e-4]}, "tries": 3}
    assert "a comparison needs the same for each" in refusal(**unequal)
    assert StudyConfig(**{**unequal, "tries": 1})


@pytest.mark.parametrize(
    ("key", "before", "now", "grows"),
    [
        ("methods", ["prefix"], ["full", "prefix"], True),
        ("methods", ["prefix", "full"], ["prefix"], False),
        ("sizes", [50], [20, 50], True),
        ("seeds", 1, 2, True),
        ("subsets", 3, 2, False),
        ("tries", 2, 3, True),
        ("tries", 3, 2, False),
        ("learning_rates", {"prefix": [1e-3, 3e-3]}, {"prefix": [1e-3, 3e-3, 9e-3]}, True),
        ("learning_rates", {"prefix": [1e-3, 3e-3]}, {"prefix": [3e-3, 9e-3]}, False),
        # Rates around the default, written out.
        ("learning_rates", {}, {"prefix": [*StudyConfig().rates("prefix"), 0.1]}, True),
        ("learning_rates", {}, {"prefix": [0.1, 0.2, 0.3]}, False),
        ("repetitions", 2, 5, True),
        ("repetitions", 5, 2, False),
        # A grid of one sample and one seed is the first of the repetitions.
        ("repetitions", 0, 3, True),
        ("once", ["prefix"], [], True),
        ("once", [], ["prefix"], False),
        ("variants", {}, {"long": {"method": "prefix", "prefix_length": 50}}, True),
        ("variants", {"long": {"method": "prefix"}}, {"long": {"method": "prefix", "batch_size": 2}}, False),
        ("backbones", ["a"], ["b", "a"], True),
        ("backbones", [], ["a"], False),
        ("steps_by_size", {}, {"2000": 50}, False),
        ("steps_by_size", {"2000": 50}, {"2000": 60}, False),
        ("steps_by_size", {"2000": 50}, {}, False),
        ("sizes", [0], [0, 50], True),
        ("shots", 3, 4, False),
        ("test_limit", 100, 200, False),
    ],
)
def test_a_study_grows_where_its_runs_still_count(key: str, before: Any, now: Any, grows: bool):
    usual = {"methods": ["prefix"], "sizes": [2000]}
    old = StudyConfig(**{**usual, key: before})
    assert StudyConfig(**{**usual, key: now}).grows(old.to_dict(), key) is grows


@pytest.mark.parametrize("size", [0, 2000])
def test_steps_of_a_new_size_are_growth(size: int):
    usual = {"methods": ["prefix"]}
    before = StudyConfig(**usual, sizes=[size]).to_dict()
    larger = StudyConfig(**usual, sizes=[size, 500], steps_by_size={"500": 50})
    assert larger.grows(before, "sizes")
    assert larger.grows(before, "steps_by_size")
    assert not StudyConfig(**usual, sizes=[size], steps_by_size={str(size): 50}).grows(before, "steps_by_size")


def test_steps_may_be_given_for_more_sizes_than_a_study_has():
    """A file has them for all of its sizes, and the command line may name one of these."""
    config = StudyConfig(name="low-data", sizes=[50], steps_by_size={"0050": 60, "500": 100})
    assert config.steps_by_size == {"50": 60, "500": 100}


@pytest.mark.parametrize(
    ("methods", "before", "now", "grows"),
    [
        (["prefix", "few-shot"], [100], [50, 100], False),
        (["prefix", "few-shot"], [0], [0, 100], False),
        (["prefix", "few-shot"], [100], [0, 100, 200], True),
        (["prefix"], [100], [50, 100], True),
    ],
)
def test_few_shot_goes_on_showing_the_same_examples(methods: list[str], before: Any, now: Any, grows: bool):
    old = StudyConfig(methods=methods, sizes=before)
    assert StudyConfig(methods=[*methods, "full"], sizes=now).grows(old.to_dict(), "sizes") is grows
    # What is new itself has no examples yet.
    late = StudyConfig(methods=["few-shot", "prefix"], sizes=[50, *before])
    assert late.grows(StudyConfig(methods=["prefix"], sizes=before).to_dict(), "sizes")


def test_settings_are_for_all_runs_or_for_one_method():
    settings = {"batch_size": 8, "full": {"batch_size": 2}, "adapter": {"max_steps": 5}}
    config = StudyConfig(name="methods", train_settings=settings)
    assert config.settings_of("prefix") == {"batch_size": 8}
    assert config.settings_of("full") == {"batch_size": 2}
    assert config.settings_of("adapter:16") == {"batch_size": 8, "max_steps": 5, "method_size": 16}
    for method in config.methods[:-2]:
        assert TrainConfig(**config.settings_of(method))


VARIANTS = {
    "prefix-examples": {"method": "prefix", "prefix_length": 106, "initialization": "examples", "value_scale": 2.0},
    "prefix-mlp": {"method": "prefix", "reparameterization": "mlp"},
    "lora-slow": {"method": "lora:4", "batch_size": 2},
}


def test_a_variant_has_its_methods_settings_and_its_own():
    settings = {"max_steps": 7, "prefix": {"max_steps": 9}, "lora": {"warmup_steps": 1}}
    names = [*VARIANTS, "prefix", "lora:4"]
    config = StudyConfig(methods=names, variants=VARIANTS, train_settings=settings, lengths=[3, 5], tries=2)
    assert config.settings_of("prefix-examples") == {"max_steps": 9, "value_scale": 2.0}
    expected = {"max_steps": 7, "warmup_steps": 1, "method_size": 4, "batch_size": 2}
    assert config.settings_of("lora-slow") == expected
    assert [config.lengths_of(name) for name in ("prefix-examples", "prefix-mlp")] == [(106,), (3, 5)]
    assert [config.starts_of(name) for name in ("prefix-examples", "prefix-mlp")] == [("examples",), ("task",)]
    # Rates around the default of what it trains, or those of its own name.
    assert config.rates("prefix-mlp")[0] == default_learning_rate("mlp")
    own = config.replace(learning_rates={"lora": [1e-3, 2e-3], "lora-slow": [1e-4, 2e-4]})
    assert [own.rates(name) for name in ("lora:4", "lora-slow")] == [(1e-3, 2e-3), (1e-4, 2e-4)]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lora8", {"method": "lora:8"}, "has the name 'lora8', which is a method's"),
        ("prefix", {"method": "prefix"}, "has the name 'prefix', which is a method's"),
        ("A_b", {"method": "prefix"}, "has the name 'A_b', but a name has small letters"),
        ("mine", {}, "'mine' has no method"),
        ("mine", {"method": "lorra"}, "'mine' has a method that is 'lorra' (did you mean 'lora'?)"),
        ("mine", {"method": "zero-shot"}, "trains nothing and has no variants"),
        ("mine", {"method": "lora", "prefix_length": 3}, "has 'prefix_length', but the method 'lora' has no prefix"),
        ("mine", {"method": "prefix", "prefix_length": [3, 0]}, "prefix_length is [3, 0], but must be a whole number"),
        ("mine", {"method": "prefix", "initialization": "example"}, "is 'example' (did you mean 'examples'?)"),
        ("mine", {"method": "prefix", "batch_sise": 3}, "unknown key 'variants.mine.batch_sise'"),
        ("mine", {"method": "prefix", "seed": 3}, "variants.mine has 'seed', which the study sets itself"),
        ("mine", {"method": "prefix", "reparameterization": "mpl"}, "variants.mine.reparameterization is 'mpl'"),
        ("mine", {"method": "prefix", "reparameterization": []}, "variants.mine.reparameterization"),
        ("mine", {"method": "lora:4", "method_size": 8}, "method_size = 8 and the size of 'lora:4'"),
    ],
)
def test_a_wrong_variant_is_named(name: str, values: dict[str, Any], message: str):
    assert message in refusal(variants={name: values}, methods=["full"])
    if name == "mine":
        assert message in refusal(variants={name: values}, methods=["full", "mine"])


def test_a_name_of_no_variant_is_refused():
    message = refusal(methods=["prefix-example"], variants=VARIANTS, learning_rates={"lora-fast": [1e-3]})
    assert "methods[0] is 'prefix-example' (did you mean 'prefix-examples'?)" in message
    assert "a key of learning_rates is 'lora-fast'" in message


def test_only_a_method_of_the_study_is_run_once():
    assert "once has 'full', which is not among methods" in refusal(methods=["prefix"], once=["full"])


def test_backbones_are_told_apart_by_their_names():
    assert "would be called the same" in refusal("scale", backbones=["a/gpt2", "b/GPT2"])


def test_planning_needs_no_torch():
    code = "import sys; from prefixtune import studies; studies.plan(studies.StudyConfig()); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_steps_in_the_settings_win_over_the_studys_own():
    steps = StudyConfig(name="low-data").steps_by_size
    assert steps
    assert StudyConfig(name="low-data", train_settings={"max_steps": 60}).steps_by_size == {}
    assert StudyConfig(name="low-data", train_settings={"epochs": 1}).steps_by_size == {}
    assert StudyConfig(name="low-data", train_settings={"batch_size": 8}).steps_by_size == steps
    both = StudyConfig(name="low-data", train_settings={"max_steps": 60}, steps_by_size={"50": 10})
    assert both.steps_by_size == {"50": 10}


def test_lengths_are_those_of_the_study_alone():
    assert "sites gives lengths" in refusal(train_settings={"sites": "decoder=20"})
    assert StudyConfig(train_settings={"sites": "decoder"}).train_settings["sites"] == "decoder"
