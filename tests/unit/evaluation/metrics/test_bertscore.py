"""BERTScore on tiny random models, against cosines worked out here; and what is said where something is missing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2Model,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from prefixtune.evaluation.metrics import Unavailable, compare, compute, interval, measure

TEXTS = ["the cat sat on the mat", "a dog ran home", "mat", "the dog sat on the cat and ran home to the mat at five"]
OUTPUTS = ["the cat sat", "a dog ran home", "cat", "a mat", "the dog and the cat sat at home on the mat " * 8]
REFERENCES = [["the mat", "the cat sat on the mat"], ["a dog ran home"], ["the dog sat"], ["mat"], TEXTS[3:]]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


def write_roberta(folder: Path) -> PreTrainedTokenizerBase:
    """A tiny RoBERTa; the tokenizer that the authors' code uses, which puts a space before each text."""
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(TEXTS * 5, vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    pieces.save_model(str(folder))
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    RobertaTokenizer(*files).save_pretrained(folder)
    RobertaModel(RobertaConfig(vocab_size=320, **SIZES)).save_pretrained(folder)
    return RobertaTokenizer(*files, add_prefix_space=True)


def write_bert(folder: Path) -> PreTrainedTokenizerBase:
    """A tiny BERT of whole words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder)
    return tokenizer


@pytest.fixture(params=[write_roberta, write_bert])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedTokenizerBase]:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    return folder, request.param(folder)


def f1_of_pair(folder: Path, tokenizer: PreTrainedTokenizerBase, output: str, reference: str, layer: int = 3) -> float:
    """The definition: each token's best cosine among the other text's tokens, averaged over either text."""
    network = AutoModel.from_pretrained(folder).eval()

    def unit_vectors(text: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer.encode(text)
        ids = ids if len(ids) <= 38 else [*ids[:37], ids[-1]]
        with torch.no_grad():
            states = network(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        counted = torch.tensor([one not in (tokenizer.cls_token_id, tokenizer.sep_token_id) for one in ids])
        return torch.nn.functional.normalize(states, dim=-1), counted

    (one, one_counts), (other, other_counts) = unit_vectors(output), unit_vectors(reference)
    cosines = one @ other.T
    precision, recall = cosines.amax(1)[one_counts].mean(), cosines.amax(0)[other_counts].mean()
    return float(2 * precision * recall / (precision + recall))


def score(folder: Path, outputs: list[str], references: list[list[str]]) -> list[float]:
    weights = {"bertscore": str(folder)}
    measured = measure(outputs, references, metrics=["bertscore"], weights=weights)["bertscore"]
    return [measured.part([index]).score for index in range(len(outputs))]


def test_scores_are_the_definitions_in_batches_and_singly(model: tuple[Path, PreTrainedTokenizerBase]):
    folder, tokenizer = model
    wanted = [
        max(f1_of_pair(folder, tokenizer, output, reference) for reference in references)
        for output, references in zip(OUTPUTS, REFERENCES, strict=True)
    ]
    assert wanted[1] == pytest.approx(1)
    assert len({round(one, 3) for one in wanted}) == len(wanted)
    assert score(folder, OUTPUTS, REFERENCES) == pytest.approx(wanted, abs=1e-5)
    # More pairs than one batch holds, in another order.
    assert score(folder, OUTPUTS[::-1] * 12, REFERENCES[::-1] * 12)[-5:] == pytest.approx(wanted[::-1], abs=1e-5)
    for output, references, one in zip(OUTPUTS, REFERENCES, wanted, strict=True):
        assert score(folder, [output], [references]) == pytest.approx([one], abs=1e-5)


def test_an_empty_output_scores_nothing_and_changes_no_other(model: tuple[Path, PreTrainedTokenizerBase]):
    folder, _ = model
    alone = score(folder, ["the cat"], [["a cat sat", " "]])
    assert score(folder, ["", "the cat", " \n"], [["a"], ["a cat sat", " "], ["b"]]) == pytest.approx([0, *alone, 0])
    assert score(folder, ["", ""], [["a"], ["b"]]) == [0, 0]
    # Of these, BERT's tokenizer leaves nothing.
    assert all(math.isfinite(one) for one in score(folder, ["\u200b", "cat"], [["cat"], ["\u200b"]]))


@pytest.mark.parametrize(("name", "layer"), [("byt5-small", 1), ("roberta-large", 3), ("other", 3)])
def test_a_known_model_is_compared_at_the_layer_that_the_authors_chose(
    name: str, layer: int, model: tuple[Path, PreTrainedTokenizerBase]
):
    """Their layers of these names are 1 and 17; the tiny model has 3."""
    folder, tokenizer = model
    known = folder.rename(folder.with_name(name))
    made = compute(["the cat"], [["a dog"]], metrics=["bertscore"], weights={"bertscore": str(known)})["bertscore"]
    assert made.score == pytest.approx(f1_of_pair(known, tokenizer, "the cat", "a dog", layer), abs=1e-5)
    version = metadata.version("bert-score")
    assert version == "0.3.13"
    assert made.implementation == f"bert-score {version} (F1, {known.name}, layer {layer} of 3); protocol plain"
    assert made.higher_is_better


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(Unavailable, match=r"bert-score is not installed.*pip install 'prefixtune\[bertscore\]'"):
        compute(["a"], [["a"]], metrics=["bertscore"])


def test_a_model_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        Unavailable, match=r"bertscore needs .* a model, and none is named; name a folder.*roberta-large"
    ):
        compute(["a"], [["a"]], metrics=["bertscore"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "nowhere"), str(tmp_path), "someone/no-such-model"):
        with pytest.raises(Unavailable, match=r"cannot be loaded from '.*name the folder of a transformers model"):
            compute(["a"], [["a"]], metrics=["bertscore"], weights={"bertscore": name})


def test_a_model_without_all_of_its_weights_is_refused(model: tuple[Path, PreTrainedTokenizerBase]):
    folder, _ = model
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.2.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unavailable, match=r"it lacks encoder\.layer\.2\.output\.dense\.weight"):
        score(folder, ["the cat"], [["a cat"]])


def test_a_package_that_cannot_be_imported_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(Unavailable, match="bert-score is installed but cannot be imported here"):
        compute(["a"], [["a"]], metrics=["bertscore"], weights={"bertscore": "anywhere"})


@pytest.mark.parametrize("make", [write_roberta, write_bert])
def test_a_model_without_its_own_tokenizer_is_refused(make: Callable[[Path], PreTrainedTokenizerBase], tmp_path: Path):
    tokenizer = make(tmp_path)
    tokenizer.add_tokens([f"word{number}" for number in range(400)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(Unavailable, match=r"has \d+ tokens, but the model knows \d+; copy the model's own tokenizer"):
        score(tmp_path, ["the cat"], [["the mat"]])
    for file in tmp_path.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(Unavailable, match="has no tokenizer: its vocabulary is empty; copy the tokenizer's files"):
        score(tmp_path, ["the cat"], [["the mat"]])


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path):
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(TEXTS * 5, vocab_size=300, special_tokens=["<|endoftext|>"])
    pieces.save_model(str(tmp_path))
    GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    GPT2Model(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=40)).save_pretrained(tmp_path)
    with pytest.raises(Unavailable, match="has no token for padding; name a model whose tokenizer has one"):
        score(tmp_path, ["the cat"], [["the mat"]])


def test_a_broken_model_is_reported(model: tuple[Path, PreTrainedTokenizerBase]):
    folder, _ = model
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole = config.read_text()
    config.write_text(whole.replace('"intermediate_size": 24', '"intermediate_size": 25'))
    with pytest.raises(Unavailable, match="cannot be loaded from"):
        score(folder, ["the cat"], [["the mat"]])
    config.write_text(whole)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Unavailable, match="cannot be loaded from"):
        score(folder, ["the cat"], [["the mat"]])


def test_a_model_that_cannot_be_used_is_reported(
    model: tuple[Path, PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any, **__: Any) -> Any:
        raise TypeError("it needs pictures.\nMore.")

    monkeypatch.setattr("bert_score.utils.bert_cos_score_idf", fails)
    with pytest.raises(Unavailable, match=r"cannot be used \(it needs pictures\); name another one"):
        score(model[0], ["the cat"], [["the mat"]])


def test_loading_shows_nothing(model: tuple[Path, PreTrainedTokenizerBase], capfd: pytest.CaptureFixture[str]):
    score(model[0], ["the cat"], [["the mat"]])
    assert capfd.readouterr() == ("", "")


def test_intervals_and_comparisons_take_a_model(model: tuple[Path, PreTrainedTokenizerBase]):
    weights = {"bertscore": str(model[0])}
    outputs, references = ["the cat", "a dog"], [["the mat"], ["a dog"]]
    low, high = interval(outputs, references, "bertscore", weights=weights, samples=20)
    assert low <= high == pytest.approx(1)
    assert compare(outputs, outputs, references, "bertscore", weights=weights, samples=20).p_value == 1
