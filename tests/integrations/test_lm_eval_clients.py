"""lm-eval's own clients of OpenAI's interface, against a real server: the answers of the class within this process."""

import os

os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

from live_server import MODEL, POSITIONS, fill_folder, serve
from lm_eval_tasks import evaluate, make_tasks
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.interop.lm_eval.model import PrefixLM

# Raised within lm-eval and what it imports.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    make_tasks(folder / "tasks", count=6)
    return folder


@pytest.fixture(scope="module")
def backbone(folder):
    form = {"prompt": "Q {source} =", "target": " {target}"}
    return fill_folder(folder, {"facts": {}, "formatted": {"text_format": form}})


@pytest.fixture(scope="module")
def server(folder, backbone):
    server = serve(folder, "--raw-completions")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def measure(folder):
    """A function: a model's answers by task and document."""
    return lambda model, *tasks, **options: evaluate(model, folder / "tasks", tasks, **options)["answers"]


@pytest.mark.parametrize(("name", "tokenized"), [("facts", True), ("formatted", False)])
def test_local_completions_gives_the_answers_of_the_class(folder, backbone, server, measure, name, tokenized):
    prefix = load_prefix(folder / "prefixes" / f"{name}.safetensors", backbone)
    arguments = {
        "base_url": f"{server.url}/v1/completions",
        "model": name,
        "tokenizer": str(folder / MODEL),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": tokenized,
        "max_length": POSITIONS - 4,
        "max_retries": 1,
    }
    tasks = ("made_choices", "made_rolling", "made_texts")
    theirs = measure("local-completions", *tasks, model_args=arguments, batch_size=4)
    ours = measure(PrefixLM(backbone, prefix), *tasks)
    assert ours["made_texts"] == theirs["made_texts"]
    assert any(row[0] for row in ours["made_texts"].values())
    for document, row in ours["made_choices"].items():
        others = theirs["made_choices"][document]
        assert [sure for _, sure in row] == [sure for _, sure in others]
        torch.testing.assert_close([one for one, _ in row], [one for one, _ in others], rtol=1e-4, atol=1e-2)
    rolling = [[row[document][0] for document in sorted(row)] for row in (ours["made_rolling"], theirs["made_rolling"])]
    torch.testing.assert_close(*rolling, rtol=1e-4, atol=1e-2)


def test_local_chat_completions_gives_the_texts_of_the_class(folder, backbone, server, measure):
    prefix = load_prefix(folder / "prefixes" / "facts.safetensors", backbone)
    arguments = {"base_url": f"{server.url}/v1/chat/completions", "model": "facts", "max_retries": 1}
    options = {"apply_chat_template": True, "num_fewshot": 1, "system_instruction": "Be brief."}
    theirs = measure("local-chat-completions", "made_texts", model_args=arguments, **options)
    ours = measure(PrefixLM(backbone, prefix), "made_texts", **options)
    # The server's answers in a chat come without the white space around them.
    stripped = {document: [text.strip() for text in row] for document, row in ours["made_texts"].items()}
    assert stripped == theirs["made_texts"]
    assert len({text for row in stripped.values() for text in row}) > 3
