"""A start from solved examples: which ones, how many, what the header says, and resuming without choosing again."""

import json

import pytest
import torch

import prefixtune as pt
from prefixtune.attention.record import prefix_from_tokens
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import CheckpointError, ConfigError, DataError
from prefixtune.training.checkpoint import load_state, save_state
from prefixtune.training.data import read_data, tokenize
from prefixtune.training.presets import preset
from prefixtune.training.starts.build import build_encoder
from prefixtune.training.starts.examples import from_examples

EXAMPLES = [pt.Example(f"n : {word}", (f"{word} it is.",)) for word in ("a", "bcd", "ef", "ghijkl", "m")]


SHORT = [pt.Example(letter, (f"{letter}.",)) for letter in "abcdef"]


def run(folder, **options):
    return pt.TrainConfig(
        **{"max_steps": 4, "save_every": 2, "batch_size": 2, "eval_every": 2, "output": str(folder), **options}
    )


def lengths(backbone, examples=EXAMPLES):
    """Tokens of each example's prompt, target and end: one per character, and the format's spaces and separator."""
    texts = [f" {e.source} {backbone.separator} {e.targets[0]} " for e in examples]
    return [len(backbone.encode(text)) + 1 for text in texts]


def test_their_number_sets_the_length(backbone, tmp_path):
    result = pt.train(run(tmp_path / "run", init_examples=2), backbone=backbone, examples=EXAMPLES)
    start = result.prefix.header["initialization"]
    each = lengths(backbone)
    assert start["kind"] == "examples"
    assert start["lengths"] == start["tokens"] == [each[index] for index in start["examples"]]
    assert len(set(start["examples"])) == 2
    assert result.prefix.prefix_length == start["prefix_length"] == sum(start["lengths"])


def test_a_length_that_none_fits_is_refused(backbone, tmp_path):
    config = run(tmp_path, initialization="examples", prefix_length=3)
    with pytest.raises(DataError, match=rf"they take {min(lengths(backbone))} to"):
        tokenize(config, backbone, EXAMPLES, ())


def test_more_examples_than_there_are_is_refused(backbone, tmp_path):
    twice = [*EXAMPLES, *EXAMPLES, pt.Example("no target")]
    with pytest.raises(ConfigError, match="init_examples"):
        pt.train(run(tmp_path / "run", init_examples=6), backbone=backbone, examples=twice)


def test_options_imply_each_other():
    assert pt.TrainConfig(init_examples=3).initialization == "examples"
    assert pt.TrainConfig(init_examples=3).prefix_length == 0
    assert pt.TrainConfig(init_examples=3, prefix_length=99).prefix_length == 99
    alone = pt.TrainConfig(initialization="examples")
    assert (alone.prefix_length, alone.init_examples) == (0, 4)
    assert pt.TrainConfig(initialization="examples", prefix_length=99).init_examples == 0
    assert pt.TrainConfig().prefix_length == 10
    assert pt.TrainConfig(initialization="examples", sites="encoder, cross").init_examples == 4
    assert pt.TrainConfig(initialization="examples", sites="decoder=99").init_examples == 0
    stored = pt.TrainConfig(init_examples=3).to_dict()
    assert pt.TrainConfig(**stored).to_dict() == stored


@pytest.mark.parametrize(
    "options",
    [
        {"init_examples": 2, "initialization": "words"},
        {"initialization": "examples", "prefix_length": 0},
        {"initialization": "examples", "prefix_length": 0, "sites": "cross"},
        {"init_examples": 4, "method": "lora"},
        {"initialization": "examples", "method": "full"},
    ],
)
def test_contradictions(options):
    with pytest.raises(ConfigError, match="init_examples"):
        pt.TrainConfig(**options)


def test_fewer_positions_than_examples_are_refused(backbone, tmp_path):
    with pytest.raises(DataError, match="init_examples is 4"):
        tokenize(run(tmp_path, init_examples=4, prefix_length=3), backbone, EXAMPLES, ())


# --- the choice ------------------------------------------------------------------------------------------------------


def test_diverse_takes_one_of_each_kind(backbone, tmp_path):
    """Of nine near twins and one other, the other is among two."""
    twins = [pt.Example(f"aaaaaaaaaaaaaaaaaa{letter}", ("x",)) for letter in "abcdefghi"]
    config = run(tmp_path, init_examples=2, seed=1)
    plan = tokenize(config, backbone, [*twins, pt.Example("9 7 5 3 1 Z", ("x",))], ()).plan
    assert 9 in {example.index for example in plan.chosen}


# --- in a run --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_bit_by_bit_and_does_not_choose_again(backbone, tmp_path, monkeypatch):
    options = {"init_examples": 2, "max_steps": 6}
    whole = pt.train(run(tmp_path / "whole", **options), backbone=backbone, examples=EXAMPLES)

    class Stopped(Exception):
        pass

    def stop(event):
        if event["event"] == "save" and event["step"] == 2:
            raise Stopped

    config = run(tmp_path / "run", **options)
    with pytest.raises(Stopped):
        pt.train(config, backbone=backbone, examples=EXAMPLES, on_event=stop)

    def fail(*_, **__):
        raise AssertionError("chosen again")

    monkeypatch.setattr("prefixtune.training.starts.examples.farthest_first", fail)
    monkeypatch.setattr("prefixtune.training.starts.examples.from_examples", fail)
    resumed = pt.train(config, backbone=backbone, examples=EXAMPLES, resume=True)
    assert resumed.prefix.equal(whole.prefix)
    assert resumed.prefix.header["initialization"] == whole.prefix.header["initialization"]


def test_a_state_that_names_other_examples_is_refused(backbone, tmp_path):
    config = run(tmp_path / "run", init_examples=2)
    pt.train(config, backbone=backbone, examples=EXAMPLES)
    path = tmp_path / "run" / "state.safetensors"
    tensors, facts = load_state(path)
    facts["initialization"]["examples"] = [0, 77]
    save_state(path, tensors, {name: value for name, value in facts.items() if name != "sha256"})
    with pytest.raises(CheckpointError, match="not in this data"):
        pt.train(config, backbone=backbone, examples=EXAMPLES, resume=True)


def test_an_example_and_others_of_its_source_do_not_see_its_block(backbone, tmp_path):
    examples = [pt.Example("n : a", ("a it is.",)), *EXAMPLES[1:3], pt.Example("n : a", ("yes, a.",))]
    data = tokenize(run(tmp_path, init_examples=3), backbone, examples, EXAMPLES[:1])
    blocks = data.plan.blocks
    assert set(blocks) == {0, 1, 2}
    for index in (0, 1, 2):
        assert data.train.examples[index].hidden == tuple(range(*blocks[index]))
    assert data.train.examples[3].hidden == data.train.examples[0].hidden
    # Development examples see everything.
    assert data.dev.examples[0].hidden == ()


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_compacted_examples_keep_keys_of_where_they_stand(name, tiny_backbone):
    backbone = tiny_backbone(name)
    rows = [tuple(range(4, 24)), tuple(range(30, 42))]
    prefix = from_examples(backbone, rows, lengths=[15, 8])
    # The second ends with its 8 positions, at 23.
    ids = torch.tensor([rows[1]])
    own = prefix_from_tokens(backbone.model, backbone.layout, ids, first_position=23 - len(rows[1]))
    for (key, _), (own_key, _) in zip(prefix.layers["decoder"], own.layers["decoder"], strict=True):
        distances = (key[:, 15:, None] - own_key[:, None]).abs().amax(-1)
        assert float(distances.amin(-1).max()) < 1e-4


def test_compacted_examples_end_where_positions_do(tiny_backbone, tmp_path):
    """In a model whose positions are a table, no example is computed past its end."""
    backbone = tiny_backbone("gpt2")
    examples = [pt.Example(f"s{n} " + "q" * 70, ("t" * 8,)) for n in range(6)]
    config = run(tmp_path, init_examples=4, prefix_length=120)
    plan = tokenize(config, backbone, [*examples, pt.Example("a", ("b",))], ()).plan
    encoder, _ = build_encoder(config, backbone, plan=plan)
    assert encoder.bake().prefix_length == 120
    assert encoder.bake().is_finite()


def test_a_source_that_is_cut_does_not_see_its_block_either(tiny_backbone, tmp_path):
    """The prefix takes positions, so that a long source is cut in training, though it is whole in the prefix."""
    backbone = tiny_backbone("llama")
    examples = [pt.Example("w " + "q" * 100, (text,)) for text in ("one.", "two.")] + [pt.Example("a b", ("c.",))]
    data = tokenize(run(tmp_path, init_examples=2), backbone, examples, ())
    long = next(example for example in data.plan.chosen if example.index == 0)
    assert len(data.train.examples[1].prompt) < len(long.prompt)
    assert data.train.examples[1].hidden == data.train.examples[0].hidden == tuple(range(*data.plan.blocks[0]))


@pytest.mark.parametrize("count", [1, 0])
def test_a_prefix_that_no_example_sees_is_refused(count, backbone, tmp_path):
    options = {"init_examples": 1} if count else {"initialization": "examples", "prefix_length": 90}
    twice = [pt.Example("n : a", ("a it is.",)), pt.Example("n : a", ("yes, a.",))]
    with pytest.raises(ConfigError, match="init_examples"):
        pt.train(run(tmp_path / "run", **options), backbone=backbone, examples=twice)


def test_an_encoder_decoders_sites(tiny_backbone, tmp_path):
    backbone = tiny_backbone("bart")
    plan = tokenize(run(tmp_path, init_examples=2, sites="encoder,cross"), backbone, EXAMPLES, ()).plan
    assert set(plan.site_lengths) == {"encoder", "cross"}
    assert len(set(plan.site_lengths.values())) == 1
    own = tokenize(run(tmp_path, init_examples=2, sites="cross,decoder=3"), backbone, EXAMPLES, ()).plan
    assert own.site_lengths["decoder"] == 3
    with pytest.raises(ConfigError, match="sites is 'decoder'"):
        tokenize(run(tmp_path, init_examples=2, sites="decoder"), backbone, EXAMPLES, ())


def test_an_encoder_reads_each_alone_so_that_all_may_be_longer_than_it_reads(tiny_backbone, tmp_path):
    backbone = tiny_backbone("bart", max_position_embeddings=20)
    assert backbone.max_positions == 20
    options = {"init_examples": 6, "sites": "encoder,cross"}
    assert tokenize(run(tmp_path, **options), backbone, SHORT, ()).plan.site_lengths["cross"] > 20


def test_labels_by_words_are_solved_examples_and_a_head_has_none(tiny_backbone, tmp_path):
    backbone = tiny_backbone("llama")
    examples = [pt.Example(f"text {n}", (("good", "bad")[n % 2],)) for n in range(6)]
    words = run(tmp_path, init_examples=2, task="classification")
    data = tokenize(words, backbone, examples, ())
    example = data.plan.chosen[0]
    assert example.row == (*data.train.examples[example.index].prompt, *data.train.examples[example.index].targets[0])
    with pytest.raises(ConfigError, match="a head learns labels"):
        pt.train(words.replace(classifier="head", output=str(tmp_path / "run")), backbone=backbone, examples=examples)


# --- held out --------------------------------------------------------------------------------------------------------


def test_held_out_sources_are_the_development_examples(backbone, tmp_path, capsys):
    examples = [pt.Example(f"n : {n}", (f"{n} it is.",)) for n in range(20)]
    config = run(tmp_path / "run", hold_out=0.1, dev_limit=2, patience=3)
    events = []
    pt.train(config, backbone=backbone, examples=examples, on_event=events.append)
    assert "2 sources are held out of training" in capsys.readouterr().err
    assert (events[0]["num_sources"], events[0]["num_dev_targets"]) == (18, 2)
    assert any("loss" in event for event in events if event["event"] == "evaluation")
    header = load_prefix(tmp_path / "run" / "prefix.safetensors").header
    assert json.dumps(header["training"]["dev_loss"]) != "null"


def test_no_label_is_held_out_whole():
    examples = [pt.Example(f"n : {n}", ("rare" if n == 3 else "ab"[n % 2],)) for n in range(11)]
    for seed in range(12):
        config = pt.TrainConfig(task="classification", hold_out=0.3, seed=seed)
        train, dev = ({one.targets for one in part} for part in read_data(config, examples, None)[1:])
        assert set() < dev <= train


def test_the_only_source_cannot_be_held_out(tmp_path, no_backbone_loads):
    with pytest.raises(DataError, match=r"hold_out is 0.1, but there is only one training source"):
        pt.train(run(tmp_path / "run", hold_out=0.1), examples=EXAMPLES[:1])


@pytest.mark.parametrize(("task", "length"), [("records", 2), ("summarization", 20)])
def test_quick_trains_on_a_few_examples_short_or_long(task, length, tiny_backbone, tmp_path):
    """Rows that are shorter or longer than the prefix: a share of each example's positions is kept."""
    values = {**preset("quick", task), "max_steps": 2, "task": task, "output": str(tmp_path / "run")}
    examples = [pt.Example(f"{n} : " + "ab " * length, ("cd " * length,)) for n in range(8)]
    result = pt.train(pt.TrainConfig(**values), backbone=tiny_backbone("llama"), examples=examples)
    assert 0 < result.prefix.prefix_length <= 64
    assert result.events[0]["num_dev_targets"] == 1
    assert result.prefix.header["initialization"]["kind"] == "examples"
