"""Which chat template writes the data of a run, and that its prefix says so."""

import pytest

from chat_templates import TEMPLATE
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import DataError, PrefixError
from prefixtune.inference.generate import generate
from prefixtune.prefix.text_format import read_text_format
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import training_format
from prefixtune.training.train import train

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {name}?"},
            {"role": "assistant", "content": "A pub."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "By the river."},
        ]
    }
    for name in ("Aromi", "Bibimbap", "Cotto", "The Dumpling Tree")
]


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    return path


def test_the_models_own_template_is_for_data_with_messages(default_backbone, tiny_backbone):
    assert training_format(TrainConfig(), default_backbone, has_messages=True).chat_template == "model"
    assert training_format(TrainConfig(), default_backbone).chat_template == ""
    assert training_format(TrainConfig(), default_backbone, has_messages=True, for_labels=True).chat_template == ""
    assert training_format(TrainConfig(chat_template="none"), default_backbone, has_messages=True).chat_template == ""
    assert training_format(TrainConfig(chat_template="model"), default_backbone).chat_template == "model"
    assert training_format(TrainConfig(), tiny_backbone("llama"), has_messages=True).chat_template == ""
    form = training_format(TrainConfig(system="Be short.", max_length=99), default_backbone, has_messages=True)
    assert (form.chat_template, form.end, form.system, form.max_length) == ("model", "<|im_end|>", "Be short.", 99)
    assert len(form.template_hash) == 16


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"chat_template": "model"}, "llama", "no chat template"),
        ({"chat_template": "FILE"}, "t5", "chat_template is"),
        ({"system": "Be short."}, "llama", "no chat template"),
    ],
)
def test_templates_that_a_backbone_cannot_have(tiny_backbone, template, options, kind, says):
    options = {name: str(template) if value == "FILE" else value for name, value in options.items()}
    with pytest.raises(PrefixError, match=says):
        training_format(TrainConfig(**options), tiny_backbone(kind), has_messages=True)


def test_files_that_hold_no_template(tiny_backbone, tmp_path):
    backbone, path = tiny_backbone("llama"), tmp_path / "bad.jinja"
    for content in (b"", b"x" * 20000, b"\xff\xfe\xff"):
        path.write_bytes(content)
        with pytest.raises(PrefixError, match=r"template|bad"):
            training_format(TrainConfig(chat_template=str(path)), backbone)
    with pytest.raises(DataError, match=r"none\.jinja"):
        training_format(TrainConfig(chat_template=str(tmp_path / "none.jinja")), backbone)


@pytest.mark.parametrize("start", [{}, {"init_examples": 2}])
def test_a_run_on_conversations(tiny_backbone, tmp_path, template, start):
    backbone = tiny_backbone("llama", max_position_embeddings=512)
    result = train(
        backbone=backbone,
        examples=CHATS,
        chat_template=str(template),
        max_steps=2,
        batch_size=3,
        # Their last messages are equal, but not those before them.
        hold_out=0.25 if not start else 0.0,
        output=str(tmp_path / "run"),
        **(start or {"prefix_length": 3}),
    )
    event = result.events[0]
    count = 4 if start else 3
    assert (event["num_sources"], event["num_targets"], event["num_cut"]) == (count, 2 * count, 0)
    # Conversations are whole in their batches of at most three turns.
    prefix = load_prefix(result.path, backbone)
    form = read_text_format(prefix.header)
    assert form is not None
    assert (form.chat_template, form.end) == (TEMPLATE, "<pad>")
    assert form.longest_target == len("By the river.") + 1
    chat = CHATS[0]["messages"][:3]
    assert len(generate(backbone, ["Hi", chat], prefix, max_new_tokens=3)) == 2


def test_conversations_without_a_template(tiny_backbone, tmp_path):
    with pytest.raises(DataError, match=r"example 1 .* has several turns, which needs a chat template"):
        train(backbone=tiny_backbone("llama"), examples=CHATS, prefix_length=3, output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
