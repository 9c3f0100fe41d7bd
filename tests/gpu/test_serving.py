"""The engine on a device: mixed prefixes are each text alone, and a prompt without room for it harms nobody."""

import pytest
import torch

from bench.models import save_model
from prefixtune.backbone.load import load_backbone
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import TorchEngine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.errors import RequestError

NEW = 8
SAMPLING = SamplingParams(max_new_tokens=NEW, min_new_tokens=NEW)


def recomputed(backbone, request):
    """The likeliest tokens, each from a pass over the whole text."""
    ids = list(request.prompt)
    for _ in range(NEW):
        row = torch.tensor([ids], device=backbone.device)
        with torch.inference_mode():
            logits = backbone.forward(row, prefixes=request.prefix).logits[0, -1].float()
            logits[backbone.eos_id] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(request.prompt) :]


def tokens(engine, requests):
    return [[token.id for token in texts[0].tokens] for texts in engine.run(requests)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_of_mixed_prefixes_is_each_text_alone(family, device, placed, random_prefix, random_ids):
    backbone = placed(family, device)
    requests = [
        Request(
            tuple(random_ids(length, length)),
            random_prefix(backbone, P, P).detach().to(device=device) if P else None,
            SAMPLING,
        )
        for length, P in ((7, 6), (30, 0), (2, 3), (14, 6), (5, 1))
    ]
    engine = TorchEngine(backbone, EngineConfig(num_slots=3, prefill_tokens=6))
    assert tokens(engine, requests) == [recomputed(backbone, request) for request in requests]


def test_quantized_weights_are_near_the_full_ones(device, tmp_path, random_prefix):
    pytest.importorskip("torchao", reason="torchao is not installed")
    folder = save_model("tiny", tmp_path / "model")
    plain, rounded = (load_backbone(folder, device=device, quantize=kind) for kind in ("", "int8"))
    ids, prefix = torch.tensor([[5, 9, 60, 7]], device=device), random_prefix(plain, 3).detach().to(device=device)
    one, other = (backbone.forward(ids, prefixes=prefix).logits.float() for backbone in (plain, rounded))
    assert 0 < float((one - other).norm() / one.norm()) < 0.1


def test_a_prompt_without_room_is_refused_and_the_engine_goes_on(device, placed, random_prefix):
    backbone = placed("llama", device, max_position_embeddings=100_000)
    prefix = random_prefix(backbone, 4).detach().to(device=device)
    engine = TorchEngine(backbone, EngineConfig(num_slots=2, kv_cache_mib=1))
    short = Request((5, 6, 7), prefix, SAMPLING)
    [before] = tokens(engine, [short])
    with pytest.raises(RequestError):
        engine.run([Request((5,) * 50_000, prefix, SAMPLING)])
    assert tokens(engine, [Request(short.prompt, prefix, SAMPLING)]) == [before]
