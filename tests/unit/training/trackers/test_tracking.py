"""A run that reports to a tracker: what it reports, that nothing is reported twice, and that no tracker ends it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training.distributed import ProcessGroup
from prefixtune.training.trackers import tracking
from prefixtune.training.trackers.samples import as_markdown
from prefixtune.training.trackers.tracker import TrackedRun
from prefixtune.training.train import train_together

DEV = [pt.Example("n : e", ("ee it is.",)), pt.Example("n : f", ("ff it is.",))]


class Fake:
    """A tracker that remembers; `fails` says at which calls it raises."""

    fails: Callable[[str, int], bool] = staticmethod(lambda call, step: False)

    def __init__(self, run: TrackedRun) -> None:
        if self.fails("start", run.step):
            raise OSError("no network")
        self.run, self.logged = run, run.logged
        self.identity = dict(run.identity) or {"id": f"{run.name}-1"}
        self.how_to_see = "look"
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.outcomes: list[str] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.fails("log", step):
            raise OSError("the disk is full\nand more")
        self.rows.append((step, dict(values)))

    def log_text(self, title: str, text: str, step: int) -> None:
        self.texts.append((step, title, text))

    def finish(self, outcome: str) -> None:
        self.outcomes.append(outcome)
        if self.fails("finish", 0):
            raise OSError("gone")

    def values(self, name: str) -> dict[int, float]:
        pairs = [(step, row[name]) for step, row in self.rows if name in row]
        assert len(pairs) == len(dict(pairs)), "a step was logged twice"
        return dict(pairs)


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trackers that were started; every name of a tracker stands for a fake one."""
    started: list[Any] = []

    def start(run: TrackedRun) -> Fake:
        started.append(Fake(run))
        return started[-1]  # type: ignore[no-any-return]

    for name in tracking.TRACKERS:
        monkeypatch.setitem(tracking.TRACKERS, name, start)
    install(monkeypatch, *tracking.TRACKERS)
    monkeypatch.setattr(Fake, "fails", staticmethod(lambda call, step: False))
    return started


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these trackers alone appear to be installed."""
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        if name in tracking.TRACKERS:
            return object() if name in names else None
        return find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def test_figures_texts_and_hyperparameters_are_reported(train: Callable[..., Any], tracked: list[Any]) -> None:
    result = train(4, dev_examples=DEV, eval_every=2, report_to="wandb", project="p", learning_rate=0.01)
    (tracker,) = tracked
    steps = {event["step"]: event for event in result.events if event["event"] == "step"}
    assert tracker.values("train/loss") == {step: event["loss_per_token"] for step, event in steps.items()}
    assert tracker.values("train/learning_rate") == {step: event["lr"] for step, event in steps.items()}
    assert tracker.values("train/grad_norm") == {step: event["grad_norm"] for step, event in steps.items()}
    assert tracker.values("train/tokens_per_second")[3] == steps[3]["target_tokens"] / steps[3]["seconds"]
    assert tracker.values("train/memory_mib")[1] > 10
    assert tracker.values("train/epoch") == {1: 1, 2: 2, 3: 3, 4: 4}
    losses = {event["step"]: event["loss"] for event in result.events if event["event"] == "evaluation"}
    assert tracker.values("eval/loss") == losses
    assert tracker.values("eval/best_loss")[4] == min(losses.values())
    assert [(step, title) for step, title, _ in tracker.texts] == [(2, "eval/examples"), (4, "eval/examples")]
    assert "n : e" in tracker.texts[0][2]
    assert "ff it is." in tracker.texts[0][2]
    assert (tracker.run.project, tracker.run.name, tracker.outcomes) == ("p", "run", ["finished"])
    assert tracker.run.hyperparameters["learning_rate"] == 0.01
    assert tracker.run.hyperparameters["report_to"] == "wandb"


def test_the_texts_are_those_of_generate(train: Callable[..., Any], backbone: Any, tracked: list[Any]) -> None:
    result = train(3, dev_examples=DEV, report_to=["mlflow"], max_length=100, learning_rate=0.3)
    examples = next(event["examples"] for event in result.events if event["event"] == "examples")
    expected = pt.generate(backbone, [example.source for example in DEV], result.prefix, max_new_tokens=48)
    assert [example["output"] for example in examples] == expected
    assert [example["target"] for example in examples] == [" ee it is. ", " ff it is. "]


@pytest.mark.parametrize("options", [{"report_examples": 0}, {"dev_examples": None}])
def test_no_texts(train: Callable[..., Any], tracked: list[Any], options: dict[str, Any]) -> None:
    train(2, **{"dev_examples": DEV, "report_to": "wandb", **options})
    assert not tracked[0].texts


def test_reporting_changes_nothing(train: Callable[..., Any], tracked: list[Any], tmp_path: Path) -> None:
    options = {"dev_examples": DEV, "eval_every": 2, "prefix_dropout": 0.3}
    plain = train(5, output=str(tmp_path / "plain"), **options)
    assert train(5, report_to="all", **options).prefix.equal(plain.prefix)
    assert len(tracked) == 4


def test_a_resumed_run_continues_and_repeats_no_step(
    train: Callable[..., Any], tracked: list[Any], tmp_path: Path
) -> None:
    options = {"dev_examples": DEV, "eval_every": 2, "save_every": 4, "report_to": "trackio", "run_name": "mine"}

    class Killed(Exception):
        pass

    def kill(event: Any) -> None:
        if event["event"] == "step" and event["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        train(10, on_event=kill, **options)
    result = train(10, resume=True, **options)
    first, second = tracked
    assert first.outcomes == ["failed"]
    assert second.outcomes == ["finished"]
    assert second.run.identity == first.identity == {"id": "mine-1"}
    assert second.run.step == 4
    # Steps 5 to 7 were logged before the kill, with the figures that the resumed run computes again.
    assert [*first.values("train/loss"), *second.values("train/loss")] == list(range(1, 11))
    assert [*first.values("eval/loss"), *second.values("eval/loss")] == [2, 4, 6, 8, 10]
    assert [step for step, _, _ in first.texts + second.texts] == [2, 4, 6, 8, 10]
    again = {event["step"]: event["loss_per_token"] for event in result.events if event["event"] == "step"}
    assert first.values("train/loss")[7] == again[7]
    news = [event for event in result.events if event["event"] == "tracking"]
    assert [event["step"] for event in news] == [4], "the log has the news of the resumed run alone"


def test_a_resumed_run_may_report_elsewhere(train: Callable[..., Any], tracked: list[Any], tmp_path: Path) -> None:
    train(2, report_to="wandb")
    result = train(4, resume=True, report_to="mlflow")
    last = {event["step"]: event["loss_per_token"] for event in result.events[-9:] if event["event"] == "step"}
    assert not tracked[1].run.identity
    # What was before comes from the run's log.
    assert tracked[1].values("train/loss") == {**tracked[0].values("train/loss"), **last}
    assert "train/memory_mib" not in tracked[1].rows[0][1], "which is not that of then"
    stored = json.loads((tmp_path / "run" / "trackers.json").read_text(encoding="utf-8"))
    assert stored == {"wandb": {"id": "run-1"}, "mlflow": {"id": "run-1"}}
    assert pt.TrainConfig.from_file(tmp_path / "run" / "config.toml").report_to == ("mlflow",)


def test_a_tracker_that_fails_ends_nothing(
    train: Callable[..., Any], tracked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dev_examples": DEV, "eval_every": 3}
    plain = train(9, output=str(tmp_path / "plain"), **options)
    monkeypatch.setattr(Fake, "fails", staticmethod(lambda call, step: call == "log" and step in (2, 3, 4, 5)))
    result = train(9, report_to="wandb", **options)
    assert result.prefix.equal(plain.prefix)
    # It is tried again at the evaluations of steps 3 (in vain) and 6.
    assert sorted(tracked[0].values("train/loss")) == [1, 7, 8, 9]
    news = [event["message"] for event in result.events if event["event"] == "tracking"]
    assert news == [
        "reporting to wandb; see it: look",
        "wandb failed and is tried again at the next evaluation: OSError: the disk is full",
    ]


def test_a_tracker_that_does_not_finish_is_a_warning(
    train: Callable[..., Any], tracked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "fails", staticmethod(lambda call, step: call == "finish"))
    with pytest.warns(RuntimeWarning, match="wandb did not finish: OSError: gone"):
        train(1, report_to="wandb")


def test_a_tracker_that_does_not_start(
    train: Callable[..., Any], tracked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Fake, "fails", staticmethod(lambda call, step: call == "start"))
        with pytest.raises(ConfigError, match="wandb does not start: OSError: no network"):
            train(2, report_to="wandb")
    train(2, report_to="wandb")  # Nothing was left behind.
    monkeypatch.setattr(Fake, "fails", staticmethod(lambda call, step: call == "start"))
    result = train(4, report_to="wandb", resume=True)
    assert result.steps == 4, "a run that is resumed goes on without the tracker"
    assert any("goes on without it" in event.get("message", "") for event in result.events)


def test_texts_that_cannot_be_written_end_nothing(
    train: Callable[..., Any], tracked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tracking, "write_samples", write)
    result = train(4, dev_examples=DEV, eval_every=1, report_to="wandb")
    assert sum("out of memory" in event.get("message", "") for event in result.events) == 1
    assert sorted(tracked[0].values("eval/loss")) == [1, 2, 3, 4]


def test_other_processes_report_nothing(tracked: list[Any], train: Callable[..., Any], tmp_path: Path) -> None:
    class Other(ProcessGroup):
        def all_reduce(self, *values: float) -> tuple[float, ...]:
            return values

        def all_reduce_gradients(self, tensors: Any) -> None:
            pass

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prefix.safetensors").touch()
    with pytest.raises(pt.PrefixError):  # It writes no prefix either.
        train(2, report_to="wandb", processes=Other(1, 2))
    assert not tracked


def test_runs_that_train_together_are_tracked_each(
    backbone: Any, examples: list[pt.Example], tracked: list[Any], tmp_path: Path
) -> None:
    configs = [
        pt.TrainConfig(
            prefix_length=2, init_text="ab", max_steps=steps, output=str(tmp_path / f"r{steps}"), report_to="wandb"
        )
        for steps in (2, 3)
    ]
    events: list[Any] = []
    train_together(configs, backbone=backbone, examples=[examples, examples], on_event=events.append)
    assert [(t.run.name, len(t.values("train/loss")), t.outcomes) for t in tracked] == [
        ("r2", 2, ["finished"]),
        ("r3", 3, ["finished"]),
    ]
    assert [event["run"] for event in events if event["event"] == "tracking"] == [c.output for c in configs]


@pytest.mark.parametrize(
    ("installed", "names", "missing"),
    [
        ((), "wandb", "pip install wandb"),
        (("wandb",), "wandb,trackio,mlflow", "pip install trackio mlflow"),
        (("wandb", "trackio", "mlflow"), "all", "pip install tensorboard"),
    ],
)
@pytest.mark.usefixtures("no_backbone_loads")
def test_a_missing_tracker_is_an_error_before_the_model_loads(
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: tuple[str, ...],
    names: str,
    missing: str,
) -> None:
    install(monkeypatch, *installed)
    with pytest.raises(ConfigError) as caught:
        train(2, report_to=names, backbone=None)
    assert missing in str(caught.value.hint)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.toml"))


@pytest.mark.parametrize("text", ["[]", '{"wandb": 3}', "{", '{"wandb": {"id": 3}}', "[" * 99_999])
def test_a_damaged_file_of_trackers(train: Callable[..., Any], tracked: list[Any], tmp_path: Path, text: str) -> None:
    train(2, report_to="wandb")
    (tmp_path / "run" / "trackers.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"trackers\.json"):
        train(3, report_to="wandb", resume=True)


def test_texts_in_markdown_cannot_break_out() -> None:
    page = as_markdown([{"prompt": "```\n# no heading", "target": "a", "output": "|b|"}])
    assert "````text\n```\n# no heading\n````" in page
    assert page.count("\n```text\n") == 2


def test_no_layer_is_recomputed_while_texts_are_written(
    train: Callable[..., Any], tracked: list[Any], tiny_backbone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tiny_backbone("gpt2")
    marks: dict[str, list[bool]] = {"texts": [], "step": []}

    def is_marked() -> bool:
        return any(module.training for module in own.model.modules())

    def write(*arguments: Any, **options: Any) -> Any:
        marks["texts"].append(is_marked())
        return generate_ids(*arguments, **options)

    monkeypatch.setattr("prefixtune.training.trackers.samples.generate_ids", write)
    options: dict[str, Any] = {"dev_examples": DEV, "eval_every": 1, "report_to": "wandb", "backbone": own}
    train(
        2,
        gradient_checkpointing=True,
        on_event=lambda event: marks["step"].append(is_marked()) if event["event"] == "step" else None,
        **options,
    )
    assert marks == {"texts": [False, False], "step": [True, True]}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"method": "infix"},
        {"method": "lora"},
        {"prefix_dropout": 0.5},
        {"nested": True},
    ],
    ids=str,
)
def test_the_texts_are_those_of_the_whole_prefix(
    train: Callable[..., Any], tracked: list[Any], tiny_backbone: Callable[..., Any], options: dict[str, Any]
) -> None:
    own = tiny_backbone("llama")
    result = train(2, dev_examples=DEV, report_to="wandb", learning_rate=0.3, backbone=own, **options)
    examples = next(event["examples"] for event in result.events if event["event"] == "examples")
    sources = [example.source for example in DEV]
    # Another method has no prefix that would say how a text was written in training.
    text_format = TextFormat() if result.prefix is None else None
    expected = pt.generate(own, sources, result.prefix, max_new_tokens=48, text_format=text_format)
    assert [example["output"] for example in examples] == expected
