"""Mixed batches with a cache against recomputing each row, greedy and with beams; and what users set."""

import re

import pytest
import torch

from oracles import beams_by_recomputation, greedy_by_recomputation, make_end_likely
from patching import replace_everywhere
from prefixtune.engine.request import Token
from prefixtune.engine.sampler import sample
from prefixtune.errors import BackboneError, ConfigError, RequestError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import complete, generate, generate_ids, stream
from prefixtune.inference.prompts import Prompt
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat

NEW = 12


DECODERS = ("gpt2", "llama", "mistral", "opt")
"""Learned positions, rotary ones, a window, and positions that come from the mask."""
ENCODER_DECODERS = ("bart", "mbart", "pegasus", "t5", "t5_gated", "m2m_100")
SITES = {"encoder": 4, "decoder": 3, "cross": 5}
LENGTHS = {
    "decoder": (6, 3, None, 1, 6),
    "encoder-decoder": (
        SITES,
        {"encoder": 1, "decoder": 6, "cross": 2},
        None,
        {"cross": 3},
        {"decoder": 2, "encoder": 7},
    ),
}


@pytest.fixture
def requests(random_prefix, random_ids):
    """Prompts, some longer than Mistral's window; prefixes of several lengths and sites, and none."""

    def make(backbone):
        return [
            (random_ids(count, count), None if length is None else random_prefix(backbone, length, seed))
            for seed, (count, length) in enumerate(zip((7, 2, 12, 5, 1), LENGTHS[backbone.kind], strict=True), 1)
        ]

    return make


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_greedy_is_recomputation(name, tiny_backbone, requests):
    backbone = tiny_backbone(name)
    asked = requests(backbone)
    prompts, prefixes = ([request[part] for request in asked] for part in (0, 1))
    outputs = generate_ids(backbone, prompts, prefixes, config=GenerateConfig(max_new_tokens=NEW))
    assert outputs == [greedy_by_recomputation(backbone, *request, NEW) for request in asked]
    bare = generate_ids(backbone, prompts, [None] * 5, config=GenerateConfig(max_new_tokens=NEW))
    assert [a != b for a, b in zip(outputs, bare, strict=True)] == [True, True, False, True, True]


@pytest.mark.parametrize("length_penalty", [1.0, -1.0])
@pytest.mark.parametrize("name", [*DECODERS, "bart", "pegasus", "t5", "m2m_100"])
def test_beams_are_recomputation(name, length_penalty, tiny_backbone, requests, monkeypatch):
    backbone = tiny_backbone(name)
    make_end_likely(backbone)
    asked, options = requests(backbone), {"max_new_tokens": 8, "num_beams": 3, "length_penalty": length_penalty}
    prompts, prefixes = ([request[part] for request in asked] for part in (0, 1))
    outputs = generate_ids(backbone, prompts, prefixes, config=GenerateConfig(**options))
    assert outputs == [beams_by_recomputation(backbone, *request, monkeypatch, **options) for request in asked]


@pytest.mark.parametrize("name", ["lfm2", "jamba"])
def test_models_that_the_engine_cannot_run(name, tiny_backbone, random_prefix, random_ids):
    backbone = tiny_backbone(name)
    prompts, prefixes = [random_ids(count, count) for count in (7, 3)], [random_prefix(backbone, 4, 1), None]
    config = GenerateConfig(max_new_tokens=6)
    outputs = generate_ids(backbone, prompts, prefixes, config=config)
    assert outputs == [greedy_by_recomputation(backbone, *one, 6) for one in zip(prompts, prefixes, strict=True)]
    options = {"max_new_tokens": 12, "temperature": 2.0, "seed": 3}
    (drawn,) = generate(backbone, ["some text"], prefixes[0], **options)
    assert "".join(stream(backbone, "some text", prefixes[0], **options)) == drawn
    assert generate(backbone, ["some text"], prefixes[0], **{**options, "seed": 4}) != [drawn]
    # What is wanted of many texts draws as in a call for all of them.
    made = [Prompt(random_ids(count, count), None, 12) for count in (3, 9, 5, 7, 4)]
    config = GenerateConfig(**options, batch_size=2)
    whole = {number: output.tokens for number, output in complete(backbone, made, config)}
    for wanted in ([1, 3, 4], [0]):
        part = {number: output.tokens for number, output in complete(backbone, made, config, wanted)}
        assert part == {number: whole[number] for number in wanted}


# --- what users set; one family is enough ----------------------------------------------------------------------------


@pytest.fixture
def llama(tiny_backbone):
    return tiny_backbone("llama")


TEXTS = ["name : Aromi", "x", "a longer text, with more in it"]


def test_sampling_with_a_seed_is_reproducible(llama, random_prefix):
    prefix = random_prefix(llama, 4)
    options = {"temperature": 1.0, "max_new_tokens": 20}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate(llama, TEXTS, prefix, seed=7, **options)
    assert torch.equal(torch.get_rng_state(), before), "sampling with a seed must leave torch's random state alone"
    torch.manual_seed(6)
    assert generate(llama, TEXTS, prefix, seed=7, **options) == first
    assert generate(llama, TEXTS, prefix, seed=8, **options) != first
    # Each text draws by itself, whatever runs beside it.
    same = generate(llama, TEXTS[:1] * 3, prefix, seed=7, **options)
    assert (same[0], len(set(same))) == (first[0], 3)
    assert generate(llama, TEXTS[:1] * 3, prefix, seed=7, batch_size=1, **options) == same


def test_sampling_from_the_likeliest_alone_is_greedy(llama, random_prefix):
    prefix = random_prefix(llama, 4)
    greedy = generate(llama, TEXTS, prefix, max_new_tokens=20)
    assert generate(llama, TEXTS, prefix, max_new_tokens=20, temperature=3.0, top_k=1, seed=0) == greedy
    assert generate(llama, TEXTS, prefix, max_new_tokens=20, temperature=3.0, top_p=1e-6, seed=0) == greedy
    assert generate(llama, TEXTS, prefix, max_new_tokens=20, temperature=3.0, seed=0) != greedy


def plain_pieces(text, size):
    """Pieces of a text, all of visible ASCII."""
    return re.findall(rf"[!-~]{{{size}}}", text)


def test_stop_strings_end_an_output_and_are_left_out(llama, random_prefix):
    prefixes = [random_prefix(llama, 4, seed) for seed in range(3)]
    options = {"max_new_tokens": 30, "temperature": 1.5, "seed": 0}
    whole = generate(llama, TEXTS, prefixes, **options)
    stop = (plain_pieces(whole[0], 2)[1], plain_pieces(whole[1], 1)[4])
    stopped = generate(llama, TEXTS, prefixes, **options, stop=stop)
    wanted = [text[: min((p for s in stop if (p := text.find(s)) >= 0), default=len(text))].strip() for text in whole]
    assert stopped == wanted
    assert all(len(one) < len(other) for one, other in zip(stopped[:2], whole[:2], strict=True))


def test_a_stop_string_ends_beams(llama, random_prefix, random_ids):
    prompts, prefixes = [random_ids(5, n) for n in range(3)], [random_prefix(llama, 4, seed) for seed in range(3)]
    free = generate_ids(llama, prompts, prefixes, config=GenerateConfig(max_new_tokens=12, num_beams=3))
    stop = plain_pieces(llama.decode(free[0]), 1)[2]
    config = GenerateConfig(max_new_tokens=12, num_beams=3, stop=(stop,))
    together = generate_ids(llama, prompts, prefixes, config=config)
    assert together == [generate_ids(llama, [p], [q], config=config)[0] for p, q in zip(prompts, prefixes, strict=True)]
    texts = [llama.decode(ids) for ids in together]
    assert any(text.endswith(stop) for text in texts)
    assert all(stop not in text[:-1] for text in texts)


def test_a_stop_string_counts_in_the_output_alone(llama, random_prefix):
    """The prompt's end and the output's first token together make the stop string: that must not stop anything."""
    text_format, prefix = TextFormat("{source}=", "{target}"), random_prefix(llama, 4, 5)
    options = {"text_format": text_format, "max_new_tokens": 12, "temperature": 1.0, "seed": 1}
    (whole,) = generate(llama, ["name"], prefix, **options)
    assert generate(llama, ["name"], prefix, stop=("=" + whole[0],), **options) == [whole]


def test_a_stop_string_that_the_tokenizer_cannot_write_stops_nothing(llama):
    whole = generate(llama, TEXTS, max_new_tokens=8)
    assert generate(llama, TEXTS, max_new_tokens=8, stop=("日",)) == whole


def test_line_breaks_can_be_banned(llama, random_prefix):
    prefix = random_prefix(llama, 4)
    options = {"max_new_tokens": 80, "temperature": 8.0, "seed": 3}
    free = generate(llama, TEXTS, prefix, **options)
    assert any(mark in text for text in free for mark in "\n\r")
    banned = generate(llama, TEXTS, prefix, **options, ban_newlines=True)
    assert not any(mark in text for text in banned for mark in "\n\r")
    assert any(banned)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "seed": 4}, {"stop": ("e", "0")}, {"min_new_tokens": 30}])
@pytest.mark.parametrize("number", range(2))
def test_streamed_pieces_joined_are_the_whole(number, options, llama, random_prefix):
    prefix = None if number == 0 else random_prefix(llama, 4, number)
    (whole,) = generate(llama, [TEXTS[0]], prefix, max_new_tokens=40, **options)
    pieces = list(stream(llama, TEXTS[0], prefix, max_new_tokens=40, **options))
    assert "".join(pieces) == whole
    assert len(pieces) > 1 or len(whole) < 2


def test_stops_are_streamed_as_they_are_generated(llama, random_prefix):
    """Stop strings at many places, some after a space or a line break."""
    tried = 0
    for seed in range(2):
        prefix = random_prefix(llama, 4, seed)
        options = {"max_new_tokens": 30, "temperature": 1.5, "seed": seed}
        (whole,) = generate(llama, ["x"], prefix, **options)
        for place in range(1, len(whole) - 3, 4):
            stop = (whole[place : place + 3],)
            if "\ufffd" not in stop[0]:
                tried += 1
                (stopped,) = generate(llama, ["x"], prefix, **options, stop=stop)
                assert "".join(stream(llama, "x", prefix, **options, stop=stop)) == stopped
                assert stopped == whole[: whole.find(stop[0])].strip()
    assert tried > 6


def test_space_before_a_stop_string_is_not_streamed(llama, monkeypatch):
    scripted(monkeypatch, llama, " one two \n<end> three")
    assert generate(llama, ["x"], stop=("<end>",)) == ["one two"]
    assert "".join(stream(llama, "x", stop=("<end>",))) == "one two"


def scripted(monkeypatch, backbone, text):
    """Let the engine pick the tokens of a given text."""
    ids = [*backbone.encode(text), backbone.eos_id]

    def scripted_sample(logits, sequences, *_):
        return [Token(ids[sequence.num_new_tokens]) for sequence in sequences]

    replace_everywhere(monkeypatch, sample, scripted_sample)


def test_a_character_over_several_tokens_is_streamed_whole(llama, monkeypatch):
    scripted(monkeypatch, llama, " ab€é c€ ")
    assert list(stream(llama, "x")) == ["a", "b", "€", "é", " c", "€"]
    assert generate(llama, ["x"]) == ["ab€é c€"]


def test_a_reader_may_leave_a_stream(llama, random_prefix):
    pieces = stream(llama, "x", random_prefix(llama, 4), max_new_tokens=100)
    next(pieces)
    pieces.close()
    assert generate(llama, ["x"], max_new_tokens=3)


def test_beams_cannot_stream(llama):
    with pytest.raises(ConfigError, match="beam search cannot stream"):
        next(stream(llama, "x", num_beams=2))


def test_an_overflow_is_refused_before_any_work(llama, random_prefix, monkeypatch):
    prefix = random_prefix(llama, 10)
    limit = llama.max_positions
    fits = limit - 10 - 100
    config = GenerateConfig(max_new_tokens=100, batch_size=1)
    monkeypatch.setattr(llama.model, "forward", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(RequestError, match=rf"text 2\D+10 \D+{fits + 1} \D+100 ") as error:
        generate_ids(llama, [[1], [1] * (fits + 1)], [prefix, prefix], config=config)
    assert str(limit) in error.value.message
    assert error.value.hint
    with pytest.raises(RequestError, match="text 1 needs"):
        next(stream(llama, "y" * fits, prefix, config=config))


def test_the_last_position_can_be_used(llama, random_prefix, random_ids):
    prefix = random_prefix(llama, 10)
    prompt = random_ids(llama.max_positions - 10 - 4)
    config = GenerateConfig(max_new_tokens=4, min_new_tokens=4)
    (output,) = generate_ids(llama, [prompt], [prefix], config=config)
    assert len(output) == 4


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_a_batch_may_hold_more_slots_than_a_row_has_positions(
    name, num_beams, tiny_backbone, random_prefix, random_ids
):
    backbone = tiny_backbone(name)
    prompts, prefixes = [random_ids(5, 1), random_ids(140, 2)], [random_prefix(backbone, 100), None]
    assert backbone.max_positions < 100 + 140 + 6
    config = GenerateConfig(max_new_tokens=6, num_beams=num_beams)
    together = generate_ids(backbone, prompts, prefixes, config=config)
    for prompt, prefix, output in zip(prompts, prefixes, together, strict=True):
        assert generate_ids(backbone, [prompt], [prefix], config=config) == [output]


def test_no_text_gives_no_output(llama):
    assert generate(llama, []) == []


def test_a_wrong_prefix_is_refused(llama, tiny_backbone, random_prefix):
    foreign = random_prefix(tiny_backbone("qwen3"), 4)
    with pytest.raises(BackboneError, match=r"2 KV heads x 16.*'tiny-llama'.*2 KV heads x 8"):
        generate(llama, ["x", "y"], [None, foreign])
    with pytest.raises(RequestError, match="1 prefixes for 2 texts"):
        generate(llama, ["x", "y"], [None])
    with pytest.raises(RequestError, match="text 1 has no token"):
        generate_ids(llama, [[]], [None], config=GenerateConfig())


def test_the_text_format_comes_from_each_prefix(llama, random_prefix):
    plain = random_prefix(llama, 3)
    shaped = Prefix(plain.layers, {"text_format": {"prompt": "{source} =>", "target": "{target}", "end": "</s>"}})
    config = GenerateConfig(max_new_tokens=10)
    expected = generate_ids(llama, [llama.encode(" x <s>"), llama.encode("x =>")], [plain, shaped], config=config)
    assert generate(llama, ["x", "x"], [plain, shaped], config=config) == [llama.decode(i).strip() for i in expected]
    asked = generate(llama, ["x"], plain, config=config, text_format=TextFormat("{source} =>", "{target}"))
    assert asked == [llama.decode(expected[1]).strip()]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_results_keep_the_order_and_progress_is_reported(num_beams, llama, random_prefix):
    prefix = random_prefix(llama, 3)
    texts = ["long text " * 3, "a", "middle text", "b", "another long text here"]
    done = []
    options = {"max_new_tokens": 8, "num_beams": num_beams}
    outputs = generate(llama, texts, prefix, batch_size=2, on_batch=done.append, **options)
    assert outputs == [generate(llama, [text], prefix, **options)[0] for text in texts]
    assert done == [1, 2, 3, 4, 5]
