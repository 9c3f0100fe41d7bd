"""What the engine's tests share: backbones by family, a request by itself, the ids of an output, and drawn tokens."""

import threading
from collections import Counter

import torch

from prefixtune.engine.request import Request, SamplingParams, Token, join_outputs
from prefixtune.engine.sampler import sample
from prefixtune.engine.sequence import TokenSequence
from prefixtune.inference.beams import search
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.prompts import Prompt
from prefixtune.prefix.prefix import content_hash
from prefixtune.sampling.detokenizer import Detokenizer

DECODERS_OF_THE_ZOO = ("gemma2", "gpt_oss", "deepseek_v3", "gemma3n_text", "qwen2_moe")
ENCODER_DECODERS_OF_THE_ZOO = ("umt5",)


def ids(output):
    """The token ids of an output that came without an error."""
    assert not output.error
    return [token.id for token in output.tokens]


def submit(engine, requests, deadline=None):
    """Submit requests to an engine with a server of its own, all at once, and wait; per request, its texts."""
    outputs = {}
    ended = threading.Semaphore(0)

    def receive(output):
        outputs.setdefault((output.request_id, output.index), []).append(output)
        if output.finish_reason is not None:
            ended.release()

    for request in requests:
        engine.submit(request, receive, deadline)
    for _ in range(sum(request.n for request in requests)):
        assert ended.acquire(timeout=300)
    return [[join_outputs(outputs[one.id, index]) for index in range(one.n)] for one in requests]


_known = {}


def alone(backbone, request, **options):
    """What transformers' `generate` makes of a request by itself; worked out once for each backbone and request."""
    config = GenerateConfig(**{"max_new_tokens": request.sampling.max_new_tokens, **options})
    prefix = None if request.prefix is None else content_hash(request.prefix)
    key = id(backbone), request.prompt, prefix, repr(config)
    if key not in _known:
        prompt = Prompt(list(request.prompt), request.prefix, config.max_new_tokens)
        ((_, tokens),) = search(backbone, [prompt], [0], config)
        # The backbone is kept, so that its id is no other's.
        _known[key] = backbone, tokens
    return list(_known[key][1])


class EvenNumbers:
    """In place of a sequence's random numbers: multiples of the golden ratio, spread as evenly as can be over [0, 1).

    Of 1,000 numbers, or of every second of 2,000, an interval gets 1,000 times its length, to within four.
    """

    WITHIN = 4

    def __init__(self):
        self.count = 0

    def random(self):
        """The next number."""
        self.count += 1
        return self.count * (5**0.5 - 1) / 2 % 1


def sequence(**rules):
    """A text without tokens, with these rules."""
    return TokenSequence(Request((0,), None, SamplingParams(**{"seed": 5, **rules})), 0, Detokenizer(str))


def drawn(logits, count, *, evenly=False, **rules):
    """How often each token is drawn in so many draws."""
    sequences = [sequence(**rules) for _ in range(count)]
    shared = EvenNumbers() if evenly else sequences[0].random
    for one in sequences:
        one.random = shared
    tokens = sample(torch.tensor([logits] * count), sequences, eos_id=0)
    assert all(isinstance(token, Token) for token in tokens)
    return Counter(token.id for token in tokens)
