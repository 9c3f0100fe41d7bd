"""lm-eval on tasks made here: without a prefix its own `hf` model's answers, with one those of plain forward passes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors

from lm_eval_tasks import make_tasks
from prefixtune.backbone.loss import batch_loss
from prefixtune.backbone.quantization import quantize
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.data.batching import collate
from prefixtune.data.encoding import encode_examples
from prefixtune.data.examples import Example
from prefixtune.errors import ConfigError, RequestError
from prefixtune.inference.generate import generate
from prefixtune.interop.lm_eval.model import PrefixLM
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.utils.console import Console
from zoo import make_tokenizer

TASKS = ("made_choices", "made_texts", "made_rolling")
QUIET = Console(quiet=True)

# Raised within lm-eval and what it imports.
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def measure(tasks_folder: Path) -> Callable[..., dict[str, Any]]:
    """A function: lm-eval's results of a model, with its answers by task and document."""

    def run(model: Any, *tasks: str, **options: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tasks_folder), include_defaults=False)
        results = simple_evaluate(
            model=model,
            tasks=list(tasks or TASKS),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            **options,
        )
        answers = {
            task: {sample["doc_id"]: [one for (one,) in sample["resps"]] for sample in samples}
            for task, samples in results["samples"].items()
        }
        return {"results": results["results"], "answers": answers, "samples": results["samples"]}

    return run


def beginning_tokenizer() -> Any:
    """A tokenizer that puts <s> before every text, as LLaMA's does."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def flat(answers: dict[int, list[Any]]) -> list[float]:
    """The log-likelihoods of a task's documents, in order."""
    return [one[0] if isinstance(one, tuple | list) else one for _, row in sorted(answers.items()) for one in row]


def same_answers(one: dict[str, Any], other: dict[str, Any]) -> None:
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


@pytest.mark.parametrize(("name", "shots"), [("llama", 0), ("gpt2", 2), ("qwen3", 3), ("t5", 0), ("bart", 1)])
def test_without_a_prefix_the_answers_are_those_of_hf(
    tiny_models: Any, measure: Callable[..., Any], name: str, shots: int
) -> None:
    """Contexts with solved examples, and texts, are longer than the model's positions, and cut as `hf` cuts them."""
    tokenizer = beginning_tokenizer() if name == "llama" else make_tokenizer()
    model = tiny_models(name)
    twin = copy.deepcopy(model)
    # An encoder-decoder's texts may be longer in `hf`, which counts the source among the new tokens.
    tasks = TASKS if name not in ("t5", "bart") else ("made_choices", "made_rolling")
    ours = PrefixLM((model, tokenizer), batch_size=7, console=QUIET)
    assert ours.max_length == HFLM(pretrained=twin, tokenizer=tokenizer).max_length
    theirs = measure(HFLM(pretrained=twin, tokenizer=tokenizer, batch_size=4), *tasks, num_fewshot=shots)
    same_answers(measure(ours, *tasks, num_fewshot=shots), theirs)


def test_a_chat_template_is_filled_in_as_by_hf(tiny_models: Any, measure: Callable[..., Any]) -> None:
    tokenizer = beginning_tokenizer()
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    model = tiny_models("llama", max_position_embeddings=600)
    twin = copy.deepcopy(model)
    options = {"apply_chat_template": True, "system_instruction": "Be brief.", "num_fewshot": 1, "limit": 4}
    ours = measure(PrefixLM((model, tokenizer), console=QUIET), *TASKS[:2], **options)
    theirs = measure(HFLM(pretrained=twin, tokenizer=tokenizer), *TASKS[:2], **options)
    contexts = [[s["arguments"][0][0] for s in r["samples"]["made_choices"]] for r in (ours, theirs)]
    assert contexts[0] == contexts[1]
    assert contexts[0][0].startswith("<s>[system]Be brief.</s>[user]")
    same_answers(ours, theirs)


def test_decoding_by_beams_and_penalties_is_transformers_own(tiny_models: Any, measure: Callable[..., Any]) -> None:
    model, tokenizer = tiny_models("llama"), make_tokenizer()
    twin = copy.deepcopy(model)
    options = {"gen_kwargs": {"num_beams": 3, "max_gen_toks": 9, "length_penalty": 0.5}, "limit": 6}
    ours = measure(PrefixLM((model, tokenizer), batch_size=4, console=QUIET), "made_texts", **options)
    theirs = measure(HFLM(pretrained=twin, tokenizer=tokenizer, batch_size=1), "made_texts", **options)
    assert ours["answers"] == theirs["answers"]


# --- with prefixes: plain forward passes ------------------------------------------------------------------------------


def row_of(model: PrefixLM, prefix: Prefix | None, context: list[int], tokens: list[int]) -> float:
    """The log-likelihood of tokens behind a prefix and a context, from a row of its own."""
    ids = torch.tensor([[*context, *tokens][:-1]])
    with torch.no_grad():
        logits = model.backbone.forward(ids, prefixes=prefix).logits[0, -len(tokens) :]
    return float(logits.double().log_softmax(-1)[torch.arange(len(tokens)), tokens].sum())


def test_with_a_prefix_the_answers_are_those_of_one_row_each(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any]
) -> None:
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    prefix = random_prefix(backbone, 5, seed=3)
    model = PrefixLM(backbone, prefix, batch_size=6, console=QUIET)
    found = measure(model)
    encode = backbone.encode
    for task, samples in found["samples"].items():
        assert len(samples) == 12, task
        for sample in samples:
            for arguments, (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
                if task == "made_choices":
                    wanted = row_of(model, prefix, encode(arguments[0]), encode(arguments[1]))
                    assert answer[0] == pytest.approx(wanted, abs=1e-3)
                elif task == "made_rolling":
                    wanted = row_of(model, prefix, [backbone.tokenizer.bos_token_id], encode(arguments[0]))
                    assert answer == pytest.approx(wanted, abs=1e-3)
                else:
                    (text,) = generate(
                        backbone,
                        [arguments[0]],
                        prefix,
                        text_format=TextFormat("{source}", "{target}"),
                        max_new_tokens=12,
                        stop=("\n", "ab"),
                    )
                    assert answer.strip() == text
    bare = measure(PrefixLM(backbone, console=QUIET))
    assert flat(bare["answers"]["made_choices"]) != pytest.approx(flat(found["answers"]["made_choices"]), abs=1)


def test_texts_longer_than_the_positions_leave_room_for_the_prefix(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any]
) -> None:
    """Behind a prefix of 5 a model has 5 positions less: its windows are those of a smaller model without one."""
    backbone = tiny_backbone("llama")
    prefix = random_prefix(backbone, 5, seed=3)
    found = measure(PrefixLM(backbone, prefix, console=QUIET), "made_rolling", "made_choices", num_fewshot=3)
    model = PrefixLM(backbone, max_length=backbone.max_positions - 5, console=QUIET)
    cut = 0
    for sample in found["samples"]["made_rolling"]:
        ids = backbone.encode(sample["arguments"][0][0])
        windows = model._windows(sample["arguments"][0][0], None)
        assert [token for window in windows for token in window.tokens] == ids
        wanted = sum(row_of(model, prefix, list(window.context), list(window.tokens)) for window in windows)
        assert sample["resps"][0][0] == pytest.approx(wanted, abs=2e-3)
        cut += len(windows) > 1
    assert cut > 2
    for sample in found["samples"]["made_choices"]:
        for (context, choice), ((total, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            tokens = backbone.encode(choice)
            kept = backbone.encode(context)[-(backbone.max_positions - 5 + 1 - len(tokens)) :]
            assert total == pytest.approx(row_of(model, prefix, kept, tokens), abs=1e-3)


def test_in_a_prefixs_own_format_the_answers_are_the_losses_of_training(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any]
) -> None:
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    form = TextFormat("Q {source} {separator}", " A {target} .")
    prefix = Prefix(random_prefix(backbone, 4, seed=5).layers, {"text_format": form.to_dict()})
    model = PrefixLM(backbone, prefix, prompt_format="prefix", console=QUIET)
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


def test_each_task_has_its_own_prefix_in_shared_batches(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("qwen3", max_position_embeddings=700)
    one, other = random_prefix(backbone, 5, seed=3), random_prefix(backbone, 2, seed=4)
    own = {"made_choices": one, "made_texts": None}
    mixed = measure(PrefixLM(backbone, other, task_prefixes=own, batch_size=5, console=QUIET))
    alone = {
        "made_choices": PrefixLM(backbone, one, batch_size=3, console=QUIET),
        "made_texts": PrefixLM(backbone, console=QUIET),
        "made_rolling": PrefixLM(backbone, other, console=QUIET),
    }
    for task, model in alone.items():
        wanted = measure(model, task)
        same_answers({key: {task: mixed[key][task]} for key in mixed}, wanted)


def test_a_name_that_is_no_task_is_refused(tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any]) -> None:
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    own = {"made": random_prefix(backbone, 5)}
    with pytest.raises(ConfigError, match=r"given for 'made', but the tasks .* were 'made_choices', 'made_texts'"):
        measure(PrefixLM(backbone, task_prefixes=own, console=QUIET), "made")
    # One for a task that is not measured this time is none of these.
    both = {"made_choices": own["made"], "made_texts": None}
    measure(PrefixLM(backbone, task_prefixes=both, console=QUIET), "made_choices")


# --- answers are kept -------------------------------------------------------------------------------------------------


def test_a_stopped_evaluation_goes_on(
    tiny_backbone: Any,
    random_prefix: Any,
    measure: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import prefixtune.interop.lm_eval.likelihood as likelihood

    backbone = tiny_backbone("llama", max_position_embeddings=700)
    prefix, file = random_prefix(backbone, 5, seed=3), tmp_path / "sub" / "responses.jsonl"
    wanted = measure(PrefixLM(backbone, prefix, console=QUIET))
    computed: list[int] = []
    score_batch = likelihood._score_batch

    def stopping(*arguments: Any) -> Any:
        computed.append(1)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return score_batch(*arguments)

    monkeypatch.setattr(likelihood, "_score_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(PrefixLM(backbone, prefix, batch_size=10, responses=file, console=QUIET))
    # A process that is killed may leave part of a line.
    with file.open("a") as handle:
        handle.write('{"key": "ab')
    stopped = len(computed)
    found = measure(PrefixLM(backbone, prefix, batch_size=10, responses=file, console=QUIET))
    same_answers(found, wanted)
    assert len(computed) - stopped == 60 // 10 - 2 + 2, "the batches of choices that were left, and those of texts"

    def computing(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(likelihood, "_score_batch", computing)
    monkeypatch.setattr("prefixtune.interop.lm_eval.model.generate_ids", computing)
    same_answers(measure(PrefixLM(backbone, prefix, responses=file, console=QUIET)), wanted)
    other = random_prefix(backbone, 5, seed=4)
    changes: list[dict[str, Any]] = [{"prefix": other}, {"prefix": None}, {"prefix": prefix, "max_length": 300}]
    for change in changes:
        with pytest.raises(AssertionError, match="computed again"):
            measure(PrefixLM(backbone, responses=file, console=QUIET, **change), "made_choices")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_answers_of_other_weights_are_computed_again(
    tiny_backbone: Any, measure: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    file, backbone = tmp_path / "responses.jsonl", tiny_backbone("llama", max_position_embeddings=700)
    whole = measure(PrefixLM(backbone, responses=file, console=QUIET), "made_choices")
    with quiet_transformers():
        quantize(backbone.model, kind)
    rounded = measure(PrefixLM(backbone, responses=file, console=QUIET), "made_choices")
    same_answers(rounded, measure(PrefixLM(backbone, console=QUIET), "made_choices"))
    assert rounded["answers"] != whole["answers"]


def test_a_file_of_something_else_is_no_file_of_answers(tiny_backbone: Any, tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    file.write_text('{"key": "k", "answer": 0.5}\n{"source": "x"}\n')
    with pytest.raises(Exception, match=r"line 2 of .* is no answer to a request of lm-eval"):
        PrefixLM(tiny_backbone("llama"), responses=file)


def test_lm_evals_own_cache_serves_one_prefix_and_is_refused_for_several(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    prefix = random_prefix(backbone, 3)
    cache = str(tmp_path / "cache")
    first = measure(PrefixLM(backbone, prefix, console=QUIET), use_cache=cache)
    monkeypatch.setattr("prefixtune.interop.lm_eval.model.score_continuations", None)
    monkeypatch.setattr("prefixtune.interop.lm_eval.model.generate_ids", None)
    same_answers(measure(PrefixLM(backbone, prefix, console=QUIET), use_cache=cache), first)
    several = PrefixLM(backbone, prefix, task_prefixes={"made_texts": None}, console=QUIET)
    with pytest.raises(ConfigError, match="does not tell prefixes apart"):
        measure(several, use_cache=cache)


# --- what is refused, and how lm-eval finds the class -----------------------------------------------------------------


def test_lm_eval_makes_the_model_by_its_name(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any], tmp_path: Path
) -> None:
    import tomllib
    from importlib.metadata import EntryPoint

    from prefixtune.backbone.prefixes import make_header
    from prefixtune.prefix.artifact import save_prefix

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
    same_answers(found, measure(PrefixLM(backbone, made, console=QUIET), "made_choices"))


def test_what_a_task_asks_for_in_vain(tiny_backbone: Any, measure: Callable[..., Any]) -> None:
    model = PrefixLM(tiny_backbone("llama"), console=QUIET)
    with pytest.raises(RequestError, match=r"'made_texts' asks for 500 new tokens, but there are 160 positions"):
        measure(model, "made_texts", gen_kwargs={"max_gen_toks": 500})
    with pytest.raises(RequestError, match=r"decodes with 'typical_p', which is not known here"):
        measure(model, "made_texts", gen_kwargs={"typical_p": 0.5})


def test_an_encoder_and_wrong_options_are_refused(tiny_backbone: Any) -> None:
    with pytest.raises(Exception, match="is an encoder, which reads text and writes none"):
        PrefixLM(tiny_backbone("bert"))
    with pytest.raises(ConfigError, match="prompt_format is 'chat', but must be 'raw' or 'prefix'"):
        PrefixLM(tiny_backbone("llama"), prompt_format="chat")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        PrefixLM(tiny_backbone("llama"), batch_size=0)


def test_a_prefixs_own_chat_template_is_used_and_several_are_refused(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any]
) -> None:
    backbone = tiny_backbone("llama", max_position_embeddings=700)

    def trained_with(template: str, system: str = "") -> Prefix:
        form = TextFormat("{source}", "{target}", chat_template=template, system=system)
        return Prefix(random_prefix(backbone, 2).layers, {"text_format": form.to_dict()})

    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
    opens = template + "{% if add_generation_prompt %}assistant: {% endif %}"
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + opens
    model = PrefixLM(backbone, trained_with(opens, "Be kind."), console=QUIET)
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    assert model.apply_chat_template(asked[:1]) == "system: Be kind.;user: Hi;assistant: "
    assert model.apply_chat_template(asked, add_generation_prompt=False).endswith("user: Hi;assistant: Well")
    assert model.chat_template(True) == opens
    refusing = PrefixLM(backbone, trained_with(strict), console=QUIET)
    told = [{"role": "system", "content": "Be brief."}, *asked[:1]]
    assert refusing.apply_chat_template(told) == "user: Hi;assistant: "
    several = PrefixLM(backbone, trained_with(opens), task_prefixes={"made_texts": trained_with(strict)}, console=QUIET)
    measure(several, "made_texts", limit=1)
    with pytest.raises(ConfigError, match="2 different chat templates"):
        measure(several, "made_texts", limit=1, apply_chat_template=True)


def test_in_the_format_of_a_chat_prefix_a_context_is_a_users_message(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any]
) -> None:
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    form = TextFormat("{source}", "{target}", end="</s>", chat_template=template)
    prefix = Prefix(random_prefix(backbone, 4, seed=5).layers, {"text_format": form.to_dict()})
    model = PrefixLM(backbone, prefix, prompt_format="prefix", console=QUIET)
    for sample in measure(model, "made_choices")["samples"]["made_choices"]:
        for (context, choice), ((total, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            prompt = backbone.encode(f"[user]{context}</s>[assistant]")
            target = [*backbone.encode(choice.strip()), backbone.eos_id]
            assert total == pytest.approx(row_of(model, prefix, prompt, target), abs=1e-3)


def test_the_end_of_a_prefixs_own_chat_ends_raw_texts(
    tiny_backbone: Any, random_prefix: Any, measure: Callable[..., Any]
) -> None:
    backbone = tiny_backbone("llama", max_position_embeddings=700)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made = random_prefix(backbone, 4, seed=5).layers
    plain = PrefixLM(backbone, Prefix(made), console=QUIET)
    texts = [text for (text,) in measure(plain, "made_texts")["answers"]["made_texts"].values()]
    # A letter that it writes is the end of an answer in the template.
    end = next(text[1] for text in texts if len(text) > 1)
    form = TextFormat("{source}", "{target}", end=end, chat_template=template)
    chat = PrefixLM(backbone, Prefix(made, {"text_format": form.to_dict()}), console=QUIET)
    ended = measure(chat, "made_texts")["answers"]["made_texts"]
    assert [text for (text,) in ended.values()] == [text.split(end)[0] for text in texts]


def test_sampled_texts_are_drawn_anew(tiny_backbone: Any, measure: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "responses.jsonl"
    options = {"gen_kwargs": {"do_sample": True, "temperature": 2.0, "until": ["\n"]}, "limit": 4}
    model = PrefixLM(tiny_backbone("llama", max_position_embeddings=700), responses=file, console=QUIET)
    first = measure(model, "made_texts", torch_random_seed=1, **options)["answers"]
    assert measure(model, "made_texts", torch_random_seed=1, **options)["answers"] == first
    assert measure(model, "made_texts", torch_random_seed=2, **options)["answers"] != first
    assert not file.exists()
