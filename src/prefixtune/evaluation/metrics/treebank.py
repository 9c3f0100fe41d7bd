"""Penn Treebank words, as the evaluation of image captions counts them."""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.evaluation.metrics.java import jar_path, run_java
from prefixtune.evaluation.metrics.protocols import squeeze

__all__ = ["treebank_words"]


_TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
# The words that the evaluation of captions drops. The tokenizer lower-cases brackets, so in fact they stay, there and
# here.
_PUNCTUATION = frozenset(["''", "'", "``", "`", *".?!,:;-", "--", "...", "-LRB-", "-RRB-", "-LCB-", "-RCB-"])


def treebank_words(texts: Sequence[str]) -> list[str]:
    """Each text as lower-case Penn Treebank words without punctuation, a space between.

    Raises:
        Unavailable: Java or pycocoevalcap is missing, or the program failed.
    """
    jar = jar_path(_TOKENIZER, "the Penn Treebank tokenizer")
    name = "edu.stanford.nlp.process.PTBTokenizer"
    lines = run_java(["-cp", str(jar), name, "-preserveLines", "-lowerCase"], [squeeze(text) for text in texts])
    # Only plain spaces separate words: the tokenizer keeps "2 1/2" together with a no-break space.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in _PUNCTUATION) for line in lines]
