"""Others beside a prefix that trains: which files, what is refused, and resuming to the same numbers."""

from pathlib import Path

import pytest

import prefixtune as pt
from prefixtune.errors import BackboneError, CheckpointError, ConfigError
from prefixtune.training.beside import find_files
from prefixtune.training.loop import TrainLoop
from prefixtune.training.prepare import prepare
from prefixtune.training.train import train_together


class Stopped(Exception):
    pass


@pytest.fixture
def others(train, tmp_path):
    """A folder of two runs."""
    for name in ("one", "two"):
        train(2, output=str(tmp_path / "others" / name), seed=len(name), prefix_length=len(name))
    return tmp_path / "others"


def losses(result):
    return [event["loss"] for event in result.events if event["event"] == "step"]


def stop_at(step):
    def on_event(event):
        if event["event"] == "save" and event["step"] == step:
            raise Stopped

    return on_event


def test_a_run_beside_others_is_resumed_exactly(train, others, tmp_path):
    options = {"beside": str(others), "prefix_length": 4, "prefix_dropout": 0.3}
    whole = train(6, **options, output=str(tmp_path / "whole"))
    alone = train(6, prefix_length=4, prefix_dropout=0.3, output=str(tmp_path / "alone"))
    changed = [a != b for a, b in zip(losses(whole), losses(alone), strict=True)]
    assert any(changed)
    assert whole.prefix.prefix_length == 4
    beside = {"alone": 0.4, "all": 0.7, "most": 20, "positions": "shared"}
    assert whole.prefix.header["training"]["beside"] == beside
    assert whole.events[0]["beside"] == {**beside, "others": 2}

    with pytest.raises(Stopped):
        train(6, **options, output=str(tmp_path / "again"), on_event=stop_at(3))
    resumed = train(6, **options, output=str(tmp_path / "again"), resume=True)
    assert losses(resumed) == losses(whole)
    assert resumed.prefix.equal(whole.prefix)


def test_other_files_beside_it_are_refused_when_it_is_resumed(train, others, tmp_path):
    options = {"beside": str(others), "output": str(tmp_path / "run2")}
    with pytest.raises(Stopped):
        train(6, **options, on_event=stop_at(3))
    train(2, output=str(others / "three"), prefix_length=1)
    with pytest.raises(ConfigError, match="prefixes beside it"):
        train(6, **options, resume=True)


def test_a_run_in_the_folder_does_not_stand_beside_itself(others):
    names = [Path(path).parent.name for path in find_files(str(others), str(others / "one"))]
    assert names == ["two"]
    assert find_files(str(others / "two"), "x") == [str(others / "two")]
    (others / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no prefix in the folder .*empty"):
        find_files(str(others / "empty"), "x")


def test_prefixes_of_another_backbone_are_refused_by_name(train, others, tiny_backbone, tmp_path):
    other = tiny_backbone("llama", seed=1)
    train(2, output=str(others / "stranger"), backbone=other)
    with pytest.raises(BackboneError, match="stranger"):
        train(2, output=str(tmp_path / "new"), beside=str(others))
    assert not (tmp_path / "new" / "state.safetensors").exists()
    # All of one other backbone: only the loaded model shows it.
    with pytest.raises(BackboneError, match=r"stranger.* was trained for .* with other weights"):
        train(2, output=str(tmp_path / "new"), beside=str(others / "stranger"))
    # PEFT stores no fingerprint of its base model: shapes are compared.
    made = pt.load_prefix(others / "stranger" / "prefix.safetensors")
    imported = pt.Prefix(made.layers, {"backbone": {"name": "gpt2", "kind": "decoder"}})
    pt.save_prefix(tmp_path / "imported.safetensors", imported)
    train(2, output=str(tmp_path / "near"), beside=str(tmp_path / "imported.safetensors"))
    narrow = {"decoder": tuple((key[..., :4], value[..., :4]) for key, value in made.layers["decoder"])}
    pt.save_prefix(tmp_path / "imported.safetensors", pt.Prefix(narrow, imported.header))
    with pytest.raises(BackboneError):
        train(2, output=str(tmp_path / "new"), beside=str(tmp_path / "imported.safetensors"))


def test_a_joined_length_beyond_the_positions_is_refused(train, others, tmp_path):
    for name in ("long", "longer"):
        train(1, output=str(others / name), prefix_length=80)
    with pytest.raises(ConfigError, match=r"up to \d+ of those beside it .* positions, but 'tiny-llama' has"):
        train(2, output=str(tmp_path / "new"), beside=str(others))
    shorter = {"output": str(tmp_path / "new"), "beside": str(others), "beside_most": 1}
    with pytest.raises(ConfigError, match="text of"):
        train(2, **shorter, keep_general=1.0)
    with pytest.raises(ConfigError, match="keep_general"):
        train(2, output=str(tmp_path / "alone"), prefix_length=136, keep_general=1.0)


def test_questions_of_others_are_learned_with_those_in_view(backbone, examples, others, tmp_path):
    """At most a third as many as own examples; who else stands beside is drawn."""
    two = others / "two" / "prefix.safetensors"
    made = pt.load_prefix(two)
    questions = [[f"n : {letter}", f"{letter} {letter}."] for letter in "xyz"]
    pt.save_prefix(two, pt.Prefix(made.layers, {**made.header, "questions": questions}))
    config = pt.TrainConfig(beside=str(others), init_text="ab", batch_size=4, output=str(tmp_path / "own"))
    with prepare(config, backbone, examples) as run:
        *own, last = run.loop.data.train.examples
        assert len(own) == len(examples)
        assert backbone.decode(last.targets[0]).strip().removesuffix(backbone.end) in [f"{one} {one}." for one in "xyz"]
        assert last.front.company == (1,)
        seen = set()
        for step, batches in zip(range(40), run.loop.remaining_steps(), strict=False):
            seen |= {front.company for batch, _ in batches for front in batch.fronts}
            run.loop.state.step = step + 1
        drawn = {run.loop.beside.draw(config, step, 0, (1,)) for step in range(40)}
    assert drawn == {(1,), (0, 1)}
    assert {(), (1,), (0, 1)} <= seen
    with pytest.raises(CheckpointError):
        pt.save_prefix(tmp_path / "odd.safetensors", pt.Prefix(made.layers, {**made.header, "questions": [["alone"]]}))


def test_self_needs_other_runs(train, backbone):
    with pytest.raises(ConfigError, match="beside is 'self'"):
        train(2, beside="self")
    with pytest.raises(ConfigError, match="there is no other run"):
        train_together([pt.TrainConfig(beside="self")], backbone=backbone)


@pytest.fixture
def together(backbone, examples, tmp_path):
    """Three runs of unequal lengths and numbers of steps; the first trains alone, the others beside all."""

    def run(where, order=(0, 1, 2), **more):
        configs = [
            pt.TrainConfig(
                prefix_length=length,
                init_text=text,
                max_steps=steps,
                save_every=save,
                batch_size=4,
                beside="self" * (text != "ab"),
                seed=length,
                output=str(tmp_path / where / text),
            )
            for length, text, steps, save in ((2, "ab", 7, 2), (3, "cde", 4, 3), (1, "f", 9, 5))
        ]
        runs = [configs[index] for index in order]
        return train_together(runs, backbone=backbone, examples=[examples] * len(runs), **more)

    return run


@pytest.mark.parametrize(("step", "name"), [(0, "ab"), (4, "cde"), (7, "ab")])
def test_a_kill_between_the_saves_of_a_step_goes_on_from_the_last_common_one(step, name, together, monkeypatch):
    """Again after it was resumed, too; a run that has ended by then is as it ended."""
    whole = together("whole")
    save = TrainLoop.save

    def stop(loop):
        save(loop)
        if (loop.state.step, Path(loop.config.output).name) == (step, name):
            raise Stopped

    for again in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(TrainLoop, "save", stop)
            with pytest.raises(Stopped):
                together("again", resume=again)
        if step == 0:
            break
    resumed = together("again", resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert losses(other) == losses(one)
        assert other.prefix.equal(one.prefix)


def test_runs_are_not_resumed_beside_others(together):
    together("runs")
    with pytest.raises(ConfigError, match="prefixes beside it"):
        together("runs", order=(0, 1), resume=True)
