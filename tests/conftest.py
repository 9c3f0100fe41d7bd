"""What the tests share: tiny random models of many families, tokenizers made on the spot, prefixes, and data paths.

Shape annotations of the whole package are checked at run time, and no model hub is ever asked.
"""

import collections
import functools
import gc
import json
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Each tiny model would be checked once; tests/unit/backbone/test_selfcheck.py looks at the check itself.
os.environ.setdefault("PREFIXTUNE_SELF_CHECK", "0")

import hypothesis
import jaxtyping
import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor

# Imported before the hook, as they hold no tensors: `config` checks its values' types itself, and users are to see what
# it says of them; `console` takes streams, which the checker knows too narrowly.
import prefixtune.backbone.devices
import prefixtune.training.config
import prefixtune.utils.console
from zoo import NUM_BYTES, make_model, make_tokenizer

# `auto` is float32 in tests, whatever this processor multiplies fast: they compare numbers.
prefixtune.backbone.devices.BFLOAT16_FEATURES = ()


# Only what names shapes: mypy checks all other types. A function that is defined inside of another would be made ready
# for its check at each call. The first calls of a test are checked: with all of them, tests take a sixth longer.
LEFT = collections.defaultdict(lambda: 8)


def check_shapes(**settings):
    def decorate(thing):
        named = re.search(r"(Float|Int|Bool|Shaped)\[", str(getattr(thing, "__annotations__", "")))
        if not named or "<locals>" in thing.__qualname__:
            return thing
        checked = jaxtyped(**settings)(thing)

        @functools.wraps(thing)
        def checked_at_first(*args, **kwargs):
            LEFT[thing] -= 1
            return (thing if LEFT[thing] < 0 else checked)(*args, **kwargs)

        return checked if isinstance(thing, type) else checked_at_first

    return decorate


jaxtyped, jaxtyping.jaxtyped = jaxtyping.jaxtyped, check_shapes
SOURCE = Path(prefixtune.__file__).parent
install_import_hook(
    [
        ".".join(("prefixtune", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in sorted(SOURCE.rglob("*.py"))
        if "jaxtyping" in path.read_text(encoding="utf-8")
    ],
    "beartype.beartype",
)

# No test cuts the power; tests/faults.py, which lets fsync fail, is a program of its own.
os.fsync = lambda descriptor: None

# Machines that are busy are slow: a time limit of each made-up input is no test. The inputs are the same each time and
# everywhere; `make fuzz` looks for others, by a seed of its own.
hypothesis.settings.register_profile("patient", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("patient")

FAMILIES = ("gpt2", "llama", "opt", "gpt_neox", "qwen3", "mistral")

ENCODER_DECODERS = ("bart", "mbart", "pegasus", "t5", "t5_gated", "m2m_100")
"""Learned positions, with norms after and before; sinusoidal ones; relative biases, also gated; unpackable rows."""
_DEEPER = {"bart": {"encoder_layers": 2, "decoder_layers": 3}, "t5": {"num_layers": 2, "num_decoder_layers": 3}}
"""In the other families' tiny models the encoder is the deeper one."""

ENCODERS = ("bert", "roberta", "distilbert", "electra", "modernbert")


def pytest_collection_finish():
    """What is imported and collected by now stays: the search for garbage leaves it out, and it is seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_runtest_teardown(item, nextitem):
    """The cases of one test share its checks."""
    if nextitem is None or nextitem.function is not item.function:
        LEFT.clear()


def pytest_make_parametrize_id(val):
    """Compressed bytes hold the time of their making, by which processes that share the tests would name them apart."""
    return "gzip" if isinstance(val, bytes) and val.startswith(b"\x1f\x8b") else None


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each of the six model families in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per byte, with <s>, </s> and <pad>; it adds none of these by itself."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def enclosing_tokenizer():
    """The same tokens, and <s> and </s> around every text."""
    return make_tokenizer(enclosing=True)


@pytest.fixture(scope="session")
def tiny_models(tiny_tokenizer):
    """A factory: `tiny_models(family, seed=0, **changes)` makes a random model with every dropout rate above zero.

    Its encoder and decoder differ in depth and head count, and a T5's heads do not multiply to the width.
    """

    def make(name, *, seed=0, **changes):
        settings = {**_DEEPER.get(name, {}), **changes}
        return make_model(name.replace("t5_gated", "t5-gated"), tiny_tokenizer, seed, **settings)

    return make


@pytest.fixture(scope="session")
def tiny_backbone(tiny_models, tiny_tokenizer, enclosing_tokenizer):
    """A factory: `tiny_backbone(family, seed=0, **changes)` makes a frozen `Backbone`."""
    from prefixtune.backbone.backbone import Backbone

    def make(name, **changes):
        tokenizer = enclosing_tokenizer if name in ENCODERS else tiny_tokenizer
        return Backbone.from_model(tiny_models(name, **changes), tokenizer, f"tiny-{name}")

    return make


@pytest.fixture
def rewrite_header():
    """A function: `rewrite_header(path, **fields)` changes a prefix file's header, as another program might."""
    from safetensors import safe_open

    from prefixtune.prefix.file import HEADER_KEY, save_verified

    def rewrite(path, **fields):
        with safe_open(path, "pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            header = json.loads(handle.metadata()[HEADER_KEY])
        save_verified(path, tensors, HEADER_KEY, {**header, **fields})
        return path

    return rewrite


@pytest.fixture
def backbone(family, tiny_backbone):
    """A tiny `Backbone` of each family in turn."""
    return tiny_backbone(family)


@pytest.fixture(scope="session", params=ENCODER_DECODERS)
def encoder_decoder(request, tiny_backbone):
    """A tiny `Backbone` of each encoder-decoder family in turn; shared, so it must be left as it is."""
    return tiny_backbone(request.param)


@pytest.fixture(scope="session", params=ENCODERS)
def encoder(request, tiny_backbone):
    """A tiny `Backbone` of each encoder family in turn; shared, so it must be left as it is."""
    return tiny_backbone(request.param)


@pytest.fixture(scope="session")
def random_prefix():
    """A factory: `random_prefix(backbone, P, seed)` makes a prefix (`random_prefixes.random_prefix`)."""
    from random_prefixes import random_prefix

    return random_prefix


@pytest.fixture(scope="session")
def random_ids():
    """A factory: `random_ids(count, seed)` gives ordinary token ids, no special ones."""

    def make(count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, NUM_BYTES, (count,), generator=generator).tolist()

    return make


@pytest.fixture(scope="session")
def assert_same():
    """`assert_same(one, other)`: equal up to `tolerance` times the largest number, for tensors or lists of them."""

    def check(one, other, *, tolerance=1e-5):
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
def shared_data():
    """The folder of public datasets beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("shared/data is not beside this checkout")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the tests of a module share."""
    return tmp_path_factory.mktemp("module")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium with a profile of its own."""
    from browser import Browser

    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def default_backbone():
    """The embedded backbone, where it is prepared."""
    from prefixtune.backbone.load import load_backbone
    from prefixtune.backbone.packaged import pretrained_folder

    if pretrained_folder("smollm2-135m") is None:
        pytest.skip("the embedded backbone is not prepared here (`prefixtune prepare`)")
    return load_backbone("smollm2-135m", dtype="float32", device="cpu")


@pytest.fixture
def data(tmp_path):
    """The data folder of a service of training, with its database (`jobs.folder.DataFolder`)."""
    from prefixtune.jobs.folder import DataFolder
    from prefixtune.jobs.queue import JobQueue

    made = DataFolder(tmp_path / "data")
    made.make()
    JobQueue(made.database_url).close()
    return made


@pytest.fixture
def queue(data):
    """The queue of jobs of `data` (`jobs.queue.JobQueue`)."""
    from prefixtune.jobs.queue import JobQueue

    made = JobQueue(data.database_url)
    yield made
    made.close()
