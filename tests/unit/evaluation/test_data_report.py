"""What a run would read of a file, against what training makes of it."""

import json

import pytest

import prefixtune as pt
from prefixtune.backbone.load import load_tokenizer, without_limits
from prefixtune.data.encoding import default_format, encode_examples
from prefixtune.data.registry import read_task
from prefixtune.errors import BackboneError, DataError
from prefixtune.evaluation.data_report import report_data

ROWS = [("a", "x"), ("bb", "yyyy"), ("cccc" * 9, "z"), ("bb", "other"), ("a", "x"), ("d", "w" * 60)]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture
def model(tmp_path, tiny_models, tiny_tokenizer):
    """A folder with a configuration and a tokenizer, and no weights at all."""

    def write(family):
        folder = tmp_path / family
        tiny_models(family).config.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return str(folder)

    return write


@pytest.fixture
def look(tmp_path, model):
    """`look(rows, family="llama", **options)`: the report on these rows."""

    def run(rows, family="llama", test="", **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = pt.TrainConfig(train=str(path), backbone=model(family), **{"prefix_length": 3, **options})
        return report_data(config, test=test)

    return run


def rows_of(pairs):
    return [{"source": source, "target": target} for source, target in pairs]


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_limits_are_those_of_training(look, tiny_backbone, family):
    backbone = tiny_backbone(family)
    examples = [pt.Example("a", ("x",)), pt.Example("bb", ("yyyy", "other")), pt.Example("cccc" * 9, ("z",))]
    pairs = [(example.source, target) for example in examples for target in example.targets]
    tried = (4, 15, 30, 59)
    for length in tried:
        report = look(rows_of(pairs), family, max_length=length)
        cut = refused = 0
        for example in examples:
            try:
                made = encode_examples(
                    backbone, [example], default_format(backbone), prefix_length=3, max_length=length
                )
                cut += made.num_truncated
            except DataError:
                refused += 1
        assert (report.cut, report.refused) == (cut, refused), length


def test_lengths_and_positions(look, tiny_backbone):
    report = look(rows_of(ROWS), batch_size=100)
    backbone = tiny_backbone("llama")
    merged = [pt.Example("a", ("x", "x")), pt.Example("bb", ("yyyy", "other"))]
    merged += [pt.Example(source, (target,)) for source, target in (ROWS[2], ROWS[5])]
    made = encode_examples(backbone, merged, default_format(backbone), prefix_length=0, max_length=1000)
    by_name = {lengths.what: lengths for lengths in report.lengths}
    assert by_name["source"].longest == max(len(example.prompt) for example in made.examples)
    assert by_name["target"].longest == made.longest_target
    assert by_name["together"].longest == max(len(e.prompt) + max(map(len, e.targets)) for e in made.examples)
    assert report.steps == 1
    assert (report.rows, report.examples, report.equal_rows, report.equal_sources) == (6, 4, 1, 1)
    assert [is_label for _, is_label in report.example] == [False, True]
    assert report.example[1][0] == " x </s>"


def test_the_loss_of_a_conversation_is_on_its_answers(look, tmp_path):
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    turns = [("user", "Hi"), ("assistant", "Yes?"), ("user", "Go"), ("assistant", "Gone.")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}] * 2
    report = look(rows, chat_template=str(tmp_path / "chat.jinja"))
    assert report.chat_template
    assert "".join(f"[{text}]" if is_label else text for text, is_label in report.example) == (
        "<s>user:Hi</s><s>assistant:[Yes?</s>]<s>user:Go</s><s>assistant:[Gone.</s>]"
    )
    assert next(item for item in report.lengths if item.what == "target").longest == len("Gone.") + 1
    assert report.equal_rows == 1


@pytest.mark.parametrize(
    ("task", "row", "count"),
    [
        # Each row of a named task is an example of its own, as in published figures; but E2E merges its own rows.
        ("records", {"document": "It rained.", "summary": "Rain."}, 3),
        ("e2e", {"mr": "name[A]", "references": ["Rain."]}, 1),
    ],
)
def test_equal_sources_are_merged_where_training_merges_them(look, tmp_path, task, row, count):
    report = look([row] * 3, task=task)
    trained = read_task(task, tmp_path / "rows.jsonl")
    assert report.examples == len(trained) == count
    assert report.steps == 1


def test_of_many_examples_some_are_tokenized(look, monkeypatch):
    monkeypatch.setattr("prefixtune.evaluation.data_report.MAX_TOKENIZED", 7)
    rows = rows_of([(f"s{n}", "t") for n in range(50)])
    report = look(rows)
    assert (report.rows, report.examples, report.tokenized) == (50, 50, 7)
    with pytest.raises(DataError, match="line 51"):
        look([*rows, {"bad": 1}])


def test_overlap_with_a_test_file(look, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text('{"source": " a ", "target": "q"}\n{"source": "new", "target": "q"}\n', encoding="utf-8")
    report = look(rows_of(ROWS), test=str(test))
    assert (report.overlap.count, report.overlap.num_examples) == (1, 2)


def test_without_weights(model, tiny_backbone, tmp_path):
    for family, kind in (("llama", "decoder"), ("t5", "encoder-decoder"), ("bert", "encoder")):
        backbone, loaded = load_tokenizer(model(family)), tiny_backbone(family)
        assert (backbone.kind, backbone.max_positions) == (kind, loaded.max_positions)
    assert without_limits(load_tokenizer(model("llama"))).max_positions is None
    with pytest.raises(BackboneError, match="nothing"):
        load_tokenizer(str(tmp_path / "nothing"))
