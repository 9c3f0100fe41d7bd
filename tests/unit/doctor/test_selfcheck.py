"""The quick check at loading: which models it looks at, what it remembers, and that faults are found."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from patching import replace_everywhere
from prefixtune.attention.masks import extend_mask
from prefixtune.attention.probe import probe
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.identity import fingerprint
from prefixtune.backbone.load import load_backbone
from prefixtune.doctor import examine as examine_module
from prefixtune.doctor import selfcheck
from prefixtune.doctor.examine import examine
from prefixtune.errors import BackboneError
from zoo import make_model


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder."""
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(selfcheck.SWITCH, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def runs(monkeypatch):
    """The model types that were compared."""
    compared = []

    def watched(model, layout):
        compared.append(model.config.model_type)
        return examine(model, layout)

    monkeypatch.setattr(selfcheck, "examine", watched)
    return compared


def test_a_type_is_checked_once(cache, runs, tiny_models):
    for _ in range(2):
        Backbone.from_model(tiny_models("gpt2"), None, "gpt2")
    assert runs == ["gpt2"]
    (note,) = (cache / "checked").iterdir()
    facts = json.loads(note.read_text())
    assert facts["model_type"] == "gpt2"
    assert {"transformers", "torch", "prefixtune", "attention", "device"} <= facts.keys()


def test_what_matters_is_checked_anew(cache, runs, tiny_models):
    Backbone.from_model(tiny_models("llama"), None, "llama")
    Backbone.from_model(tiny_models("llama"), None, "llama", attention="eager")
    Backbone.from_model(tiny_models("llama", num_hidden_layers=2), None, "llama")
    Backbone.from_model(tiny_models("llama", seed=1), None, "llama")
    Backbone.from_model(tiny_models("llama").to(torch.bfloat16), None, "llama")
    assert runs == ["llama"] * 3


def test_a_pass_in_half_precision_stands_for_no_exact_one(cache, runs, tiny_models, monkeypatch):
    half = tiny_models("llama").to(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(examine_module, "_MOST_BYTES", 0)
        for _ in range(2):
            Backbone.from_model(half, None, "llama")
    assert len(runs) == 1
    Backbone.from_model(tiny_models("llama"), None, "llama")
    assert len(runs) == 2


@pytest.fixture
def loads(cache, tiny_models, tiny_tokenizer, tmp_path, monkeypatch):
    """Load a small checkpoint; returns the backbone, and how often a model was run to be probed or fingerprinted."""
    folder, done = tmp_path / "model", []
    for function in (probe, fingerprint, examine):
        watched = functools.partial(lambda f, *given: done.append(f.__name__) or f(*given), function)
        replace_everywhere(monkeypatch, function, watched)

    def save(seed=0):
        tiny_models("llama", seed=seed).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)

    def load(**options):
        done.clear()
        return load_backbone(folder, dtype=options.pop("dtype", "float32"), **options), list(done)

    save()
    load.save = save
    return load


def test_what_was_seen_is_kept(loads):
    first, done = loads()
    assert done == ["probe", "examine", "fingerprint"]
    second, done = loads()
    assert done == []
    names = [{name: one.layout.layer_of.get(m) for name, m in one.model.named_modules()} for one in (first, second)]
    assert names[0] == names[1]
    assert {**vars(first.layout), "layer_of": 0} == {**vars(second.layout), "layer_of": 0}
    assert first.fingerprint == second.fingerprint
    assert first.model.config._attn_implementation == second.model.config._attn_implementation
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(first.forward(ids).logits, second.forward(ids).logits)


def test_other_weights_are_seen_anew(loads):
    first, _ = loads()
    loads.save(seed=1)
    second, done = loads()
    assert done == ["probe", "fingerprint"]
    assert first.fingerprint != second.fingerprint
    assert loads(dtype="bfloat16")[1][0] == "probe"
    assert loads(attention="eager")[1][0] == "probe"


def test_without_a_check_none_is_remembered(loads):
    assert loads(self_check=False)[1] == ["probe", "fingerprint"]
    assert loads()[1] == ["examine"]


def test_a_damaged_note_is_none(loads, cache):
    loads()
    (note,) = (cache / "seen").iterdir()
    for text in ("", "{}", "[]", '{"layout": {}}', note.read_text().replace("layers.0", "layers.99")):
        note.write_text(text)
        assert loads()[1] == ["probe", "fingerprint"]


def test_it_can_be_turned_off(cache, runs, tiny_models, monkeypatch):
    monkeypatch.setenv(selfcheck.SWITCH, "0")
    Backbone.from_model(tiny_models("gpt2"), None, "gpt2")
    monkeypatch.delenv(selfcheck.SWITCH)
    Backbone.from_model(tiny_models("gpt2"), None, "gpt2", self_check=False)
    assert not runs


def test_where_nothing_can_be_written_it_runs_each_time(cache, runs, tiny_models):
    cache.write_text("a file where the folder should be")
    for _ in range(2):
        Backbone.from_model(tiny_models("gpt2"), None, "gpt2")
    assert runs == ["gpt2", "gpt2"]


def test_padding_that_is_seen_is_refused_each_time(cache, tiny_models, monkeypatch):
    extend = extend_mask
    replace_everywhere(monkeypatch, extend_mask, lambda mask, visible, *rest: extend(mask, None, *rest))
    for _ in range(2):
        with pytest.raises(BackboneError, match=r"'llama'.*padded = alone") as error:
            Backbone.from_model(tiny_models("llama"), None, "llama")
    assert f"{selfcheck.SWITCH}=0" in error.value.hint
    assert not (cache / "checked").exists()


# --- types that ended in tracebacks or wrong numbers -----------------------------------------------------------------


def test_a_model_that_does_not_run_on_token_ids_is_refused(tiny_models, monkeypatch):
    model = tiny_models("gpt2")

    def broken(*args, **options):
        raise ValueError("You must specify exactly one of input_features or encoder_inputs_embeds")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(BackboneError, match="does not run on token ids alone: You must specify"):
        Backbone.from_model(model, None, "gpt2")


def test_a_decoder_without_a_head_is_refused(tiny_models):
    with pytest.raises(BackboneError, match="has no output head"):
        Backbone.from_model(tiny_models("llama").model, None, "llama")


# --- disentangled attention, which has code of its own ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["deberta", "deberta-v2"])
def test_deberta_attends_as_if_by_hand(name, enclosing_tokenizer, random_prefix):
    # Without positions, its attention is the plain one, which the prefix joins by eq. 3 of the paper.
    changes = {"relative_attention": False, "pos_att_type": None}
    backbone = Backbone.from_model(make_model(name, enclosing_tokenizer, **changes), enclosing_tokenizer, name)
    prefix = random_prefix(backbone, 3)
    layer = backbone.model.encoder.layer[0].attention.self
    seen = []
    # Noted from outside: what enters and what leaves.
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        backbone.model.encoder.layer[0].attention.output.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        ),
    ]
    with torch.no_grad():
        backbone.hidden_states(torch.tensor([[5, 6, 7, 8]]), prefixes=prefix)
        for handle in handles:
            handle.remove()
        states, given = seen
        if name == "deberta":
            query, key, value = layer.in_proj(states).unflatten(-1, (4, -1)).transpose(1, 2).chunk(3, dim=-1)
            query, value = (x + b.view(4, 1, -1) for x, b in ((query, layer.q_bias), (value, layer.v_bias)))
        else:
            parts = (layer.query_proj, layer.key_proj, layer.value_proj)
            query, key, value = (part(states).unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        front = prefix.layers["encoder"][0]
        key, value = (torch.cat([f[None], x], dim=2) for f, x in zip(front, (key, value), strict=True))
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        wanted = (weights @ value).transpose(1, 2).flatten(2)
    assert torch.allclose(given, wanted, atol=1e-5)


def test_two_threads_use_a_deberta_with_prefixes_of_their_own(enclosing_tokenizer, random_prefix):
    backbone = Backbone.from_model(make_model("deberta-v2", enclosing_tokenizer), enclosing_tokenizer, "deberta")
    prefixes = [random_prefix(backbone, 3, seed=1), None, random_prefix(backbone, 5, seed=2)]
    ids = torch.tensor([[5, 6, 7, 8]])

    def run(prefix):
        with torch.no_grad():
            return backbone.hidden_states(ids, prefixes=prefix)

    wanted = [run(prefix) for prefix in prefixes]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, prefixes * 20))
    assert all(torch.allclose(one, wanted[n % 3], atol=1e-6) for n, one in enumerate(found))
