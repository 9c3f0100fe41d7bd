"""What the tests share: tiny random models of six families, a tokenizer made on the spot, prefixes, and data paths.

Shape annotations of the whole package are checked at run time, and no model hub is ever asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor

# Imported before the hook, as they hold no tensors: `config` checks its values' types itself, and users are to see what
# it says of them; `console` takes streams, which the checker knows too narrowly.
import prefixtune.config
import prefixtune.console  # noqa: F401

install_import_hook("prefixtune", "beartype.beartype")

FAMILIES = ("gpt2", "llama", "opt", "gpt_neox", "qwen3", "mistral")
MAX_POSITIONS = 160

# Printable ASCII, line breaks, and the bytes of "é" and "€", so that a character may span tokens.
_BYTES = [*range(32, 127), 10, 13, *"é€".encode()]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the six model families in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One token per byte, with <s>, </s> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_characters()
    vocabulary = {alphabet[byte]: number for number, byte in enumerate(_BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> dict[int, str]:
    """How byte-level tokenizers write a byte: as itself where it is printable, else from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(other)}


@pytest.fixture
def tiny_models(tiny_tokenizer: Any) -> Callable[..., Any]:
    """A factory: `tiny_models(family, seed=0, **changes)` makes a random model with every dropout rate above zero."""
    import transformers as hf

    vocabulary = len(tiny_tokenizer)

    def make(name: str, *, seed: int = 0, **changes: Any) -> Any:
        tokens = {
            "vocab_size": vocabulary,
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        }
        common = {
            **tokens,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
        }
        grouped = {**common, "num_key_value_heads": 2, "attention_dropout": 0.2}
        gpt2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": MAX_POSITIONS}
        gpt2_drop = {"attn_pdrop": 0.1, "resid_pdrop": 0.2, "embd_pdrop": 0.3}
        opt = {**common, "ffn_dim": 48, "word_embed_proj_dim": 32}
        opt.pop("intermediate_size")
        opt_drop = {"dropout": 0.2, "attention_dropout": 0.1, "layerdrop": 0.1}
        configs: dict[str, Callable[..., Any]] = {
            "gpt2": lambda: hf.GPT2Config(**{**tokens, **gpt2, **gpt2_drop, **changes}),
            "llama": lambda: hf.LlamaConfig(**{**grouped, **changes}),
            "opt": lambda: hf.OPTConfig(**{**opt, **opt_drop, **changes}),
            "gpt_neox": lambda: hf.GPTNeoXConfig(
                **{**common, "attention_dropout": 0.1, "hidden_dropout": 0.2, **changes}
            ),
            "qwen3": lambda: hf.Qwen3Config(**{**grouped, "head_dim": 16, **changes}),
            "mistral": lambda: hf.MistralConfig(**{**grouped, "sliding_window": 4, **changes}),
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = hf.AutoModelForCausalLM.from_config(configs[name]())
            # Weights large enough that attention is far from uniform, and no bias or norm at its neutral start.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
        return model.eval()

    return make


@pytest.fixture
def tiny_backbone(tiny_models: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    """A factory: `tiny_backbone(family, seed=0, **changes)` makes a frozen `Backbone`."""
    from prefixtune.backbone import Backbone

    def make(name: str, **changes: Any) -> Any:
        return Backbone.from_model(tiny_models(name, **changes), tiny_tokenizer, f"tiny-{name}")

    return make


@pytest.fixture
def backbone(family: str, tiny_backbone: Callable[..., Any]) -> Any:
    """A tiny `Backbone` of each family in turn."""
    return tiny_backbone(family)


@pytest.fixture(scope="session")
def random_prefix() -> Callable[..., Any]:
    """A factory: `random_prefix(backbone, P, seed)` makes a prefix whose tensors are leaves that take gradients."""
    from prefixtune.prefix import Prefix

    def make(backbone: Any, length: int, seed: int = 0, scale: float = 1.0) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def one(heads: int, size: int) -> Tensor:
            return (torch.randn(heads, length, size, generator=generator) * scale).requires_grad_()

        return Prefix(
            {
                site: tuple((one(s.num_kv_heads, s.key_dim), one(s.num_kv_heads, s.value_dim)) for s in shapes)
                for site, shapes in backbone.geometry.items()
            }
        )

    return make


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., list[int]]:
    """A factory: `random_ids(count, seed)` gives ordinary token ids, no special ones."""

    def make(count: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, len(_BYTES), (count,), generator=generator).tolist()

    return make


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """`assert_same(one, other)`: equal up to `tolerance` times the largest number, for tensors or lists of them."""

    def check(one: Tensor | Sequence[Tensor], other: Tensor | Sequence[Tensor], *, tolerance: float = 1e-5) -> None:
        ones, others = ([t] if isinstance(t, Tensor) else list(t) for t in (one, other))
        assert len(ones) == len(others)
        for a, b in zip(ones, others, strict=True):
            assert a.shape == b.shape
            largest = float(b.detach().abs().max())
            assert largest > 0, "nothing to compare: all zero"
            difference = float((a.detach().float() - b.detach().float()).abs().max())
            assert difference <= tolerance * largest, f"{difference / largest:.2e} apart, relative"

    return check


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public datasets beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("shared/data is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def default_backbone() -> Any:
    """The embedded backbone, where it is prepared."""
    from prefixtune.backbone import load_backbone
    from prefixtune.pretrained import pretrained_folder

    if pretrained_folder("smollm2-135m") is None:
        pytest.skip("the embedded backbone is not prepared here (`prefixtune prepare`)")
    return load_backbone("smollm2-135m", dtype="float32", device="cpu")
