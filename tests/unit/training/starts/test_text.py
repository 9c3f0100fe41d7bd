"""A start from a text: where it is read from, what is refused, prompts, and what the header says of it."""

import pytest

from prefixtune.errors import BackboneError, ConfigError, DataError
from prefixtune.training.config import TrainConfig
from prefixtune.training.starts.build import build_encoder, resolve_site_lengths
from prefixtune.training.starts.words import MAX_TEXT_BYTES, read_init_text
from zoo import MAX_POSITIONS

TEXT = "The Gannet goes to Ashby."


def config(text=TEXT, length=0, **options):
    return TrainConfig(initialization="text", init_text=text, prefix_length=length, **options)


def test_a_file_is_read_as_it_is(tmp_path, tiny_backbone):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    backbone = tiny_backbone("llama")
    one, start = build_encoder(config(f"@{path}"), backbone)
    other, inline = build_encoder(config(), backbone)
    assert one.bake().equal(other.bake())
    assert start.description == {"kind": "text", "file": "prompt.txt", "tokens": len(TEXT)}
    assert inline.description == {"kind": "text", "text": TEXT, "tokens": len(TEXT)}
    words = TrainConfig(init_text=f"@{path}", prefix_length=4)
    assert build_encoder(words, backbone)[1].description == {"kind": "words", "file": "prompt.txt"}


@pytest.mark.parametrize(
    "content", [None, b"", b" \n ", b"\x89PNG\r\n", "Zürich".encode("latin-1"), b"x" * (MAX_TEXT_BYTES + 1)]
)
def test_files_that_hold_no_text_are_refused(tmp_path, content):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="prompt"):
        read_init_text(f"@{path}")


def test_a_text_shorter_than_the_prefix_says_its_length(tiny_backbone):
    with pytest.raises(ConfigError, match=f"has {len(TEXT)} tokens, but prefix_length is 26") as error:
        resolve_site_lengths(config(length=26), tiny_backbone("llama"))
    assert "--prefix-length" in error.value.hint


@pytest.mark.parametrize("how", ["cut", "stride", "match"])
def test_a_text_longer_than_the_model_is_brought_to_length_in_pieces(how, tiny_backbone):
    backbone = tiny_backbone("llama")
    encoder, start = build_encoder(config(TEXT * 20, 11, compaction=how), backbone)
    assert encoder.bake().prefix_length == 11
    assert start.description["tokens"] == 20 * len(TEXT) > 2 * MAX_POSITIONS
    assert start.description.get("turned_back", 20 * len(TEXT) - 11) == 20 * len(TEXT) - 11


def test_a_text_that_does_not_fit_is_refused(tiny_backbone):
    backbone = tiny_backbone("gpt2")
    with pytest.raises(ConfigError, match=f"170.*{MAX_POSITIONS}"):
        build_encoder(config("x" * 170), backbone)
    with pytest.raises(DataError, match="pieces, but the prefix has 2 positions"):
        build_encoder(config("x" * 1000, 2), backbone)


@pytest.mark.parametrize("how", ["stride", "match"])
def test_keys_that_turn_with_the_texts_length_are_not_compacted(how, tiny_backbone):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    backbone = tiny_backbone("llama", rope_parameters=rope)
    with pytest.raises(BackboneError, match="dynamic"):
        build_encoder(config(length=5, compaction=how), backbone)
    assert build_encoder(config(length=5, compaction="cut"), backbone)[0].bake().prefix_length == 5
    # Nothing is compacted.
    assert build_encoder(config(compaction=how), backbone)[0].bake().prefix_length == len(TEXT)
    # Positions that are added to the input do not turn.
    assert build_encoder(config(length=5, compaction=how), tiny_backbone("gpt2"))[0].bake().prefix_length == 5


def test_a_text_beyond_the_original_length_of_longrope_is_refused(tiny_backbone):
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 20, **factors}
    backbone = tiny_backbone("llama", rope_parameters=rope)
    with pytest.raises(ConfigError, match="reads at most 20"):
        build_encoder(config(), backbone)
    assert build_encoder(config(TEXT[:20]), backbone)[0].bake().prefix_length == 20


def test_only_the_lengths_that_sites_use_have_to_fit(tiny_backbone):
    backbone = tiny_backbone("bart")
    assert resolve_site_lengths(config(sites="encoder, cross=5"), backbone) == {"encoder": len(TEXT), "cross": 5}
    short = config("abcdefg", 10, sites="encoder=5,cross=5")
    assert resolve_site_lengths(short, backbone) == {"encoder": 5, "cross": 5}
    with pytest.raises(ConfigError, match="has 7 tokens, but sites is 'encoder=8'"):
        resolve_site_lengths(config("abcdefg", 5, sites="encoder=8"), backbone)
