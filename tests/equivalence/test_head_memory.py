"""What is computed of a head with a million rows takes the memory of a few of its logits, never of all labels'."""

import gc
from pathlib import Path

import pytest
import torch

from prefixtune.backbone.batch import SoftLabels
from prefixtune.backbone.loss import batch_loss, teacher_labels
from prefixtune.data.batching import collate
from prefixtune.data.encoding import TokenizedExample
from prefixtune.data.examples import Example
from prefixtune.evaluation.evaluate import evaluate
from prefixtune.inference.classify import classify
from prefixtune.interop.lm_eval.likelihood import Continuation, score_continuations
from prefixtune.interop.trainer import PrefixModel
from prefixtune.training.score import evaluation_loss
from prefixtune.training.silence import measure_silence

VOCABULARY, LABELS, TARGETS = 1_000_000, 12, 20
WHOLE = 4 * VOCABULARY * LABELS * TARGETS
"""Bytes of all labels' logits in float32."""


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return tiny_backbone("llama", vocab_size=VOCABULARY, hidden_size=8, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def examples(random_ids):
    return [TokenizedExample(tuple(random_ids(4, n)), (tuple(random_ids(LABELS, n)),)) for n in range(TARGETS)]


def soft(examples):
    labels = SoftLabels.from_labels(torch.zeros(LABELS, dtype=torch.long))
    return [TokenizedExample(one.prompt, one.targets, soft_targets=(labels,)) for one in examples]


def trainer_step(backbone):
    model = PrefixModel(backbone, prefix_length=2)
    model(**model.collator()([Example("ab", ("c" * LABELS,))] * TARGETS)).loss.backward()


CALLERS = {
    "training": lambda b, p, rows: batch_loss(b, p.leaves(), collate(b, rows)).sum().backward(),
    "distillation": lambda b, p, rows: batch_loss(b, p.leaves(), collate(b, soft(rows))).sum().backward(),
    "teacher": lambda b, p, rows: teacher_labels(b, p, collate(b, rows), lengths=[LABELS] * len(rows)),
    "dev loss": lambda b, p, rows: evaluation_loss(b, p, rows),
    "silence": lambda b, p, rows: measure_silence(b, {"own": p}, rows),
    "evaluate": lambda b, p, rows: evaluate(b, [Example("", ("c" * LABELS * TARGETS,))], max_total_length=512),
    "classify": lambda b, p, rows: classify(b, ["ab"], labels=["c" * LABELS + chr(65 + n) for n in range(TARGETS)]),
    "lm-eval": lambda b, p, rows: score_continuations(
        b, [Continuation(one.prompt, one.targets[0], p) for one in rows], batch_size=TARGETS
    ),
    "Trainer": lambda b, p, rows: trainer_step(b),
}


def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("caller", CALLERS)
def test_memory_does_not_grow_with_labels_times_vocabulary(caller, backbone, examples, random_prefix):
    prefix = random_prefix(backbone, 2)
    # The head is found out once.
    batch_loss(backbone, None, collate(backbone, [TokenizedExample((5,), ((6,),))]))
    gc.collect()
    try:
        # The peak begins anew.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    except OSError:
        pytest.skip("this system tells no peak of memory")
    CALLERS[caller](backbone, prefix, examples)
    assert resident("VmHWM") - before < WHOLE / 2
