"""Studies on a tiny model: every method, chosen rates, stopping at any moment, failures, and the budget."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import Example, read_task
from prefixtune.errors import ConfigError, DataError, PrefixError
from prefixtune.evaluation.metrics import compare, compute
from prefixtune.report import read_results
from prefixtune.studies import StudyConfig, plan, records, run_study, runner
from prefixtune.studies.cell import shorten_config
from prefixtune.studies.records import Provenance, check_same_dtype, read_figures, write_study
from prefixtune.studies.reductions import describe_reductions
from prefixtune.training.artifact import load_tuned, load_weights
from prefixtune.training.folder import PREFIX_FILE, STATE_FILE, WEIGHTS_FILE
from prefixtune.training.train import train
from prefixtune.utils.locks import file_lock

Make = Callable[..., Any]
Event = dict[str, Any]
METHODS = ("prefix", "full", "adapter:2", "lora:2", "top:1", "prompt", "few-shot", "zero-shot")


@pytest.fixture(scope="module", autouse=True)
def _thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quick_collections(_thaw: None) -> None:
    """A study collects garbage before it measures memory; all that was loaded before a test is none."""
    gc.freeze()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_models: Make, tiny_tokenizer: Any) -> str:
    """A tiny LLaMA of one layer on disk, with room for a few solved examples."""
    path = tmp_path_factory.mktemp("study") / "backbone"
    tiny_models("llama", num_hidden_layers=1, max_position_embeddings=2048).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def configure(model: str) -> Make:
    """A factory of small studies: eight training targets, four steps, three test sources of the toy set."""

    def make(output: Path, **values: Any) -> StudyConfig:
        own = {key: values.pop(key) for key in list(values) if key in ("max_steps", "save_every")}
        settings = {"batch_size": 4, "max_steps": 4, "eval_every": 2, "save_every": 2, "warmup_steps": 0, **own}
        usual = {
            "backbone": model,
            "dtype": "float32",
            "task": "toy",
            "train": "train",
            "dev": "held_out",
            "test": "held_out",
            "output": str(output),
            "methods": ("prefix", "full"),
            "lengths": (3,),
            "sizes": (8,),
            "dev_limit": 4,
            "test_limit": 3,
            "tries": 2,
            "train_settings": settings,
        }
        return StudyConfig(**{**usual, **values})

    return make


@dataclasses.dataclass
class Log:
    """What a study did: its events, and what its trainings were given."""

    events: list[Event] = dataclasses.field(default_factory=list)
    given: list[tuple[str, list[Example], list[Example]]] = dataclasses.field(default_factory=list)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


@pytest.fixture(scope="module")
def whole(configure: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyConfig, Log]:
    """A study of all methods that nobody stopped."""
    config, log = configure(tmp_path_factory.mktemp("whole") / "study", methods=METHODS), Log()

    def watch(given: Any, **options: Any) -> Any:
        log.given.append((given.method, options["examples"], options["dev_examples"]))
        return train(given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prefixtune.studies.cell.train", watch)
        outcome = run_study(config, on_event=log.events.append, command="the command")
    assert (outcome.failed, outcome.left) == ({}, ())
    assert outcome.done == tuple(cell.id for cell in plan(config))
    return config, log


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def cell_folder(config: StudyConfig, method: str, seed: int = 0) -> Path:
    cell = next(cell for cell in plan(config) if cell.method == method and cell.seed == seed)
    return config.folder / "cells" / cell.id


def results(config: StudyConfig) -> dict[str, Any]:
    """The results of a study, without what differs from run to run: times, memory, the date."""
    by_cell = {}
    for cell in plan(config):
        folder = config.folder / "cells" / cell.id
        facts, scores = read(folder / "cell.json"), read(folder / "evaluation.json")["scores"]
        figures = {k: v for k, v in facts["figures"].items() if not k.endswith(("seconds", "mib"))}
        by_cell[cell.id] = facts["status"], figures, scores, (folder / "outputs.jsonl").read_bytes()
    return by_cell


# --- variants, repetitions, backbones ---------------------------------------------------------------------------------


def test_variants_repetitions_and_backbones_run_as_their_settings_say(
    model: str, configure: Make, tmp_path: Path
) -> None:
    other = tmp_path / "Other_model"
    shutil.copytree(model, other)
    variants = {
        "shown": {"method": "prefix", "prefix_length": 500, "initialization": "examples", "leave_one_out": False},
        "mlp": {"method": "prefix", "reparameterization": "mlp", "bottleneck_size": 5},
    }
    values = {"variants": variants, "methods": ("shown", "mlp"), "repetitions": 2, "tries": 1, "max_steps": 2}
    config = configure(tmp_path / "study", name="scale", backbones=(model, str(other)), **values)
    outcome = run_study(config)
    assert (outcome.failed, outcome.left) == ({}, ())
    assert len(outcome.done) == 2 * 2 * 2
    for backbone in ("backbone", "other-model"):
        runs = [config.folder / "cells" / name for name in outcome.done if name.startswith(f"{backbone}-shown-")]
        assert [path.name.partition("-subset")[2] for path in runs] == ["0-seed0", "1-seed1"]
        for path in runs:
            train_config = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
            assert train_config["backbone"] == (model if backbone == "backbone" else str(other))
            assert (train_config["initialization"], train_config["leave_one_out"]) == ("examples", False)
            assert train_config["seed"] == int(path.name[-1])
        (mlp,) = (config.folder / "cells").glob(f"{backbone}-mlp-*-seed1")
        assert "bottleneck_size = 5" in (mlp / "config.toml").read_text(encoding="utf-8")
    points = read(config.folder / "comparisons.json")["points"]
    assert [(point["point"].partition("-n8")[0], point["num_runs"]) for point in points] == [
        ("backbone-mlp", 2),
        ("other-model-mlp", 2),
    ]


# --- a study that runs through ---------------------------------------------------------------------------------------


def test_every_cell_is_a_run_and_an_evaluation(whole: tuple[StudyConfig, Log]):
    config, _ = whole
    test = read_task("toy", "held_out")
    for cell in plan(config):
        folder = config.folder / "cells" / cell.id
        facts = read(folder / "cell.json")
        assert (facts["id"], facts["factors"], facts["status"]) == (cell.id, cell.factors(), "done")
        assert facts["error"] is None
        figures = facts["figures"]
        if cell.trains:
            assert figures["steps"] == 4
            assert figures["trained_parameters"] > 0
            assert figures["file_bytes"] > 0
            assert figures["peak_memory_mib"] > 100
            assert figures["dev_loss"] > 0
            assert figures["train_seconds"] > 0
            assert "batch_size = 4" in (folder / "config.toml").read_text()
        else:
            assert (figures["trained_parameters"], figures["stored_parameters"], figures["file_bytes"]) == (0, 0, 0)
            assert not (folder / "events.jsonl").exists()
        assert figures["evaluate_seconds"] > 0
        evaluation = read(folder / "evaluation.json")
        assert (evaluation["method"], evaluation["task"], evaluation["split"], evaluation["num_examples"]) == (
            cell.method,
            "toy",
            "test",
            3,
        )
        rows = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
        assert {row["source"] for row in rows} <= {example.source for example in test}
        again = compute([row["output"] for row in rows], [row["references"] for row in rows], metrics=["bleu"])
        assert evaluation["scores"]["bleu"]["score"] == again["bleu"].score
        low, high = evaluation["scores"]["bleu"]["interval"]
        assert low <= evaluation["scores"]["bleu"]["score"] <= high
    counts = {m: read(cell_folder(config, m) / "cell.json")["figures"]["trained_parameters"] for m in METHODS}
    # By hand, at width 32: norm, down and up of a bottleneck of 2; and two ranks of (in + out) of a layer's matrices.
    assert counts["adapter:2"] == 2 * 32 + (32 * 2 + 2) + (2 * 32 + 32)
    assert counts["lora:2"] == 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert counts["full"] > counts["top:1"] > counts["lora:2"]


def test_the_studys_own_file(whole: tuple[StudyConfig, Log]):
    config, _ = whole
    stored = read(config.folder / "study.json")
    assert (stored["kind"], stored["name"], stored["task"], stored["metric"]) == ("study", "methods", "toy", "bleu")
    assert (stored["factors"], stored["axis"], stored["command"]) == (["method"], None, "the command")
    assert (stored["backbone"], stored["budget_minutes"], stored["config"]) == (config.backbone, None, config.to_dict())
    assert stored["cut"] == [
        "scored on a fixed random sample of 3 test sources",
        "trained on samples of 8 targets",
        "2 tries instead of 3",
        stored["cut"][-1],
    ]
    # An untrained model does not know when to stop.
    unended = read(cell_folder(config, "zero-shot") / "cell.json")["figures"]["unended_outputs"]
    assert unended > 0
    assert stored["cut"][-1].startswith("outputs that did not end within the tokens they may have: prefix-n8-P3-task (")
    assert f"zero-shot-all ({unended})" in stored["cut"][-1]
    warning = next(event for event in whole[1].of("warning") if event["cell"].startswith("zero-shot"))
    assert f"{unended} of 3 outputs did not end within 100 tokens" in warning["text"]
    assert stored["machine"]["cores"] >= 1
    assert stored["versions"]["torch"]
    assert len(stored["date"]) == 10
    study = read_results(config.folder)
    assert {cell.id: cell.status for cell in study.cells} == {cell.id: "done" for cell in plan(config)}
    assert all(cell.run is not None and cell.run.evaluation is not None for cell in study.cells)


def test_runs_are_compared_item_by_item(whole: tuple[StudyConfig, Log], tmp_path: Path):
    config, _ = whole
    facts = read(config.folder / "comparisons.json")
    texts, scores = {}, {}
    for cell in plan(config):
        rows = (config.folder / "cells" / cell.id / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
        texts[cell.id] = [json.loads(row) for row in rows]
        scores[cell.id] = read(config.folder / "cells" / cell.id / "evaluation.json")["scores"]["bleu"]["score"]
    first = cell_folder(config, "prefix").name
    assert [(pair["run"], pair["reference"]) for pair in facts["pairs"]] == [
        (cell.id, first) for cell in plan(config) if cell.method != "prefix"
    ]
    for pair in facts["pairs"]:
        assert pair["difference"] == scores[pair["run"]] - scores[first]
        outputs, others = ([row["output"] for row in texts[name]] for name in (pair["run"], first))
        references = [row["references"] for row in texts[first]]
        assert pair["p_value"] == compare(outputs, others, references, "bleu", "plain").p_value
    assert [point["differences"] for point in facts["points"]] == [[pair["difference"]] for pair in facts["pairs"]]
    # Without the outputs, p-values are kept where the scores are the same.
    copied = config.replace(output=str(tmp_path / "copied"))
    shutil.copytree(config.folder, copied.folder)
    for path in copied.folder.glob("cells/*/outputs.jsonl"):
        path.unlink()
    run_study(copied)
    assert read(copied.folder / "comparisons.json") == facts
    path = cell_folder(copied, "zero-shot") / "evaluation.json"
    changed = read(path)
    changed["scores"]["bleu"]["score"] += 1.0
    path.write_text(json.dumps(changed), encoding="utf-8")
    run_study(copied)
    again = read(copied.folder / "comparisons.json")["pairs"]
    assert [pair["p_value"] is None for pair in again] == [pair["run"].startswith("zero-shot") for pair in again]


def test_the_best_of_the_tries_becomes_the_cell(whole: tuple[StudyConfig, Log]):
    config, log = whole
    tuning = read(config.folder / "study.json")["tuning"]
    tries = {(event["cell"], f"{event['learning_rate']:g}"): event["dev_loss"] for event in log.of("try")}
    trained = [cell for cell in plan(config) if cell.trains]
    assert len(tries) == 2 * len(trained)
    for cell in trained:
        losses = tuning[cell.group]["learning_rate"]
        assert losses == {f"{rate:g}": tries[cell.id, f"{rate:g}"] for rate in config.rates(cell.method)}
        best = min(losses, key=losses.__getitem__)
        folder, figures = (
            cell_folder(config, cell.method),
            read(cell_folder(config, cell.method) / "cell.json")["figures"],
        )
        assert tuning[cell.group]["chosen"] == figures["learning_rate"] == float(best)
        assert figures["dev_loss"] == losses[best]
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert events[-1]["best_loss"] == losses[best]
        assert max(event["lr"] for event in events if event["event"] == "step") == float(best)
        if cell.method in ("prefix", "prompt"):
            assert load_prefix(folder / PREFIX_FILE).header["training"]["learning_rate"] == float(best)
    # The losses of the rates differ, so that there is something to choose.
    assert all(len(set(entry["learning_rate"].values())) == 2 for entry in tuning.values())


def test_what_is_done_leaves_only_what_is_small(whole: tuple[StudyConfig, Log]):
    config, _ = whole
    left = {path.name for path in config.folder.rglob("*") if path.is_file()}
    assert PREFIX_FILE in left
    assert not [name for name in left if name.endswith((WEIGHTS_FILE, STATE_FILE, "decoded.jsonl"))]
    assert list((config.folder / "tries").iterdir()) == []


def test_all_methods_get_the_same_samples(whole: tuple[StudyConfig, Log]):
    _, log = whole
    methods = Counter(method for method, _, _ in log.given)
    assert methods == dict.fromkeys(("prefix", "full", "adapter", "lora", "top", "prompt"), 2)
    _, examples, dev = log.given[0]
    assert sum(len(example.targets) for example in examples) == 8
    assert sum(len(example.targets) for example in dev) == 4
    assert all(given[1:] == (examples, dev) for given in log.given)


def test_running_it_again_does_nothing(whole: tuple[StudyConfig, Log]):
    config, _ = whole
    before = {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}
    log = Log()
    outcome = run_study(config, on_event=log.events.append, command="the command")
    assert len(outcome.done) == len(METHODS)
    assert log.events == []
    assert {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()} == before


def test_repetitions_take_the_chosen_rate_and_subsets_differ(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", name="low-data", seeds=1, subsets=2, dev_share=0.5, max_steps=2)
    config = config.replace(methods=("prefix",), patience=0, steps_by_size={"8": 3})
    log = Log()
    assert len(run_study(config, on_event=log.events.append).done) == 2
    starts = Counter(event["cell"] for event in log.of("start"))
    first, second = (cell.id for cell in plan(config))
    assert starts == {first: 2, second: 1}
    chosen = {read(path)["figures"]["learning_rate"] for path in config.folder.glob("cells/*/cell.json")}
    assert len(chosen) == 1
    assert {event["total_steps"] for event in log.of("start")} == {3}, "steps_by_size goes by the number of targets"
    losses = {read(path)["figures"]["dev_loss"] for path in config.folder.glob("cells/*/cell.json")}
    assert len(losses) == 2
    study = read_results(config.folder)
    assert study.axis == "num_targets"
    assert "2 subsets instead of 5" in study.cut


def test_weights_are_kept_on_request(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", methods=("top:1",), keep_weights=True)
    run_study(config)
    weights = cell_folder(config, "top:1") / WEIGHTS_FILE
    header = load_weights(weights)[1]
    figures = read(weights.parent / "cell.json")["figures"]
    assert (header["method"], header["method_size"]) == ("top", 1)
    assert header["training"]["learning_rate"] == figures["learning_rate"]
    assert weights.stat().st_size == figures["file_bytes"]
    assert load_tuned(weights)[0].kind == "decoder"


def test_the_users_own_columns(configure: Make, tmp_path: Path):
    rows = [
        {"name": name, "food": food, "text": f"{name} has {food}."} for name in ("Aro", "Bi") for food in ("a", "b")
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = dict.fromkeys(("train", "dev", "test"), str(data))
    settings = {"source": "{name} is {food}", "target": "text", "max_steps": 1}
    config = configure(
        tmp_path / "study", task="records", methods=("prefix",), sizes=(0,), tries=1, train_settings=settings, **paths
    )
    assert run_study(config).done
    rows = [json.loads(line) for line in (cell_folder(config, "prefix") / "outputs.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} < {"Aro is a", "Aro is b", "Bi is a", "Bi is b"}
    header = load_prefix(cell_folder(config, "prefix") / PREFIX_FILE).header
    assert header["text_format"]["source"] == "{name} is {food}"


def test_outputs_of_own_records_may_be_as_long_as_their_targets(configure: Make, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    rows = [{"source": f"n : {name}", "target": f"{name} has a long answer. " * 9} for name in "abcd"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = dict.fromkeys(("train", "dev", "test"), str(data))
    settings = {"max_steps": 1, "batch_size": 4}
    values = {"task": "records", "sizes": (0,), "tries": 1, "train_settings": settings, "shots": 1, **paths}
    config = configure(tmp_path / "study", methods=("prefix", "full", "few-shot", "zero-shot"), **values)
    assert not run_study(config).failed
    longest = load_prefix(cell_folder(config, "prefix") / PREFIX_FILE).header["text_format"]["longest_target"]
    assert longest > 100
    for method in config.methods:
        decoding = read(cell_folder(config, method) / "evaluation.json")["settings"]["decoding"]
        assert decoding["max_new_tokens"] == pytest.approx(longest, abs=2), method


# --- stopping and going on -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As if the process had ended here: nothing in the program catches it."""


def a_step(event: Event) -> bool:
    return event["event"] == "step" and event["step"] == 3


MOMENTS: dict[str, Callable[[Event, int], bool]] = {
    "before the first step": lambda event, tries: event["event"] == "start",
    "at a step of the first try": lambda event, tries: a_step(event) and tries == 0,
    "at a step of the second try": lambda event, tries: a_step(event) and tries == 1,
    "after the last try": lambda event, tries: event["event"] == "try" and tries == 2,
    "while decoding": lambda event, tries: event["event"] == "decoded" and event["count"] == 2,
    "when it is done": lambda event, tries: event["event"] == "cell" and event["status"] == "done",
}


@pytest.mark.parametrize(
    ("moment", "method"),
    [*((moment, "prefix") for moment in MOMENTS), ("at a step of the second try", "full"), ("while decoding", "full")],
)
def test_killed_at_any_moment_it_goes_on_to_the_same_scores(
    whole: tuple[StudyConfig, Log], configure: Make, tmp_path: Path, moment: str, method: str
):
    config = configure(tmp_path / "study", methods=("zero-shot", method), decode_batch=2)
    killed = Log()

    def kill(event: Event) -> None:
        killed.events.append(event)
        if event.get("cell", "").startswith(method) and MOMENTS[moment](event, len(killed.of("try"))):
            raise Killed

    with pytest.raises(Killed):
        run_study(config, on_event=kill)
    states = {cell.id: cell.status for cell in read_results(config.folder).cells}
    first, last = plan(config)
    assert states == {first.id: "done", last.id: "done" if moment == "when it is done" else "waiting"}
    log = Log()
    assert len(run_study(config, on_event=log.events.append).done) == 2
    expected = results(whole[0])
    for name, result in results(config).items():
        assert result == expected[name]
    assert first.id not in {event.get("cell") for event in log.events}, "a cell that was done is not done again"
    # What was trained before the last save is not trained again.
    steps = Counter((e["learning_rate"], e["step"]) for e in [*killed.of("step"), *log.of("step")])
    assert set(steps) == {(rate, step) for rate in config.rates(method) for step in range(1, 5)}
    assert sum(steps.values()) == 8 + (1 if "at a step" in moment else 0)
    resumed = {"before the first step": [0], "at a step of the first try": [2], "at a step of the second try": [2]}
    assert [event["step"] for event in log.of("resume")] == resumed.get(moment, [])
    batches = [event["count"] for event in [*killed.of("decoded"), *log.of("decoded")] if event["cell"] == last.id]
    assert batches == ([2, 2, 3] if moment == "while decoding" else [2, 3])


@pytest.mark.parametrize(
    ("moment", "method"),
    [
        ("at a step of the second try", "prefix"),
        ("at a step of the second try", "full"),
        ("while decoding", "prefix"),
        ("while decoding", "zero-shot"),
    ],
)
def test_what_was_stopped_in_another_dtype_begins_again(configure: Make, tmp_path: Path, moment: str, method: str):
    config = configure(tmp_path / "study", methods=(method,), decode_batch=2)
    killed, log = Log(), Log()

    def kill(event: Event) -> None:
        killed.events.append(event)
        if MOMENTS[moment](event, len(killed.of("try"))):
            raise Killed

    with pytest.raises(Killed):
        run_study(config, on_event=kill)
    with pytest.raises(ConfigError, match="were computed in float32, but this machine would compute in bfloat16"):
        check_same_dtype(config.replace(dtype="auto"), plan(config), "bfloat16")
    other = config.replace(dtype="bfloat16")
    assert len(run_study(other, on_event=log.events.append).done) == 1
    assert log.of("resume") == []
    if moment != "while decoding":
        # The rate is chosen by losses of one dtype.
        steps = Counter((event["learning_rate"], event["step"]) for event in log.of("step"))
        assert steps == {(rate, step): 1 for rate in config.rates(method) for step in range(1, 5)}
    assert read(cell_folder(config, method) / "evaluation.json")["settings"]["dtype"] == "bfloat16"
    assert sum(event["count"] == 3 for event in log.of("decoded")) == 1


def test_another_model_in_the_same_place_is_refused(
    configure: Make, tmp_path: Path, model: str, tiny_models: Make
) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = configure(tmp_path / "study", methods=("zero-shot",), backbone=str(tmp_path / "model"))
    run_study(config)
    larger = config.replace(methods=("zero-shot", "few-shot"))
    other = tiny_models("llama", num_hidden_layers=1, max_position_embeddings=2048)
    with torch.no_grad():
        for weights in other.parameters():
            weights.add_(0.1)
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="began with another model than"):
        run_study(larger)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(model, tmp_path / "model")
    assert len(run_study(larger).done) == 2


def test_one_try_is_resumed_in_its_own_folder(configure: Make, tmp_path: Path):
    def kill(event: Event) -> None:
        if a_step(event):
            raise Killed

    config = configure(tmp_path / "study", methods=("prefix",), tries=1)
    with pytest.raises(Killed):
        run_study(config, on_event=kill)
    (cell,) = read_results(config.folder).cells
    assert (cell.status, cell.factors) == ("waiting", plan(config)[0].factors()), "reports know it on its way"
    log = Log()
    assert run_study(config, on_event=log.events.append).done
    assert [event["step"] for event in log.of("step")] == [3, 4]


def test_other_settings_are_refused_and_paths_may_change(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", methods=("zero-shot",))
    run_study(config)
    before = (config.folder / "study.json").read_bytes()
    for changes in ({"num_beams": 2}, {"test_limit": 2}, {"methods": ("prefix",)}):
        with pytest.raises(ConfigError, match="began with other settings: ") as error:
            run_study(config.replace(**changes))
        (name,) = changes
        assert f"{name} was " in error.value.message
        assert "choose another output" in error.value.hint
    assert (config.folder / "study.json").read_bytes() == before
    (tmp_path / "study").rename(tmp_path / "moved")
    moved = config.replace(output=str(tmp_path / "moved"), budget=9.0, keep_weights=True, data="elsewhere")
    log = Log()
    assert run_study(moved, on_event=log.events.append).done
    assert log.events == []


def test_a_study_grows_and_its_runs_still_count(configure: Make, tmp_path: Path):
    settings: dict[str, Any] = {"name": "low-data", "seeds": 1, "dev_share": 0.0, "patience": 0}
    rates, steps = [1e-3, 3e-3], {"8": 2}
    first = configure(
        tmp_path / "study",
        **settings,
        methods=("prefix",),
        subsets=1,
        steps_by_size=steps,
        learning_rates={"prefix": rates},
    )
    run_study(first)
    (known,) = plan(first)
    before = results(first)
    larger = configure(
        tmp_path / "study",
        **settings,
        methods=("full", "prefix"),
        sizes=(8, 12),
        subsets=2,
        steps_by_size={**steps, "12": 3},
        learning_rates={"prefix": rates, "full": [1e-4, 3e-4]},
    )
    log = Log()
    outcome = run_study(larger, on_event=log.events.append)
    assert (outcome.failed, outcome.left, len(outcome.done)) == ({}, (), 8)
    assert known.id not in {event.get("cell") for event in log.events}
    after = results(larger)
    assert after[known.id] == before[known.id]
    assert after["full-n12-subset1-seed0"][1]["steps"] == 3
    assert read(first.folder / "study.json")["config"]["sizes"] == [8, 12]
    with pytest.raises(ConfigError, match="began with other settings: "):
        run_study(first)


def test_runs_at_a_rate_that_is_no_more_chosen_wait(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"methods": ("full",), "name": "low-data", "subsets": 3, "seeds": 1, "steps_by_size": {}, "sizes": (8,)}
    values |= {"dev_share": 0.0, "patience": 0, "lengths": (3,)}
    first = configure(tmp_path / "study", learning_rates={"full": [1e-4]}, **values)
    run_study(first)
    more = configure(tmp_path / "study", learning_rates={"full": [1e-4, 3e-4]}, **values)
    real = train

    def better(config: Any, **given: Any) -> Any:
        return dataclasses.replace(real(config, **given), best_loss=0.001 if config.learning_rate == 3e-4 else 9.0)

    def kill_the_second(event: Event) -> None:
        if a_step(event) and "subset1" in event["cell"] and event["step"] == 3:
            raise Killed

    monkeypatch.setattr("prefixtune.studies.cell.train", better)
    with pytest.raises(Killed):
        run_study(more, on_event=kill_the_second)
    cells = read_results(more.folder).cells
    assert [(cell.status, cell.figures.get("learning_rate")) for cell in cells] == [
        ("done", 3e-4),
        ("waiting", None),
        ("waiting", 1e-4),
    ], "reports count none at another rate"
    # A third rate becomes the best one while the second sample's run is half done.
    most = configure(tmp_path / "study", learning_rates={"full": [1e-4, 3e-4, 9e-4]}, **values)

    def best(config: Any, **given: Any) -> Any:
        return dataclasses.replace(real(config, **given), best_loss=0.0001 if config.learning_rate == 9e-4 else 9.0)

    monkeypatch.setattr("prefixtune.studies.cell.train", best)
    outcome = run_study(most)
    assert (outcome.failed, outcome.left) == ({}, ())
    assert {cell.figures["learning_rate"] for cell in read_results(most.folder).cells} == {9e-4}
    tuning = read(next((most.folder / "tuning").iterdir()))
    assert list(tuning["learning_rate"]) == ["0.0001", "0.0003", "0.0009"]


def test_reductions_of_the_papers_protocol_are_described(configure: Make, tmp_path: Path):
    values = {"name": "low-data", "methods": ("prefix",), "subsets": 1, "sizes": (50, 500), "patience": 2}
    config = configure(tmp_path / "study", **values, steps_by_size={"50": 60}, max_steps=100, learning_rates={})
    cut = describe_reductions(config, [cell.id for cell in plan(config)], 4)
    assert cut[1:] == [
        "trained on samples of 50 targets",
        "trained on samples of 500 targets",
        "1 subset instead of 5",
        "2 tries instead of 3",
        "patience 2 instead of 5",
        "methods without full",
        "sizes without 100, 200",
        "60 steps on 50 targets instead of 200",
        "100 steps on 500 targets instead of 400",
        cut[-1],
    ]
    assert cut[-1].startswith("4 of 4 runs are not done")


def test_a_process_of_the_smaller_study_does_not_undo_growth(configure: Make, tmp_path: Path):
    small = configure(tmp_path / "study", methods=("zero-shot", "few-shot"), shots=1)
    large = small.replace(methods=("zero-shot", "few-shot", "prefix"))
    before: list[Any] = []

    def grow(event: Event) -> None:
        if event["event"] == "cell" and event["status"] == "done" and not before:
            run_study(large)
            before.extend([read(small.folder / "study.json"), read(small.folder / "comparisons.json")])

    run_study(small, on_event=grow)
    assert [read(small.folder / "study.json"), read(small.folder / "comparisons.json")] == before
    assert before[0]["config"]["methods"] == ["zero-shot", "few-shot", "prefix"]


def test_other_data_under_the_same_settings_are_refused(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", methods=("zero-shot",))
    run_study(config)
    grown = config.replace(methods=("zero-shot", "few-shot"), test="train")
    with pytest.raises(DataError, match="the test data is not what the study in") as error:
        run_study(grown)
    assert "choose another output" in error.value.hint
    assert not run_study(grown.replace(test="held_out")).left


def test_a_study_of_the_bare_model_needs_a_test_set_alone(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", methods=("zero-shot",), train="", dev="")
    assert not run_study(config).left
    assert list(read(config.folder / "study.json")["data_digests"]) == ["test"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_any_error_of_a_run_is_reported_and_the_others_go_on(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(tmp_path / "study"), train

    def too_large(given: Any, **options: Any) -> Any:
        if given.method == "full":
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB\nand more")
        return real(given, **options)

    monkeypatch.setattr("prefixtune.studies.cell.train", too_large)
    outcome = run_study(config)
    assert [*outcome.failed] == [cell_folder(config, "full").name]
    (error,) = outcome.failed.values()
    assert error.startswith("OutOfMemoryError: Tried to allocate 2 GiB. Lower batch_size")
    assert error.endswith("The traceback is in error.txt.")
    assert "in too_large" in (cell_folder(config, "full") / "error.txt").read_text()
    assert outcome.done == (cell_folder(config, "prefix").name,)
    monkeypatch.setattr("prefixtune.studies.cell.train", real)
    assert not run_study(config).failed
    assert not (cell_folder(config, "full") / "error.txt").exists()


def test_a_full_disk_is_no_learning_rate_that_fails(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(tmp_path / "study", methods=("prefix",), try_steps=2), train
    rates = config.rates("prefix")

    def full(given: Any, **options: Any) -> Any:
        if given.learning_rate == rates[1]:
            raise PrefixError("cannot write: No space left on device.", hint="make room.")
        return real(given, **options)

    monkeypatch.setattr("prefixtune.studies.cell.train", full)
    assert [*run_study(config).failed.values()] == ["cannot write: No space left on device. make room."]
    assert not [*(config.folder / "tuning").glob("*.json")]
    # With room again, all rates are tried.
    monkeypatch.setattr("prefixtune.studies.cell.train", real)
    assert run_study(config).done
    (tuning,) = (config.folder / "tuning").glob("*.json")
    assert all(loss is not None for loss in read(tuning)["learning_rate"].values())


def test_a_start_that_a_setting_would_change_is_refused(configure: Make, tmp_path: Path) -> None:
    config = configure(tmp_path / "study", methods=("prefix",), max_steps=2)
    config = config.replace(train_settings={**config.train_settings, "init_examples": 2})
    with pytest.raises(ConfigError, match="init_examples"):
        run_study(config)


def test_a_cell_whose_record_is_deleted_is_made_again(configure: Make, tmp_path: Path) -> None:
    config = configure(tmp_path / "study", methods=("full",), tries=1)
    assert run_study(config).done
    folder = cell_folder(config, "full")
    scores = read(folder / "evaluation.json")["scores"]
    (folder / "cell.json").unlink()
    assert run_study(config).done
    assert read(folder / "evaluation.json")["scores"] == scores


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("study.json", '{"config": null}', "has no config"),
        ("cells/{cell}/cell.json", "{}", "has no status, figures"),
        ("cells/{cell}/cell.json", '{"status": "done", "figures": null}', "has no figures"),
        ("cells/{cell}/cell.json", "[]", "has no status, figures"),
        ("tuning/{group}.json", "{}", "has no"),
    ],
)
def test_a_file_of_something_else_is_named(
    name: str, text: str, says: str, whole: tuple[StudyConfig, Log], tmp_path: Path
):
    config = whole[0].replace(output=str(tmp_path / "copied"))
    shutil.copytree(whole[0].folder, config.folder)
    cell = next(cell for cell in plan(config) if cell.method == "prefix")
    (config.folder / name.format(cell=cell.id, group=cell.group)).write_text(text)
    with pytest.raises(DataError, match=says) as error:
        run_study(config)
    assert error.value.hint == "delete it, and run the study again."


def test_outputs_with_odd_line_ends_are_compared(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", methods=("prefix", "zero-shot"), tries=1)
    run_study(config)
    before = read(config.folder / "comparisons.json")
    path = cell_folder(config, "zero-shot") / "outputs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    rows[0]["source"] += "\u2028"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (config.folder / "comparisons.json").unlink()
    run_study(config)
    again = read(config.folder / "comparisons.json")
    assert again["pairs"][0]["difference"] == before["pairs"][0]["difference"]
    assert before["pairs"][0]["p_value"] is not None
    assert again["pairs"][0]["p_value"] is None, "of another item"


def test_a_cell_that_fails_is_reported_and_the_others_go_on(configure: Make, tmp_path: Path):
    config = configure(
        tmp_path / "study",
        methods=("full", "prefix"),
        seeds=2,
        learning_rates={"full": [1e30, 3e30], "prefix": [1e-3, 1e30]},
    )
    log = Log()
    outcome = run_study(config, on_event=log.events.append)
    failed, second = (cell_folder(config, "full", seed).name for seed in (0, 1))
    assert [*outcome.failed] == [failed]
    assert "reached its end at any learning rate of 1e+30, 3e+30" in outcome.failed[failed]
    assert outcome.left == (second,), "there is no rate for it"
    assert len(outcome.done) == 2
    stored = read(config.folder / "cells" / failed / "cell.json")
    assert (stored["status"], stored["figures"]) == ("failed", {})
    assert "lower ones" in stored["error"]
    # Of the prefix's two rates one ends.
    assert "loss" in next(
        event["error"] for event in log.of("try") if event["cell"].startswith("prefix-") and "error" in event
    )
    tuning = read(config.folder / "study.json")["tuning"]
    (choice,) = (entry for group, entry in tuning.items() if group.startswith("prefix"))
    assert choice["chosen"] == 1e-3
    assert choice["learning_rate"]["1e+30"] is None
    assert {cell.status for cell in read_results(config.folder).cells} == {"done", "failed", "waiting"}
    # The next run tries it once more, and nothing else.
    log = Log()
    assert [*run_study(config, on_event=log.events.append).failed] == [failed]
    assert {event["cell"] for event in log.events if event["event"] != "overlap"} == {failed}


def test_a_failed_run_is_tried_once_more_by_one_of_several_processes(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fail(config: Any, **given: Any) -> Any:
        tried.append(config.method)
        raise ConfigError("too little memory.", hint="get more.")

    monkeypatch.setattr("prefixtune.studies.cell.train", fail)
    run_study(configure(tmp_path / "study", tries=1))
    assert tried == ["prefix", "full"]
    config = configure(tmp_path / "study", methods=("zero-shot", "prefix", "full"), tries=1)

    def let_another_finish(event: Event) -> None:
        if event["event"] == "cell" and event["status"] == "done":
            run_study(config)

    outcome = run_study(config, on_event=let_another_finish)
    assert tried[2:] == ["prefix", "full"], "the other process has tried both"
    assert len(outcome.failed) == 2
    run_study(config)
    assert tried[4:] == ["prefix", "full"], "each start tries them once"


def test_data_that_is_broken_or_too_small_is_reported_before_anything_is_trained(configure: Make, tmp_path: Path):
    log, broken = Log(), tmp_path / "test.csv"
    broken.write_text("mr,ref\n")
    good = tmp_path / "train.csv"
    good.write_text('mr,ref\n"name[Aromi], food[Soup]",Aromi has soup.\n')
    config = configure(tmp_path / "study", task="e2e", train=str(good), dev=str(good), test=str(broken), sizes=(0,))
    for wrong, message in (
        (config, "test.csv"),
        (
            config.replace(test=str(good), sizes=(0, 2)),
            "a sample of 2 targets was requested, but there are 1",
        ),
        (
            config.replace(test=str(good), methods=("few-shot",)),
            "few-shot needs 3 solved examples, but the smallest sample has 1",
        ),
        (config.replace(test=str(tmp_path / "nowhere.csv")), "nowhere.csv"),
    ):
        with pytest.raises(DataError, match=message):
            run_study(wrong, on_event=log.events.append)
    with pytest.raises(ConfigError, match="no dev data"):
        run_study(config.replace(test=str(good), dev=""), on_event=log.events.append)
    assert log.events == []
    assert not config.folder.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("top:9",)}, "top9-n8: method_size is 9, but '.*backbone' has 1 layers"),
        ({"lengths": (3, 5000), "methods": ("prefix",)}, "prefix-n8-P5000-task: .*5,?000"),
        (
            {"starts": ("prompt",), "prompt_text": "ab", "lengths": (40,)},
            "prefix-n8-P40-prompt: .* has .* tokens?, but",
        ),
        ({"settings": {"chat_template": "nowhere.jinja"}}, "chat_template is 'nowhere.jinja', which is no file"),
        ({"settings": {"chat_template": "model"}}, "chat_template is 'model', but '.*backbone' has none"),
        ({"settings": {"classifier": "head"}}, "classifier is 'head', but task 'toy' has no labels"),
        ({"settings": {"beside": "self"}, "methods": ("prefix",)}, "beside is 'self'"),
        ({"settings": {"beside": "nowhere"}, "methods": ("prefix",)}, "nowhere"),
        ({"settings": {"shard": True}}, "shard splits a frozen backbone"),
        ({"settings": {"sites": "encoder"}, "methods": ("prefix",)}, "has no site encoder"),
    ],
)
def test_what_a_run_cannot_do_is_reported_before_anything_is_trained(
    values: dict[str, Any], message: str, configure: Make, tmp_path: Path
):
    log = Log()
    config = configure(tmp_path / "study", **{key: value for key, value in values.items() if key != "settings"})
    config = config.replace(train_settings={**config.train_settings, **values.get("settings", {})})
    with pytest.raises(ConfigError, match=message) as error:
        run_study(config, on_event=log.events.append)
    # What the study itself sets has another name there.
    assert ("In a study, " in error.value.hint) == ("settings" not in values)
    assert log.of("start") == []
    assert not config.folder.exists()


def test_a_backbone_of_several_that_cannot_do_a_run_is_named(
    model: str, configure: Make, tmp_path: Path, tiny_models: Make, tiny_tokenizer: Any
) -> None:
    shallow = tmp_path / "two-layers"
    tiny_models("llama", num_hidden_layers=2, max_position_embeddings=2048).save_pretrained(shallow)
    tiny_tokenizer.save_pretrained(shallow)
    config = configure(tmp_path / "study", name="scale", methods=("top:2",), backbones=(str(shallow), model))
    with pytest.raises(ConfigError, match=r"backbone-top2-n8: method_size is 2, but '.*backbone' has 1 layers"):
        run_study(config)


def test_texts_alone_are_refused(configure: Make, tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "One text."}\n{"text": "Another one."}\n')
    paths = dict.fromkeys(("train", "dev", "test"), str(data))
    config = configure(tmp_path / "study", task="records", sizes=(0,), **paths)
    with pytest.raises(DataError, match="texts alone") as error:
        run_study(config)
    assert "give source and target" in error.value.hint
    assert not config.folder.exists()


def test_a_run_that_never_was_done_may_be_corrected_or_left_out(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(tmp_path / "study", tries=1), train

    def too_large(given: Any, **options: Any) -> Any:
        result = real(given, **options)
        if given.method == "full" and given.batch_size > 2:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        return result

    monkeypatch.setattr("prefixtune.studies.cell.train", too_large)
    assert [*run_study(config).failed] == [cell_folder(config, "full").name]
    before = results(config.replace(methods=("prefix",)))
    # Of what is done, nothing may change.
    for settings in ({"batch_size": 2}, {"prefix": {"batch_size": 2}}):
        with pytest.raises(ConfigError, match="began with other settings: train_settings was"):
            run_study(config.replace(train_settings={**config.train_settings, **settings}))
    smaller = config.replace(train_settings={**config.train_settings, "full": {"batch_size": 2}})
    outcome = run_study(smaller)
    assert (outcome.failed, outcome.left) == ({}, ())
    assert results(smaller.replace(methods=("prefix",))) == before
    assert read(config.folder / "study.json")["config"] == smaller.to_dict()
    # From now on it counts.
    with pytest.raises(ConfigError, match="began with other settings: train_settings was"):
        run_study(config)


def test_what_was_stopped_is_kept_where_another_method_is_corrected(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(tmp_path / "study", methods=("full", "prefix"), tries=3), train
    log, done = Log(), []

    def too_large(given: Any, **options: Any) -> Any:
        if given.method == "full" and given.batch_size > 2:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        return real(given, **options)

    def kill(event: Event) -> None:
        if event["event"] == "try" and event["cell"].startswith("prefix"):
            done.append(event["learning_rate"])
            if len(done) == 2:
                raise Killed

    monkeypatch.setattr("prefixtune.studies.cell.train", too_large)
    with pytest.raises(Killed):
        run_study(config, on_event=kill)
    # A method with tries is begun: it is neither changed nor left out.
    for other in (
        config.replace(methods=("full",)),
        config.replace(train_settings={**config.train_settings, "prefix": {"batch_size": 2}}),
        config.replace(steps_by_size={str(config.sizes[0]): 9}),
    ):
        with pytest.raises(ConfigError, match="began with other settings"):
            run_study(other)
    smaller = config.replace(train_settings={**config.train_settings, "full": {"batch_size": 2}})
    outcome = run_study(smaller, on_event=log.events.append)
    assert (outcome.failed, outcome.left) == ({}, ())
    begun = {event["learning_rate"] for event in log.of("start") if event["cell"].startswith("prefix")}
    assert begun.isdisjoint(done)


def test_a_process_does_not_go_on_with_settings_that_another_one_has_corrected(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(tmp_path / "study", methods=("full", "prefix"), tries=1), train
    smaller = config.replace(train_settings={**config.train_settings, "full": {"batch_size": 2}})
    given_to_full = []

    def too_large(given: Any, **options: Any) -> Any:
        if given.method == "full":
            given_to_full.append(given.batch_size)
            if given.batch_size > 2:
                raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        return real(given, **options)

    def correct(event: Event) -> None:
        # While this process goes on with the prefix, another one begins with settings that suit full fine-tuning.
        if event["event"] == "cell" and event["status"] == "begun" and event["cell"].startswith("prefix"):
            runner._check_settings_again(smaller)
            write_study(smaller, plan(smaller), Provenance("other"), begins=True)

    monkeypatch.setattr("prefixtune.studies.cell.train", too_large)
    with pytest.raises(ConfigError, match=r"has been corrected since this process began: train_settings was") as error:
        run_study(config, on_event=correct)
    assert "start it again" in error.value.hint
    assert given_to_full == [4]
    outcome = run_study(smaller)
    assert (outcome.failed, outcome.left) == ({}, ())
    assert given_to_full == [4, 2]


def test_what_another_process_leaves_out_is_not_run(configure: Make, tmp_path: Path) -> None:
    config = configure(tmp_path / "study", tries=1)
    fewer = config.replace(methods=("prefix",))

    def leave_out(event: Event) -> None:
        if event["event"] == "cell" and event["status"] == "begun":
            runner._check_settings_again(fewer)
            write_study(fewer, plan(fewer), Provenance("other"), begins=True)

    with pytest.raises(ConfigError, match="has been corrected since this process began: methods was"):
        run_study(config, on_event=leave_out)
    assert read(config.folder / "study.json")["config"]["methods"] == ["prefix"]
    assert [path.name for path in (config.folder / "cells").iterdir()] == [cell.id for cell in plan(fewer)]
    assert len(run_study(fewer).done) == 1


def test_a_correction_while_another_process_saves_stands(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path / "study", tries=1)
    smaller = config.replace(train_settings={**config.train_settings, "full": {"batch_size": 2}})
    real, others = records.describe_reductions, list[Thread]()

    def begin() -> None:
        with file_lock(config.folder / runner._LOCK, timeout=20):
            runner._check_settings_again(smaller)
            write_study(smaller, plan(smaller), Provenance("other"), begins=True)

    def describe(given: StudyConfig, *arguments: Any, **options: Any) -> Any:
        # The first save after a run: what the file said has been read, and is about to be written.
        if given is config and read_figures(config, plan(config)[0]) and not others:
            others.append(Thread(target=begin))
            others[0].start()
            others[0].join(1.0)
        return real(given, *arguments, **options)

    def wait() -> None:
        for other in others:
            other.join(20)

    monkeypatch.setattr(records, "describe_reductions", describe)
    # What follows a save.
    monkeypatch.setattr(runner, "gc", SimpleNamespace(collect=wait))
    with pytest.raises(ConfigError, match="has been corrected since this process began: train_settings was"):
        run_study(config)
    assert len(others) == 1
    assert read(config.folder / "study.json")["config"] == smaller.to_dict()


def test_a_finished_study_keeps_what_its_runs_were_made_with(configure: Make, tmp_path: Path) -> None:
    config = configure(tmp_path / "study", methods=("prefix",), tries=1)
    run_study(config)
    before = (config.folder / "study.json").read_bytes()
    assert run_study(config.replace(dtype="auto", decode_batch=7)).left == ()
    assert (config.folder / "study.json").read_bytes() == before


def test_a_process_goes_on_where_another_one_has_made_the_study_larger(configure: Make, tmp_path: Path) -> None:
    config = configure(tmp_path / "study", tries=1)
    larger = config.replace(methods=(*config.methods, "top:1"))

    def grow(event: Event) -> None:
        if event["event"] == "cell" and event["status"] == "begun" and event["cell"].startswith("prefix"):
            runner._check_settings_again(larger)
            write_study(larger, plan(larger), Provenance("other"), begins=True)

    assert len(run_study(config, on_event=grow).done) == 2
    assert read(config.folder / "study.json")["config"]["methods"] == [*larger.methods]


def test_a_folder_with_a_study_of_another_name_is_refused(configure: Make, tmp_path: Path) -> None:
    config = configure(tmp_path / "study", name="scale", methods=("zero-shot",))
    assert len(run_study(config).done) == 1
    with pytest.raises(ConfigError, match="name was 'scale', is 'methods'"):
        run_study(config.replace(name="methods"))


def test_a_method_that_never_was_done_may_be_left_out(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = configure(tmp_path / "study", tries=1, lengths=(3, 4)), train

    def fail(given: Any, **options: Any) -> Any:
        result = real(given, **options)
        if given.method == "full" or given.prefix_length == 4:
            raise ConfigError("it cannot be done.")
        return result

    monkeypatch.setattr("prefixtune.studies.cell.train", fail)
    assert len(run_study(config).failed) == 2
    left = config.replace(methods=("prefix",), lengths=(3,))
    outcome = run_study(left)
    assert (len(outcome.done), outcome.failed, outcome.left) == (1, {}, ())
    assert [path.name for path in (config.folder / "cells").iterdir() if path.is_dir()] == [*outcome.done]
    assert [cell.id for cell in read_results(config.folder).cells] == [*outcome.done]
    with pytest.raises(ConfigError, match="methods was"):
        run_study(config.replace(methods=("zero-shot",)))


def test_fewer_texts_at_once_help_a_run_that_has_too_little_memory_to_decode(
    configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtune.evaluation.evaluate import evaluate

    def too_many(*given: Any, config: Any, **options: Any) -> Any:
        outcome = evaluate(*given, config=config, **options)
        if config.batch_size > 2:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        return outcome

    monkeypatch.setattr("prefixtune.studies.cell.evaluate", too_many)
    config, log = configure(tmp_path / "study", methods=("prefix",)), Log()
    assert "or decode_batch" in next(iter(run_study(config).failed.values()))
    assert run_study(config.replace(decode_batch=2), on_event=log.events.append).done
    assert log.of("step") == []


def test_the_budget_leaves_what_it_has_no_time_for_and_says_so(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", methods=("zero-shot", "prefix"), budget=1e-9)
    outcome = run_study(config)
    assert (outcome.done, outcome.left) == ((), tuple(cell.id for cell in plan(config)))
    stored = read(config.folder / "study.json")
    assert stored["budget_minutes"] == 1e-9
    assert f"2 of 2 runs are not done within 1e-09 minutes: {', '.join(outcome.left)}" in stored["cut"]
    assert {cell.status for cell in read_results(config.folder).cells} == {"waiting"}
    more = config.replace(budget=60.0)
    assert len(run_study(more).done) == 2
    assert not any("not done" in text for text in read(config.folder / "study.json")["cut"])


# --- more rates, later -----------------------------------------------------------------------------------------------


def test_short_tries_choose_the_rate_and_the_run_is_made_anew(configure: Make, tmp_path: Path):
    config = configure(tmp_path / "study", methods=("prefix",), try_steps=2)
    log = Log()
    assert not run_study(config, on_event=log.events.append).left
    (cell,) = plan(config)
    starts = [(event["learning_rate"], event["total_steps"]) for event in log.of("start")]
    tried = {event["learning_rate"]: event["dev_loss"] for event in log.of("try")}
    best = min(tried, key=tried.__getitem__)
    assert starts == [*((rate, 2) for rate in config.rates("prefix")), (best, 4)]
    figures = read(cell_folder(config, "prefix") / "cell.json")["figures"]
    assert (figures["learning_rate"], figures["steps"]) == (best, 4)
    # The try's own schedule ran down to its end, and its loss is its own.
    assert read(config.folder / "tuning" / f"{cell.group}.json")["learning_rate"] == {
        f"{rate:g}": loss for rate, loss in tried.items()
    }
    assert figures["dev_loss"] != tried[best]
    assert "learning rates chosen by runs of 2 steps" in read(config.folder / "study.json")["cut"]


@pytest.mark.parametrize("better", [False, True])
def test_a_rate_that_stood_alone_is_tried_beside_those_that_are_added(
    better: bool, configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, trained = train, list[tuple[float, int]]()

    def watch(config: Any, **given: Any) -> Any:
        trained.append((config.learning_rate, config.max_steps))
        # The loss falls with the steps; of as many, the rates differ as this test says.
        loss = 9.0 / config.max_steps + (0.1 if (config.learning_rate == 3e-3) != better else 0.0)
        return dataclasses.replace(real(config, **given), best_loss=loss)

    monkeypatch.setattr("prefixtune.studies.cell.train", watch)
    values = {"methods": ("prefix",), "try_steps": 2}
    first = configure(tmp_path / "study", learning_rates={"prefix": [1e-3]}, **values)
    assert not run_study(first).left
    assert trained == [(1e-3, 4)], "a single rate needs no try"
    trained.clear()
    more = configure(tmp_path / "study", learning_rates={"prefix": [1e-3, 3e-3]}, **values)
    assert not run_study(more).left
    assert trained == [(1e-3, 2), (3e-3, 2), *([(3e-3, 4)] if better else [])]
    (cell,) = plan(more)
    tuning = read(more.folder / "tuning" / f"{cell.group}.json")
    low, high = sorted(tuning["learning_rate"].values())
    assert (low, high) == (4.5, 4.6)
    figures = read(cell_folder(more, "prefix") / "cell.json")["figures"]
    assert figures["learning_rate"] == tuning["chosen"] == (3e-3 if better else 1e-3)
    assert figures["steps"] == 4


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_steps": 100, "warmup_steps": 20, "patience": 3}, {"max_steps": 25, "warmup_steps": 5}),
        ({"max_steps": 10, "warmup_steps": 2}, {"max_steps": 10, "warmup_steps": 2}),
        # 80 targets in batches of 16, five times over, are 25 steps; eight times are 40.
        ({"epochs": 5.0, "batch_size": 16}, {"epochs": 5.0, "batch_size": 16, "max_steps": 25, "warmup_steps": 20}),
        ({"epochs": 8.0, "batch_size": 16}, {"epochs": 8.0, "batch_size": 16, "max_steps": 25, "warmup_steps": 12}),
        ({"epochs": 1.0, "batch_size": 16}, {"epochs": 1.0, "batch_size": 16, "max_steps": 5, "warmup_steps": 20}),
    ],
)
def test_a_try_warms_up_over_the_same_share_of_its_steps(values: dict[str, Any], expected: dict[str, Any]):
    shortened = shorten_config(values, 25, 80)
    assert shortened == {**expected, "eval_every": expected["max_steps"], "patience": 0}


@pytest.mark.parametrize("better", [False, True])
def test_more_tries_train_what_is_new_alone(
    better: bool, configure: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"methods": ("prefix", "full"), "name": "low-data", "sizes": (8,), "subsets": 2, "seeds": 1}
    values |= {"steps_by_size": {}, "dev_share": 0.0, "patience": 0}
    first = configure(tmp_path / "study", tries=2, **values)
    assert not run_study(first).left
    cells = {cell.id: json.loads((first.folder / "cells" / cell.id / "cell.json").read_text()) for cell in plan(first)}
    real, trained = train, Counter[tuple[str, float]]()

    def watch(config: Any, **given: Any) -> Any:
        trained[config.method, config.learning_rate] += 1
        result = real(config, **given)
        # Whether the further rate is the best is settled here, not by chance.
        if config.learning_rate not in first.rates(config.method):
            result = dataclasses.replace(result, best_loss=0.001 if better else 99.0)
        return result

    monkeypatch.setattr("prefixtune.studies.cell.train", watch)
    more = configure(tmp_path / "study", tries=3, **values)
    outcome = run_study(more)
    assert len(outcome.done) == len(cells)
    new = {method: set(more.rates(method)) - set(first.rates(method)) for method in ("prefix", "full")}
    # Once to try; and once more for the second sample, where it has become the rate of both.
    assert trained == {(method, rate): 2 if better else 1 for method, rates in new.items() for rate in rates}
    with pytest.raises(ConfigError, match="began with other settings: tries was 3, is 2"):
        run_study(first)
    for cell in plan(more):
        facts = json.loads((more.folder / "cells" / cell.id / "cell.json").read_text())
        tuning = json.loads((more.folder / "tuning" / f"{cell.group}.json").read_text())
        assert len(tuning["learning_rate"]) == 3
        assert facts["figures"]["learning_rate"] == tuning["chosen"]
        if better:
            assert {tuning["chosen"]} == new[cell.method]
            assert facts != cells[cell.id]
        else:
            assert facts == cells[cell.id], "what was done stays"
