"""The authors' checkpoints, against the same network built from torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import BackboneError, CheckpointError
from prefixtune.interop.authors import import_authors
from prefixtune.prefix.artifact import save_prefix

P, M = 5, 7
SITES = {"decoder": "", "cross": "2", "encoder": "_enc"}
Make = Callable[..., Any]


def network(size: int, width: int, seed: int, depth: int = 1) -> tuple[nn.Embedding, nn.Sequential]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(M, M), nn.Tanh())]
        first, last = [nn.Linear(width, M), nn.Tanh()], [nn.Linear(M, size)]
        return nn.Embedding(P, width), nn.Sequential(*first, *hidden, *last)


def state(table: nn.Module, net: nn.Module, suffix: str = "") -> dict[str, Tensor]:
    named = {f"wte{suffix}": table, f"control_trans{suffix}": net}
    return {f"{name}.{key}": t.detach() for name, m in named.items() for key, t in m.state_dict().items()}


def recomputed(table: nn.Module, net: nn.Module, layers: int, heads: int) -> list[Tensor]:
    """Per layer, keys and values of one row, (2, H, P, D), as the authors' model is given them."""
    with torch.no_grad():
        rows = net(table(torch.arange(P)[None]))
    parts = rows.view(1, P, layers * 2, heads, -1).permute([2, 0, 3, 1, 4]).split(2)
    return [part[:, 0] for part in parts]


def sizes(backbone: Any, site: str = "decoder") -> tuple[int, int, int]:
    shapes = backbone.geometry[site]
    return sum(shape.size for shape in shapes), len(shapes), shapes[0].num_kv_heads


@pytest.fixture(scope="module")
def gpt2(tiny_backbone: Make) -> Any:
    return tiny_backbone("gpt2")


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.deploys("the authors' checkpoints, read", "their MLP's output, from a state dict", model="gpt2")
@pytest.mark.parametrize("depth", [1, 2])
def test_gpt2s_mlp_is_baked(gpt2: Any, tmp_path: Path, depth: int, assert_same: Make) -> None:
    size, layers, heads = sizes(gpt2)
    made = network(size, gpt2.hidden_size, 0, depth)
    prefix = import_authors(write(tmp_path / "a.safetensors", state(*made)), gpt2)
    assert prefix.sites == ("decoder",)
    for (key, value), wanted in zip(prefix.layers["decoder"], recomputed(*made, layers, heads), strict=True):
        assert_same([key, value], [*wanted], tolerance=1e-6)
    stored = load_prefix(save_prefix(tmp_path / "p.safetensors", prefix), gpt2)
    assert stored.equal(prefix)
    assert stored.header["training"] == {"reparameterization": "mlp", "bottleneck_size": M}
    assert stored.header["positions"] == {"decoder": "text starts at position P"}


@pytest.mark.deploys("the authors' checkpoints, read", "all three sites, from a state dict", model="bart")
def test_barts_three_prefixes(tiny_backbone: Make, tmp_path: Path, assert_same: Make) -> None:
    # The authors take the decoder's depth and heads for all three, which in their BART is the encoder's too.
    bart = tiny_backbone("bart", encoder_layers=2, decoder_layers=2, decoder_attention_heads=4)
    tensors, wanted = {}, {}
    for seed, (site, suffix) in enumerate(SITES.items()):
        size, layers, heads = sizes(bart, site)
        made = network(size, bart.hidden_size, seed)
        tensors |= state(*made, suffix)
        wanted[site] = recomputed(*made, layers, heads)
    prefix = import_authors(write(tmp_path / "a.safetensors", tensors), bart)
    assert prefix.sites == ("encoder", "decoder", "cross")
    for site, layers_wanted in wanted.items():
        for (key, value), pair in zip(prefix.layers[site], layers_wanted, strict=True):
            assert_same([key, value], [*pair], tolerance=1e-6)
    assert load_prefix(save_prefix(tmp_path / "p.safetensors", prefix), bart).equal(prefix)


def test_a_directly_trained_prefix(gpt2: Any, tmp_path: Path) -> None:
    _, layers, heads = sizes(gpt2)
    flat = torch.randn(P * layers * 2 * gpt2.hidden_size, generator=torch.Generator().manual_seed(3))
    cached = flat.view(1, P, layers * 2, heads, -1).permute([2, 0, 3, 1, 4])
    one = import_authors(write(tmp_path / "a.safetensors", {"control_trans": flat}), gpt2)
    # From real words it is kept as the model's cache is.
    other = import_authors(write(tmp_path / "b.safetensors", {"control_trans": cached}), gpt2)
    assert one.equal(other)
    for number, (key, value) in enumerate(one.layers["decoder"]):
        assert torch.equal(key, cached[2 * number, 0])
        assert torch.equal(value, cached[2 * number + 1, 0])
    assert one.header["training"] == {"reparameterization": "none"}


def test_what_is_refused(gpt2: Any, tiny_backbone: Make, tmp_path: Path) -> None:
    size, _, _ = sizes(gpt2)
    good = state(*network(size, gpt2.hidden_size, 0))

    def refused(tensors: dict[str, Tensor], text: str, backbone: Any = gpt2) -> None:
        with pytest.raises((CheckpointError, BackboneError), match=text):
            import_authors(write(tmp_path / "a.safetensors", tensors), backbone)

    refused({n: t for n, t in good.items() if n != "wte.weight"}, r"lacks wte\.weight")
    refused({n: t for n, t in good.items() if n != "control_trans.2.bias"}, r"lacks control_trans\.2\.bias")
    refused({n: t for n, t in good.items() if ".2." not in n}, "lacks a layer of control_trans")
    refused({**good, "transformer.wte.weight": torch.zeros(3)}, r"holds transformer\.wte\.weight")
    refused({"wte.weight": torch.zeros(3, 3)}, "holds nothing")
    refused({**good, "wte.weight": torch.zeros(P, 3)}, "do not fit together")
    refused({**good, "wte.weight": good["wte.weight"] * torch.nan}, "NaN or infinity")
    refused({**good, "wte2.weight": good["wte.weight"].clone()}, "an infix")
    refused({"control_trans": torch.zeros(size + 1)}, "yields")
    refused(good, rf"position of 'tiny-llama' .* has {3 * 2 * 16}", tiny_backbone("llama"))
    refused({**good, **state(*network(size, gpt2.hidden_size, 1), "_enc")}, "prefixes at encoder, decoder")
    with pytest.raises(CheckpointError, match="there is no file"):
        import_authors(tmp_path / "none.safetensors", gpt2)


def test_their_pickle_is_refused_with_the_line_that_converts_it(gpt2: Any, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(state(*network(sizes(gpt2)[0], gpt2.hidden_size, 0)), path)
    with pytest.raises(CheckpointError, match="a pickle") as error:
        import_authors(path, gpt2)
    assert "weights_only=True" in error.value.hint
    assert str(tmp_path / "pytorch_model.safetensors") in error.value.hint
