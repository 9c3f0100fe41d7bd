"""The object of `load`: it says what the functions say, with the prefix in front."""

import copy
import sys

import pytest
import torch

import prefixtune as pt
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import as_prefix, make_header, named_backbone
from prefixtune.data.chat import chat_format, encode_chat
from prefixtune.data.tokenized import TokenizedExample
from prefixtune.engine.engine import TorchEngine
from prefixtune.errors import BackboneError, ConfigError, ContextLengthError, PrefixError, RequestError
from prefixtune.inference.classify import classify
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate, generate_ids, stream
from prefixtune.inference.model import load
from prefixtune.inference.prompts import fit_new_tokens, prepare_prompts
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.prefix.text_format import TextFormat
from prefixtune.training import score
from zoo import make_model

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = ["some text", "more"]
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "who are you"},
]
FEW = {"max_new_tokens": 6}
generate_module = sys.modules["prefixtune.inference.generate"]


@pytest.fixture(scope="module")
def backbone(tiny_models, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return Backbone.from_model(tiny_models("qwen2"), tokenizer, "tiny-qwen2")


@pytest.fixture
def make_prefix(backbone, random_prefix):
    def make(length=3, seed=0, **facts):
        prefix = random_prefix(backbone, length, seed, scale=3.0).detach()
        return Prefix(prefix.layers, make_header(backbone, **facts))

    return make


def ids_of(backbone, messages, prefix):
    """The answer by hand: the chat template's ids, continued."""
    config = pt.GenerateConfig(**FEW)
    (ids,) = generate_ids(backbone, [encode_chat(backbone, messages)], [prefix], config=config)
    return backbone.decode(ids).strip()


def test_texts(backbone, make_prefix):
    prefix = make_prefix()
    model = load(backbone, prefix)
    expected = generate(backbone, TEXTS, prefix, **FEW)
    assert expected != generate(backbone, TEXTS, **FEW), "the prefix must show"
    assert model.generate(TEXTS, **FEW) == expected
    assert model.generate(TEXTS[0], **FEW) == expected[0]
    assert "".join(model.stream(TEXTS[0], **FEW)).strip() == expected[0]
    assert load(backbone).generate(TEXTS, **FEW) == generate(backbone, TEXTS, **FEW)
    assert model.generate([]) == []


def test_the_bare_model_continues_a_text_as_it_is(backbone, make_prefix):
    (ids,) = generate_ids(backbone, [backbone.encode("some text")], [None], config=pt.GenerateConfig(**FEW))
    expected = backbone.decode(ids).strip()
    assert load(backbone).generate("some text", **FEW) == expected
    # Also beside a prefix, whose format the text does not get.
    with_prefix, bare = generate(backbone, ["some text"] * 2, [make_prefix(), None], **FEW)
    assert (bare, with_prefix == expected) == (expected, False)
    assert generate(backbone, ["some text"], text_format=TextFormat(), **FEW) != [expected]


def test_a_text_begins_and_ends_as_the_models_files_say(tiny_tokenizer, enclosing_tokenizer):
    model, end = make_model("llama", enclosing_tokenizer), enclosing_tokenizer.convert_tokens_to_ids("<pad>")
    model.generation_config.eos_token_id = [enclosing_tokenizer.eos_token_id, end, 5]
    backbone = Backbone.from_model(model, enclosing_tokenizer, "tiny")
    (prompt,) = prepare_prompts(backbone, ["some text"], [None], GenerateConfig())
    # 5 is an ordinary token, which a wrong configuration may name.
    assert (prompt.ids, prompt.ends) == (enclosing_tokenizer("some text")["input_ids"][:-1], (end,))
    plain = Backbone.from_model(model, tiny_tokenizer, "tiny")
    assert prepare_prompts(plain, ["some text"], [None], GenerateConfig())[0].ids == plain.encode("some text")


def test_tokens_that_the_model_lacks_are_neither_read_nor_padded_with(tiny_models, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    backbone = Backbone.from_model(tiny_models("llama"), tokenizer, "tiny")
    assert backbone.pad_id == backbone.eos_id
    with pytest.raises(RequestError):
        generate(backbone, ["a[PAD]b"], num_beams=2)


def test_a_conversation_that_is_too_long_keeps_its_template(backbone):
    talk = [{"role": "system", "content": "S" * 120}, {"role": "user", "content": "The question"}]
    options = {"text_format": chat_format(backbone, "model"), "on_too_long": "cut", "max_total_length": 80}
    with pytest.raises(ContextLengthError):
        classify(backbone, [talk], labels=["a", "b"], **options)


def test_an_answer_has_as_many_tokens_as_fit(backbone):
    model, most = load(backbone), backbone.max_positions
    long = [{"role": "user", "content": "x" * (most - 40)}]
    assert model.chat(long) == model.chat(long, max_new_tokens=most - len(encode_chat(backbone, long)))
    assert "".join(model.stream(long)).strip() == model.chat(long)
    with pytest.raises(RequestError, match="positions"):
        model.chat(long, max_new_tokens=60)


def test_room_for_an_answer_is_counted_as_the_caller_decodes(backbone, make_prefix):
    most = backbone.max_positions
    long = [{"role": "user", "content": "x" * (2 * most)}]
    model, seen = load(backbone), []
    options = {"on_too_long": "cut", "on_cut": seen.extend}
    expected = model.chat(long, max_new_tokens=most // 2, **options)
    assert model.chat(long, **options) == expected
    assert "".join(model.stream(long, **options)).strip() == expected
    assert seen == [0] * 3
    with pytest.raises(RequestError, match="text 1"):
        model.chat(long, max_total_length=30)
    # A prefix says so; and one that says nothing of its longest prompt leaves more than one token.
    form = TextFormat("Q: {source} ", "{target}", on_too_long="cut")
    model = load(backbone, make_prefix(text_format=form.to_dict()))
    with pytest.warns(UserWarning, match="truncated"):
        answer = model.chat(long, min_new_tokens=40)
    assert len(backbone.encode(answer)) >= 40 - 2
    # What is known of the training's lengths counts: the source is cut as there.
    for count, kept, left in (
        (140, 140, most - 143),
        (141, 141, most - 144),
        (200, most - 13, 10),
        (900, most - 13, 10),
    ):
        trained = TextFormat("{source}", "{target}", on_too_long="cut", longest_prompt=140, longest_target=10)
        prefix = make_prefix(text_format=trained.to_dict())
        config = fit_new_tokens(backbone, "x" * count, prefix, GenerateConfig(max_new_tokens=512), None)
        prompts = prepare_prompts(backbone, ["x" * count], [prefix], config, on_cut=lambda _: None)
        assert (len(prompts[0].ids), config.max_new_tokens) == (kept, left)
    # The text around is the caller's, too.
    short, around = long[0]["content"][: most - 30], TextFormat("x" * 20 + "{source}", "{target}")
    room = most - 3 - 20 - len(short)
    model = load(backbone, make_prefix(text_format=TextFormat("{source}", "{target}").to_dict()))
    assert model.chat(short, text_format=around) == model.chat(short, text_format=around, max_new_tokens=room)


def test_an_encoder_decoder_answers_with_as_many_tokens_as_it_has_positions(tiny_backbone, random_prefix):
    backbone = tiny_backbone("marian", max_position_embeddings=40)
    most = backbone.max_positions
    form = TextFormat("{source}", "{target}", longest_prompt=20)
    prefix = Prefix(random_prefix(backbone, 3).detach().layers, make_header(backbone, text_format=form.to_dict()))
    model = load(backbone, prefix)
    full = model.generate("hello", max_new_tokens=most, min_new_tokens=most)
    assert model.chat("hello", min_new_tokens=most) == full
    assert "".join(model.stream([{"role": "user", "content": "hello"}], min_new_tokens=most)).strip() == full
    assert model.generate("hello", max_new_tokens=512, min_new_tokens=most) == full
    with pytest.raises(RequestError, match=f"{most + 1} \\(new\\) positions"):
        generate(backbone, ["hello"], max_new_tokens=most + 1)


def test_logits_that_are_not_finite_are_said_to_be(tiny_models, tiny_tokenizer, random_prefix):
    backbone = Backbone.from_model(tiny_models("llama").to(torch.float16), tiny_tokenizer, "tiny-float16")
    prefix = random_prefix(backbone, 3).detach()
    prefix.layers["decoder"][1][1][0, 0, 0] = 1e5
    labels = {"kind": "classification", "by": "words", "names": ["yes", "no"], "words": ["yes", "no"]}
    labelled = Prefix(prefix.layers, make_header(backbone, labels=labels))
    model = load(backbone, prefix)
    for call in (
        lambda: model.generate("hello", **FEW),
        lambda: model.generate("hello", num_beams=2, **FEW),
        lambda: model.generate("hello", temperature=1.0, min_new_tokens=2, **FEW),
        lambda: list(model.stream("hello", **FEW)),
        lambda: load(backbone, labelled).classify("hello"),
    ):
        with pytest.raises(PrefixError, match=r"text 1: .*logits are not finite") as error:
            call()
        assert error.value.hint
    # Of several texts, the one is named.
    for beams in (1, 2):
        with pytest.raises(PrefixError, match="text 2: "):
            generate(backbone, ["hello"] * 3, [None, prefix, None], num_beams=beams, **FEW)


def test_conversations_go_through_the_chat_template(backbone, make_prefix):
    prefix = make_prefix()
    model = load(backbone, prefix)
    expected = ids_of(backbone, TALK, prefix)
    assert expected != ids_of(backbone, TALK, None), "the prefix must show"
    assert model.chat(TALK, **FEW) == expected
    assert model.generate(TALK, **FEW) == expected
    assert model.generate([TALK, TALK[:1]], **FEW) == [expected, ids_of(backbone, TALK[:1], prefix)]
    assert "".join(model.stream(TALK, **FEW)).strip() == expected
    assert model.chat("hello", **FEW) == ids_of(backbone, TALK[:1], prefix)
    # In whatever form they are, as in training.
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[one["role"]], "value": one["content"]} for one in TALK]
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in TALK]
    for talk in (shared, parts, [tuple(one.values()) for one in TALK]):
        assert generate(backbone, [talk], prefix, **FEW) == [expected]
        assert "".join(stream(backbone, talk, prefix, **FEW)).strip() == expected
    assert model.chat(shared, **FEW) == model.chat(parts, **FEW) == expected


def test_a_prefix_for_single_texts_reads_the_last_message(backbone, make_prefix):
    prefix = make_prefix(text_format=TextFormat("{source} ->", " {target}").to_dict())
    model = load(backbone, prefix)
    expected = generate(backbone, ["who are you"], prefix, **FEW)[0]
    with pytest.warns(UserWarning, match="last message only"):
        assert model.chat(TALK, **FEW) == expected
    assert model.chat("who are you", **FEW) == expected
    with pytest.warns(UserWarning, match="last message only"):
        assert "".join(model.stream(TALK, **FEW)).strip() == expected


def test_files_name_their_backbone(backbone, make_prefix, tmp_path):
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    prefix = make_prefix()
    header = {**prefix.header, "backbone": {**prefix.header["backbone"], "name": str(tmp_path / "model")}}
    folder = tmp_path / "run"
    Prefix(prefix.layers, header).save_pretrained(folder)
    expected = generate(backbone, TEXTS, prefix, **FEW)
    options = {"dtype": "float32", "device": "cpu"}
    assert load(prefix=folder, **options).generate(TEXTS, **FEW) == expected
    assert load(tmp_path / "model", folder / "prefix.safetensors", **options).generate(TEXTS, **FEW) == expected
    both = load(prefix=[folder, str(folder)], **options).prefix
    assert both.length() == 6
    assert both.header["composition"]["parts"][0]["name"] == str(folder)


def test_what_is_wrong_gets_one_line(backbone, make_prefix, tiny_backbone):
    model = load(backbone, make_prefix())
    for messages in ([], [{"role": "user"}], [{"role": "user", "content": ""}], TALK[:2]):
        with pytest.raises(RequestError):
            model.chat(messages)
    with pytest.raises(ConfigError):
        load(backbone, dtype="bfloat16")
    with pytest.raises(BackboneError):
        load(tiny_backbone("gpt2"), make_prefix())
    other = tiny_backbone("llama")
    with TorchEngine(other) as engine:
        for wrong in (engine, "torch"):
            with pytest.raises(ConfigError):
                generate(backbone, TEXTS, engine=wrong)
    with pytest.raises(RequestError, match="no chat template"):
        load(other).chat("hello")
    nameless = Prefix(make_prefix().layers)
    with pytest.raises(ConfigError, match="no backbone"):
        load(prefix=nameless)
    stranger = make_prefix()
    stranger.header["backbone"]["name"] = "another"
    with pytest.raises(ConfigError, match="different backbones"):
        load(prefix=[make_prefix(), stranger])
    # One that names none goes along with one that does, in Python and on the command line.
    assert named_backbone([nameless, stranger]) == "another"


# --- where a prefix is -----------------------------------------------------------------------------------------------


def test_a_prefix_is_moved_to_the_backbone_once(backbone, make_prefix, tmp_path, monkeypatch):
    """Not with every text or pass. No number is computed on this device."""
    file, other = save_prefix(tmp_path / "p.safetensors", make_prefix()), make_prefix(seed=1)
    files = [file, save_prefix(tmp_path / "q.safetensors", other)]
    assert as_prefix(other, backbone) is other
    monkeypatch.setattr(Backbone, "device", torch.device("meta"))
    moved = as_prefix(file, backbone)
    assert moved.device.type == load(backbone, file).prefix.device.type == load(backbone, files).prefix.device.type
    assert (moved.device.type, moved.dtype) == ("meta", other.dtype)
    assert as_prefix(moved, backbone) is moved
    first, second, again, none = generate_module._per_text([file, other, file, None], 4, backbone)
    assert first is again
    assert (first.device.type, second.device.type, none) == ("meta", "meta", None)
    assert generate_module._per_text([moved, None], 2, backbone)[0] is moved
    # More than fits beside the texts goes with each of them.
    monkeypatch.setattr(generate_module, "_MOVED_BYTES", other.num_bytes)
    assert {one.device.type for one in generate_module._per_text([file, other], 2, backbone)} == {"cpu"}


def test_losses_are_measured_with_the_prefix_on_the_device(backbone, make_prefix, monkeypatch):
    seen = []

    def compute(backbone, prefix, batch, **options):
        seen.append(prefix.device.type)
        return torch.zeros(len(batch.labels))

    monkeypatch.setattr(score, "batch_loss", compute)
    monkeypatch.setattr(Backbone, "device", torch.device("meta"))
    rows = [TokenizedExample((1, 2), ((3, 4),))] * 4
    score.score_targets(backbone, make_prefix(), rows, batch_size=1)
    assert seen == ["meta"] * 4
