"""`prefixtune chat`: its answers are those of `generate`, and whatever is typed, the conversation goes on."""

import json
from dataclasses import asdict

import pytest

from command_line import run
from live_server import make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.cli.conversation import Conversation
from prefixtune.data.chat import chat_format
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids
from prefixtune.prefix.text_format import TextFormat

SHORT = ("--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu")
CONFIG = GenerateConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def backbone(model):
    return load_backbone(model, device="cpu")


@pytest.fixture(scope="module")
def prefixes(backbone, tmp_path_factory):
    """`whole` reads conversations; `single` was trained on single texts."""
    folder = tmp_path_factory.mktemp("prefixes")
    text_format = asdict(TextFormat(prompt="Say {source}:", target=" {target}"))
    return {
        "whole": make_prefix(backbone, folder / "whole.safetensors", 1),
        "single": make_prefix(
            backbone, folder / "single" / "prefix.safetensors", 2, text_format=text_format, task="e2e"
        ),
    }


@pytest.fixture
def answer_to(backbone):
    """The answer to messages of the user and the assistant in turn."""

    def answer(*messages, prefix=None):
        rendered = "".join(f"[{('user', 'assistant')[i % 2]}]{text}</s>" for i, text in enumerate(messages))
        ids = backbone.tokenizer(f"{rendered}[assistant]")["input_ids"]
        (answered,) = generate_ids(backbone, [ids], [prefix], config=CONFIG)
        return str(backbone.decode(answered))

    return answer


def chat(*arguments, lines, code=0):
    """The objects and the messages of a conversation."""
    out, err = run("chat", *map(str, arguments), *SHORT, "--json", stdin=lines, code=code)
    return [json.loads(line) for line in out.splitlines()], err


def test_the_model_reads_the_whole_conversation(model, answer_to):
    (first, second, again), _ = chat("--backbone", model, lines="Hello\nWho are you?\n/reset\nHello\n/exit\nmore\n")
    assert first == {"text": "Hello", "output": answer_to("Hello"), "prefix": None, "stopped": False, "room": None}
    assert second["output"] == answer_to("Hello", first["output"].strip(), "Who are you?")
    assert again == first


def test_prefixes_are_switched(model, backbone, prefixes, answer_to):
    whole, single = (load_prefix(prefixes[name], backbone) for name in ("whole", "single"))
    files = ("--prefix", prefixes["whole"], "--prefix", prefixes["single"])
    rows, _ = chat("--backbone", model, *files, lines="a\n/prefix single\nb\n/prefix none\nc\n")
    assert [row["prefix"] for row in rows] == ["whole", "single", None]
    messages = [row for one in rows for row in (one["text"], one["output"].strip())]
    assert rows[0]["output"] == answer_to("a", prefix=whole)
    assert rows[2]["output"] == answer_to(*messages[:-1])
    (alone,) = generate(backbone, ["b"], single, config=CONFIG.replace(min_new_tokens=5))
    assert rows[1]["output"].strip() == alone
    err = run("chat", "--backbone", str(model), *map(str, files), *SHORT, stdin="/prefix single\n/prefix\n")[1]
    assert err.endswith("  whole\n* single\n  none\n")


def test_a_prefix_of_conversations_reads_all_messages(model, backbone, answer_to, tmp_path):
    file = make_prefix(backbone, tmp_path / "talks.safetensors", 4, text_format=asdict(chat_format(backbone, "model")))
    prefix = load_prefix(file, backbone)
    (first, second), err = chat("--backbone", model, "--prefix", file, lines="Hello\nWho are you?\n")
    assert first["output"] == answer_to("Hello", prefix=prefix)
    messages = ["Hello", first["output"].strip(), "Who are you?"]
    assert second["output"] == answer_to(*messages, prefix=prefix)
    assert "last message only" not in err
    rows = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(messages)]
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": rows}))
    out, _ = run("generate", "--backbone", str(model), "--prefix", str(file), "--data", str(data), "--json", *SHORT)
    assert (json.loads(out)["messages"], json.loads(out)["output"]) == (rows, second["output"].strip())


def test_mistakes_keep_the_conversation(model, answer_to):
    lines = f"/rest\n/prefix x\n/save\n{'long ' * 300}\n  \na\udcff\na\n"
    rows, _ = chat("--backbone", model, lines=lines)
    assert ["error" in row for row in rows] == [True] * 5 + [False]
    assert rows[-1]["output"] == answer_to("a")


def test_an_answer_gets_the_room_that_is_left(model, backbone):
    long = "x" * (backbone.max_positions - 60)
    out, _ = run("chat", "--backbone", str(model), *SHORT[2:], "--json", "--max-new-tokens", "500", stdin=long)
    assert 6 < json.loads(out)["room"] < 60
    # The next message has no room, and a way out.
    (first, second, third), _ = chat("--backbone", model, lines=f"{long}\n{long}\n/reset\n{long}\n")
    assert "/reset" in second["hint"]
    assert third == first


def test_messages_are_saved(model, tmp_path):
    file = tmp_path / "new" / "chat.jsonl"
    (row, wrong), _ = chat("--backbone", model, lines=f"Grüße\n/save {file}\n/save {tmp_path}\n")
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] == [
        {"role": "user", "content": "Grüße"},
        {"role": "assistant", "content": row["output"].strip()},
    ]
    assert str(tmp_path) in wrong["error"]
    assert [path.name for path in file.parent.iterdir()] == ["chat.jsonl"]


def test_an_answer_can_be_stopped(backbone):
    conversation = Conversation(backbone, {}, lambda _: CONFIG.replace(max_new_tokens=40))
    pieces = []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    answer = conversation.ask("Hello", stop)
    assert answer.stopped
    assert answer.text == "".join(pieces)
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text.strip()}
    assert not conversation.ask("Go on", len).stopped
    assert len(conversation.messages) == 4
