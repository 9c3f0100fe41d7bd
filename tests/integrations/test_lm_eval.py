"""lm-eval on tasks made here: without a prefix its own `hf` model's answers, with one those of plain forward passes."""

import copy
import os
from pathlib import Path

os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import processors

from lm_eval_tasks import evaluate, make_tasks
from oracles import outputs_of
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import collate
from prefixtune.data.encoding import encode_examples
from prefixtune.data.examples import Example
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.inference.generate import generate
from prefixtune.interop.lm_eval.model import PrefixLM
from prefixtune.prefix.chat_format import allow_template
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from zoo import make_tokenizer

TASKS = ("made_choices", "made_texts", "made_rolling")

# Raised within lm-eval and what it imports.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def measure(tasks_folder):
    """A function: lm-eval's results of a model, with its answers by task and document."""
    return lambda model, *tasks, **options: evaluate(model, tasks_folder, tasks or TASKS, **options)


def beginning_tokenizer():
    """A tokenizer that puts <s> before every text, as LLaMA's does."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def flat(answers):
    """The log-likelihoods of a task's documents, in order."""
    return [one[0] if isinstance(one, tuple | list) else one for _, row in sorted(answers.items()) for one in row]


def same_answers(one, other):
    for task in one["answers"]:
        if task == "made_texts":
            assert one["answers"][task] == other["answers"][task]
        else:
            torch.testing.assert_close(flat(one["answers"][task]), flat(other["answers"][task]), rtol=1e-5, atol=1e-3)
    if "made_choices" in one["answers"]:
        choices, others = ([sample["resps"] for sample in r["samples"]["made_choices"]] for r in (one, other))
        assert [[sure for ((_, sure),) in row] for row in choices] == [[sure for ((_, sure),) in row] for row in others]
    for task, scores in one["results"].items():
        for name, value in scores.items():
            if isinstance(value, float):
                assert value == pytest.approx(other["results"][task][name], rel=1e-4), (task, name)


# --- without a prefix: lm-eval's own model ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shots"), [("llama", 0), ("gpt2", 2), ("qwen3", 3), ("bart", 1)])
def test_without_a_prefix_the_answers_are_those_of_hf(tiny_models, measure, name, shots):
    """Contexts with solved examples, and texts, are longer than the model's positions, and cut as `hf` cuts them."""
    tokenizer = beginning_tokenizer() if name == "llama" else make_tokenizer()
    model = tiny_models(name)
    twin = copy.deepcopy(model)
    # An encoder-decoder's texts may be longer in `hf`, which counts the source among the new tokens.
    tasks = TASKS if name not in ("t5", "bart") else ("made_choices", "made_rolling")
    ours = PrefixLM((model, tokenizer), batch_size=7)
    assert ours.max_length == HFLM(pretrained=twin, tokenizer=tokenizer).max_length
    theirs = measure(HFLM(pretrained=twin, tokenizer=tokenizer, batch_size=4), *tasks, num_fewshot=shots)
    same_answers(measure(ours, *tasks, num_fewshot=shots), theirs)


def test_a_chat_template_is_filled_in_as_by_hf(tiny_models, measure):
    tokenizer = beginning_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    model = tiny_models("llama", max_position_embeddings=600)
    twin = copy.deepcopy(model)
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 1, "limit": 4}
    ours = measure(PrefixLM((model, tokenizer)), *TASKS[:2], **options)
    theirs = measure(HFLM(pretrained=twin, tokenizer=tokenizer), *TASKS[:2], **options)
    contexts = [[s["arguments"][0][0] for s in r["samples"]["made_choices"]] for r in (ours, theirs)]
    assert contexts[0] == contexts[1]
    assert contexts[0][0].startswith("<s>[system]Be brief.</s>[user]")
    same_answers(ours, theirs)


# --- with prefixes: plain forward passes ------------------------------------------------------------------------------


def row_of(backbone, prefix, context, tokens):
    """The log-likelihood of tokens behind a prefix and a context, from a row of its own."""
    with torch.no_grad():
        logits = outputs_of(backbone, context, tokens[:-1], prefix)[-len(tokens) :]
    return float(logits.double().log_softmax(-1)[torch.arange(len(tokens)), tokens].sum())


def test_texts_longer_than_the_positions_leave_room_for_the_prefix(tiny_backbone, random_prefix, measure):
    """Behind a prefix of 5 a model has 5 positions less: its windows are those of a smaller model without one."""
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, 5, seed=3)
    found = measure(PrefixLM(backbone, prefix), "made_rolling", "made_choices", num_fewshot=3)
    model = PrefixLM(backbone, max_length=backbone.max_positions - 5)
    cut = 0
    for sample in found["samples"]["made_rolling"]:
        ids = backbone.encode(sample["arguments"][0][0])
        rolling = get_rolling_token_windows(ids, model.prefix_token_id, model.max_length, 1)
        windows = [make_disjoint_window(window) for window in rolling]
        assert [token for _, tokens in windows for token in tokens] == ids
        wanted = sum(row_of(backbone, prefix, context, tokens) for context, tokens in windows)
        assert sample["resps"][0][0] == pytest.approx(wanted, abs=2e-3)
        cut += len(windows) > 1
    assert cut > 2
    for sample in found["samples"]["made_choices"]:
        for (context, choice), ((total, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            tokens = backbone.encode(choice)
            kept = backbone.encode(context)[-(backbone.max_positions - 5 + 1 - len(tokens)) :]
            assert total == pytest.approx(row_of(backbone, prefix, kept, tokens), abs=1e-3)


def test_in_a_prefixs_own_format_the_answers_are_the_losses_of_training(tiny_backbone, random_prefix, measure):
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    form = TextFormat("Q {source} {separator}", " A {target} .")
    prefix = Prefix(random_prefix(backbone, 4, seed=5).layers, {"text_format": form.to_dict()})
    model = PrefixLM(backbone, prefix, prompt_format="prefix")
    found = measure(model, "made_choices", "made_texts")
    for sample in found["samples"]["made_choices"]:
        for (context, choice), ((total, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            data = encode_examples(backbone, [Example(context, (choice.strip(),))], form, prefix_length=4)
            with torch.no_grad():
                losses = batch_loss(backbone, prefix, collate(backbone, list(data.examples)))
            assert total == pytest.approx(-float(losses.sum()), abs=1e-3)
    contexts = [sample["arguments"][0][0] for sample in found["samples"]["made_texts"]]
    texts = generate(backbone, contexts, prefix, max_new_tokens=12, stop=("\n", "ab"))
    assert [answer for row in found["answers"]["made_texts"].values() for answer in row] == texts


# --- what is refused, and how lm-eval finds the class -----------------------------------------------------------------


def test_lm_eval_makes_the_model_by_its_name(tiny_backbone, random_prefix, measure, tmp_path):
    import tomllib
    from importlib.metadata import EntryPoint

    from prefixtune.backbone.prefixes import make_header
    from prefixtune.prefix.prefix import save_prefix

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (name, value) = next(iter(project["entry-points"]["lm_eval.models"].items()))
    assert EntryPoint(name, value, "lm_eval.models").load() is PrefixLM is get_model("prefixtune")
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    made = random_prefix(backbone, 3)
    file = save_prefix(tmp_path / "p.safetensors", Prefix(made.layers, make_header(backbone)))
    arguments = f"backbone={tmp_path / 'model'},prefix={file},dtype=float32"
    found = measure("prefixtune", "made_choices", model_args=arguments, batch_size="auto")
    same_answers(found, measure(PrefixLM(backbone, made), "made_choices"))


def test_what_is_refused(tiny_backbone, measure):
    with pytest.raises(BackboneError):
        PrefixLM(tiny_backbone("bert"))
    with pytest.raises(ConfigError):
        PrefixLM(tiny_backbone("llama"), prompt_format="chat")
    with pytest.raises(ConfigError, match="typical_p"):
        measure(PrefixLM(tiny_backbone("llama")), "made_texts", gen_kwargs={"typical_p": 0.5})


def test_a_prefixs_own_chat_template_is_used(tiny_backbone, random_prefix):
    backbone = tiny_backbone("llama", max_position_embeddings=700)

    def trained_with(template, system=""):
        allow_template(template)
        form = TextFormat("{source}", "{target}", chat_template=template, system=system)
        return Prefix(random_prefix(backbone, 2).layers, {"text_format": form.to_dict()})

    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
    opens = template + "{% if add_generation_prompt %}assistant: {% endif %}"
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + opens
    model = PrefixLM(backbone, trained_with(opens, "Be kind."))
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    assert model.apply_chat_template(asked[:1]) == "system: Be kind.;user: Hi;assistant: "
    assert model.apply_chat_template(asked, add_generation_prompt=False).endswith("user: Hi;assistant: Well")
    assert model.chat_template(True) == opens
    refusing = PrefixLM(backbone, trained_with(strict))
    told = [{"role": "system", "content": "Be brief."}, *asked[:1]]
    assert refusing.apply_chat_template(told) == "user: Hi;assistant: "


def test_the_end_of_a_prefixs_own_chat_ends_raw_texts(tiny_backbone, random_prefix, measure):
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made = random_prefix(backbone, 4, seed=5).layers
    plain = PrefixLM(backbone, Prefix(made))
    texts = [text for (text,) in measure(plain, "made_texts")["answers"]["made_texts"].values()]
    # A letter that it writes is the end of an answer in the template.
    end = next(text[1] for text in texts if len(text) > 1)
    allow_template(template)
    form = TextFormat("{source}", "{target}", end=end, chat_template=template)
    chat = PrefixLM(backbone, Prefix(made, {"text_format": form.to_dict()}))
    ended = measure(chat, "made_texts")["answers"]["made_texts"]
    assert [text for (text,) in ended.values()] == [text.split(end)[0] for text in texts]
