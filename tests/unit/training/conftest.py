"""A small training run, to stop, damage and resume."""

import pytest

import prefixtune as pt


class _Stopped(Exception):
    pass


@pytest.fixture
def backbone(tiny_backbone):
    return tiny_backbone("llama")


@pytest.fixture
def examples():
    return [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.",)) for letter in "abcd"]


@pytest.fixture
def train(backbone, examples, tmp_path):
    """`train(steps, resume=False, **arguments)`: a run in the folder `run`; fields of `TrainConfig` change it."""
    usual = examples

    def run(steps=3, *, resume=False, examples=usual, **more):
        config = pt.TrainConfig(
            prefix_length=2, init_text="ab", max_steps=steps, save_every=1, batch_size=4, output=str(tmp_path / "run")
        )
        fields = {
            name: more.pop(name) for name in list(more) if name in pt.TrainConfig.model_fields and name != "backbone"
        }
        arguments = {"backbone": backbone, "examples": examples, "resume": resume, **more}
        return pt.train(config.replace(**fields), **arguments)

    return run


@pytest.fixture
def train_until(train):
    """`train_until(step, ...)`: the run of `train(...)`, ended right after it has saved its state at that step."""

    def run(step, *arguments, **fields):
        def on_event(event):
            if event["event"] == "save" and event["step"] == step:
                raise _Stopped

        with pytest.raises(_Stopped):
            train(*arguments, on_event=on_event, **fields)

    return run


@pytest.fixture
def no_backbone_loads(monkeypatch):
    def load(*_, **__):
        raise AssertionError("the backbone is loaded")

    monkeypatch.setattr("prefixtune.training.prepare.load_backbone", load)
