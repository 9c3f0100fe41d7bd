"""PEFT's own model as an oracle, both ways: what it loads of ours and what we load of its give the same logits."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError, CheckpointError
from prefixtune.interop.peft import export_peft, import_peft
from prefixtune.prefix.prefix import Prefix, unflatten
from zoo import exists, make_model

# PEFT warns of arguments that transformers renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # It looks for the base model that an adapter names, and these models lie in memory only.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

P = 6
NAMES = ("gpt2", "llama", "qwen3", "opt", "gpt_neox", "gptj", "phi", "stablelm", "gemma", "olmo2")
KINDS = ["PREFIX_TUNING", *(["CARTRIDGE"] if hasattr(peft, "CartridgeConfig") else [])]


@pytest.fixture(params=[name for name in NAMES if exists(name)])
def name(request):
    return str(request.param)


@pytest.fixture
def bare(name, tiny_tokenizer):
    """Makes the same random model each time."""
    return lambda: make_model(name, tiny_tokenizer)


@pytest.fixture
def backbone(bare, name, tiny_tokenizer):
    try:
        return Backbone.from_model(bare(), tiny_tokenizer, name)
    except BackboneError as error:
        pytest.skip(f"this transformers' {name} cannot use a prefix: {error.message}")


@pytest.fixture
def batch(random_ids, tiny_tokenizer):
    """Texts of unequal length, padded on the right."""
    texts = [random_ids(9, 1), random_ids(6, 2), random_ids(9, 3)]
    ids, mask = torch.full((3, 9), tiny_tokenizer.pad_token_id), torch.zeros(3, 9, dtype=torch.long)
    for number, text in enumerate(texts):
        ids[number, : len(text)], mask[number, : len(text)] = torch.tensor(text), 1
    return ids, mask


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def logits(model, batch):
    """PEFT's, where no token is padding."""
    ids, mask = batch
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def ours(backbone, prefix, batch):
    ids, mask = batch
    with torch.no_grad():
        return backbone.forward(ids, mask, prefixes=prefix).logits[mask.bool()]


def settings(kind, **changes):
    made = {"PREFIX_TUNING": peft.PrefixTuningConfig, "CARTRIDGE": getattr(peft, "CartridgeConfig", None)}[kind]
    return made(task_type="CAUSAL_LM", num_virtual_tokens=P, **changes)


def train_a_step(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids, mask = batch
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    optimizer.step()


@pytest.mark.deploys("PEFT", "logits of PEFT's own forward; the file comes back bit for bit", by="name")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_is_exported(kind, bare, backbone, random_prefix, batch, assert_same, tmp_path):
    prefix = random_prefix(backbone, P).detach()
    with warnings.catch_warnings():
        # A key that this PEFT does not know would be warned of.
        warnings.filterwarnings("error", message=".*nexpected keyword")
        theirs = peft.PeftModel.from_pretrained(bare(), export_peft(prefix, tmp_path, backbone, peft_type=kind)).eval()
    found = logits(theirs, batch)
    assert_same(ours(backbone, prefix, batch), found)
    with torch.no_grad():
        without = backbone.forward(*batch).logits[batch[1].bool()]
    assert float((without - found).abs().max()) > 1e-2 * float(found.abs().max())
    # And what PEFT then saves is the same again.
    theirs.save_pretrained(tmp_path / "again")
    assert import_peft(tmp_path / "again", backbone).equal(prefix)


@pytest.mark.parametrize(("kind", "projected"), [("PREFIX_TUNING", True), *((kind, False) for kind in KINDS)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_what_peft_trained_is_imported(kind, projected, bare, backbone, batch, assert_same, tmp_path):
    changes = {"prefix_projection": True, "encoder_hidden_size": 12} if projected else {}
    theirs = peft.get_peft_model(bare(), settings(kind, **changes))
    theirs.eval()
    before = theirs.get_prompt_embedding_to_save("default").clone()
    train_a_step(theirs, batch)
    theirs.save_pretrained(tmp_path)
    prefix = import_peft(tmp_path, backbone)
    rows = theirs.get_prompt_embedding_to_save("default")
    assert not torch.equal(rows, before)
    assert prefix.equal(Prefix({"decoder": unflatten(rows, backbone.geometry["decoder"])}))
    assert_same(ours(backbone, prefix, batch), logits(theirs, batch))
    # Back to PEFT, which reads it as its own.
    again = peft.PeftModel.from_pretrained(bare(), export_peft(prefix, tmp_path / "again")).eval()
    assert torch.equal(logits(again, batch), logits(peft.PeftModel.from_pretrained(bare(), tmp_path).eval(), batch))
    one, other = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, tmp_path / "again"))
    assert torch.equal(one["prompt_embeddings"], other["prompt_embeddings"])


@pytest.mark.skipif("CARTRIDGE" not in KINDS, reason="this PEFT has no cartridges")
def test_a_cartridges_frozen_positions_stay_frozen_in_peft(tiny_backbone, tiny_models, random_prefix, batch, tmp_path):
    llama = tiny_backbone("llama")
    prefix = random_prefix(llama, P).detach()
    folder = export_peft(prefix, tmp_path, peft_type="CARTRIDGE", num_frozen_tokens=2)
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    theirs = peft.get_peft_model(tiny_models("llama"), config)
    encoder = theirs.prompt_encoder["default"]
    encoder.load_prompt_embeddings(load_file(folder / "adapter_model.safetensors")["prompt_embeddings"])
    assert len(encoder.frozen_embedding) == 2
    train_a_step(theirs, batch)
    theirs.save_pretrained(tmp_path / "trained")
    trained = import_peft(tmp_path / "trained", llama)
    assert trained[:2].equal(prefix[:2])
    assert not trained[2:3].equal(prefix[2:3])
    assert trained.header["peft"] == {"peft_type": "CARTRIDGE", "num_frozen_tokens": 2}


@pytest.mark.deploys("PEFT", "its format shares one prefix between the layers' sites", by="name", refused=True)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_an_encoder_decoders_adapter_is_refused(name, tiny_tokenizer, tmp_path):
    changes = {"bart": {"decoder_attention_heads": 4}, "t5": {"d_kv": 8}}[name]
    model = make_model(name, tiny_tokenizer, **changes)
    config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        import_peft(tmp_path)
