"""The text around questions, and the chat template cut in two."""

import copy
import dataclasses

import pytest

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import chat_format
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.wording import check_view, choose_wording
from prefixtune.errors import ConfigError, RequestError
from prefixtune.prefix.text_format import TextFormat
from zoo import make_model

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(backbone, template):
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(backbone, tokenizer=tokenizer)


def config(**options):
    return DistillConfig(document="d", questions="q", **options)


def test_view_and_question_are_what_the_chat_template_writes(backbone):
    backbone = with_template(backbone, TEMPLATE)
    wording = choose_wording(config(ask="chat"), backbone, None)
    text = wording.view(backbone, "Be kind.") + wording.text_format.format_prompt("Hi?", "")
    assert text == backbone.tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert wording.prompt == "<user>{source}</user>\n<assistant>"


@pytest.mark.parametrize("template", [None, "{{ messages[-1].content }}", "{{ raise_exception('no system') }}"])
def test_a_template_without_a_system_message_is_refused(backbone, template):
    with pytest.raises((ConfigError, RequestError), match="chat template"):
        choose_wording(config(ask="chat"), with_template(backbone, template), None)


def test_auto(backbone):
    tuned = TextFormat("{source} =>", "{target}")
    chatty = with_template(backbone, TEMPLATE)
    document = choose_wording(config(), chatty, None)
    assert (document.prompt, document.stop) == ("Question: {source}\nAnswer:", ("\n",))
    assert choose_wording(DistillConfig(teacher="t", data="d"), chatty, tuned).prompt == "{source} =>"
    assert choose_wording(DistillConfig(prompt="p", data="d"), chatty, None).chat
    prompt = choose_wording(DistillConfig(prompt="p", data="d"), backbone, None)
    assert (prompt.prompt, prompt.stop) == ("Input: {source}\nOutput:", ("\nInput:",))
    taught = choose_wording(DistillConfig(teacher="t", data="d"), backbone, chat_format(backbone, TEMPLATE + "\n"))
    assert taught.prompt == "<user>{source}</user>\n<assistant>"


def test_a_teacher_without_a_format_of_its_own_is_asked_as_for_a_prompt(backbone, tiny_backbone):
    teacher = DistillConfig(teacher="t", data="d")
    turn = backbone.end.join(("{% for m in messages %}<{{ m.role }}>{{ m.content }}", "\n{% endfor %}<assistant>"))
    # No text stands before the question: a template without a system message will do.
    alone = turn.replace("{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for")
    wording = choose_wording(teacher, with_template(backbone, alone), None)
    assert (wording.prompt, wording.target) == (f"<user>{{source}}{backbone.end}\n<assistant>", "{target}")
    assert not wording.tuned
    plain = choose_wording(teacher, backbone, None)
    assert (plain.prompt, plain.target, plain.stop) == ("Input: {source}\nOutput:", " {target}\n", ("\nInput:",))
    reader = choose_wording(teacher, tiny_backbone("bart"), None)
    assert (reader.prompt, reader.target) == ("{source}", "{target}")


def test_a_chat_template_whose_answers_end_elsewhere_is_no_default_for_a_teacher(backbone):
    ends_elsewhere = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<pad>{% endfor %}"
    other, teacher = with_template(backbone, ends_elsewhere), DistillConfig(teacher="t", data="d")
    assert choose_wording(teacher, other, None).prompt == "Input: {source}\nOutput:"
    with pytest.raises(ConfigError):
        choose_wording(DistillConfig(teacher="t", data="d", ask="chat"), other, None)
    with pytest.raises(ConfigError):
        choose_wording(teacher, backbone, chat_format(backbone, ends_elsewhere))


def test_a_text_in_view_begins_as_the_tokenizer_begins_texts(backbone, enclosing_tokenizer):
    wording = choose_wording(config(), backbone, None)
    assert wording.view(backbone, " The Owl.\n") == "The Owl.\n\n"
    beginning = dataclasses.replace(backbone, tokenizer=enclosing_tokenizer)
    seen = beginning.encode(wording.view(beginning, "The Owl."))
    assert seen == [enclosing_tokenizer.bos_token_id, *backbone.encode("The Owl.\n\n")]


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
def test_a_model_whose_other_layers_get_nothing_of_a_text_in_view_is_refused(name, tiny_tokenizer):
    hybrid = Backbone.from_model(make_model(name, tiny_tokenizer), tiny_tokenizer, name)
    with pytest.raises(ConfigError):
        check_view(hybrid)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "deepseek_v3"])
def test_a_model_with_attention_alone_reads_a_text_in_view(name, tiny_tokenizer):
    windows = {"sliding_window": 32} if name.startswith("gemma") else {}
    check_view(Backbone.from_model(make_model(name, tiny_tokenizer, **windows), tiny_tokenizer, name))


def test_the_bare_model_is_asked_as_without_a_system_message(backbone):
    template = "{% if messages[0].role != 'system' %}<system>Default</system>\n{% endif %}" + TEMPLATE
    backbone = with_template(backbone, template)
    wording = choose_wording(config(ask="chat"), backbone, None)
    assert wording.alone().prompt == "<system>Default</system>\n<user>{source}</user>\n<assistant>"
    own = choose_wording(config(ask="chat", prompt_format="{source} ->"), backbone, None)
    assert own.alone().prompt == "{source} ->"
