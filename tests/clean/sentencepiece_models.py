"""Write tiny models with random weights and tokenizers of SentencePiece into a folder, as the hub has them.

python sentencepiece_models.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import MarianConfig, MarianMTModel, PegasusConfig, PegasusForConditionalGeneration

SIZES: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}


def train_pieces(folder: Path, name: str, **options: Any) -> bytes:
    """A SentencePiece model of a few words."""
    lines = [f"the fox number {i} runs over the hill and sees {j} dogs" for i in range(20) for j in range(10)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / name),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return (folder / f"{name}.model").read_bytes()


def write_marian(folder: Path, pieces: bytes) -> None:
    """A translation model: one SentencePiece file for each language, and a vocabulary of its own."""
    folder.mkdir()
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    words = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    words = ["</s>", "<unk>", *(word for word in words if word not in ("<s>", "</s>", "<unk>")), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    settings = {"source_lang": "en", "target_lang": "de", "tokenizer_class": "MarianTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    pad = len(words) - 1
    ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0, "forced_eos_token_id": 0}
    MarianMTModel(MarianConfig(vocab_size=len(words), **ids, **SIZES)).save_pretrained(folder)


def write_pegasus(folder: Path, pieces: bytes) -> None:
    """A summarizer whose tokenizer is the SentencePiece file alone."""
    folder.mkdir()
    (folder / "spiece.model").write_bytes(pieces)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PegasusTokenizer"}))
    PegasusForConditionalGeneration(PegasusConfig(vocab_size=256, **SIZES)).save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir()
    write_marian(target / "marian", train_pieces(target, "marian"))
    write_pegasus(target / "pegasus", train_pieces(target, "pegasus", pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
