"""A prefix inside transformers' Trainer and TRL's SFTTrainer: the same losses as our own loop, and the same care."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example
from prefixtune.data.batching import pad
from prefixtune.data.encoding import default_format, encode_examples
from prefixtune.data.tokenized import epoch_batches
from prefixtune.errors import ConfigError, DataError
from prefixtune.interop.trainer import PrefixModel
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train

# transformers renamed some of its own arguments, which TRL still sets.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")

# Targets of very unequal lengths: a mean of the batches' means is not the mean over their tokens.
EXAMPLES = [Example(f"item {n}", ("ab c " * (1 + 3 * (n % 3)) + f"{n}",)) for n in range(8)]
STEPS, RATE = 6, 1e-2


def settings(**changes):
    usual = {"prefix_length": 3, "bottleneck_size": 8, "init_text": "some words", "seed": 1}
    return TrainConfig(**{**usual, **changes})


def arguments(folder, cls=None, **changes):
    from transformers import TrainingArguments

    usual = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return (cls or TrainingArguments)(str(folder), **{**usual, **changes})


def in_order(cls):
    """A trainer that takes the data as they come."""

    class InOrder(cls):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    return InOrder


def trainer(model, folder, data, **changes):
    from transformers import Trainer

    options = {name: changes.pop(name) for name in ("eval_dataset", "callbacks") if name in changes}
    return in_order(Trainer)(
        model, arguments(folder, **changes), train_dataset=data, data_collator=model.collator(), **options
    )


def logged(run, name="loss"):
    return [row[name] for row in run.state.log_history if name in row]


def as_our_loop_takes_them(backbone, config):
    """The targets of all epochs as token ids, in the order of our own loop."""
    encoding = encode_examples(backbone, EXAMPLES, default_format(backbone), prefix_length=config.prefix_length)
    rows = []
    for epoch in range(math.ceil(STEPS * 4 / len(EXAMPLES))):
        plan = epoch_batches(encoding.examples, batch_size=2, targets_per_source=4, seed=config.seed, epoch=epoch)
        for group in (group for groups in plan for group in groups):
            (target,) = group.targets
            if backbone.kind == "decoder":
                labels = [-100] * len(group.prompt) + list(target)
                rows.append({"input_ids": [*group.prompt, *target], "labels": labels})
            else:
                rows.append({"input_ids": list(group.prompt), "labels": list(target)})
    return rows


def own_loop(backbone, config, folder):
    config = config.replace(
        output=str(folder),
        loss_reduction="token",
        warmup_steps=0,
        batch_size=2,
        gradient_accumulation=2,
        max_steps=STEPS,
        learning_rate=RATE,
    )
    return train(config, backbone=backbone, examples=EXAMPLES)


def steps_of(result, name):
    return [event[name] for event in result.events if event["event"] == "step"]


def weights_of(backbone):
    parts = (*backbone.model.named_parameters(), *backbone.model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in parts}


# --- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reparameterization"), [("llama", "scaled"), ("t5", "none")])
def test_the_losses_are_those_of_our_own_loop(name, reparameterization, tiny_backbone, tmp_path):
    backbone, config = tiny_backbone(name), settings(reparameterization=reparameterization)
    own = own_loop(backbone, config, tmp_path / "own")
    before, config_before = weights_of(backbone), backbone.model.config.to_dict()
    model = PrefixModel(backbone, config)
    start = model.prefix()
    run = trainer(model, tmp_path / "theirs", as_our_loop_takes_them(backbone, config))
    run.train()
    assert logged(run) == pytest.approx(steps_of(own, "loss"), rel=1e-5)
    assert logged(run, "learning_rate") == pytest.approx(steps_of(own, "lr"))
    assert logged(run, "grad_norm") == pytest.approx(steps_of(own, "grad_norm"), rel=1e-3)
    assert len(set(logged(run))) == STEPS
    for got, wanted in zip(model.prefix().tensors(), own.prefix.tensors(), strict=True):
        assert float((got - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())
    assert not any(torch.equal(*pair) for pair in zip(model.prefix().tensors(), start.tensors(), strict=True))
    # The backbone is as it was, to the bit, and so is what it says of itself.
    after = weights_of(backbone)
    assert all(torch.equal(after[part], tensor) for part, tensor in before.items())
    assert not backbone.model.training
    assert backbone.model.config.to_dict() == config_before


def test_the_number_of_labels_of_a_step_is_honoured(tiny_backbone):
    model = PrefixModel(tiny_backbone("llama"), settings())
    batch = model.collator()(EXAMPLES[:3])
    learned = int((batch["labels"] != -100).sum())
    alone = model(**batch).loss.detach()
    for count in (2 * learned, torch.tensor(2 * learned)):
        assert float(model(**batch, num_items_in_batch=count).loss.detach()) == pytest.approx(float(alone) / 2)
    assert model(**batch).logits is None
    logits = model.eval()(**batch).logits.detach()
    model.train()
    assert float(alone) == pytest.approx(
        float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())), rel=1e-5
    )
    assert model(batch["input_ids"], batch["attention_mask"]).get("loss") is None
    nothing = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    assert float(nothing.detach()) == 0
    nothing.backward()


def test_a_first_label_is_not_counted(tiny_backbone, tmp_path):
    """Where every token is learned, a row of n has n - 1 labels."""
    backbone = tiny_backbone("llama")
    rows = [{"input_ids": row, "labels": row} for row in ([3, 4, 5, 6, 7, 8], [5, 6], [9, 8, 7], [1, 2])]
    model = PrefixModel(backbone, settings())
    with torch.no_grad():
        batches = [model.collator()(rows[:2]), model.collator()(rows[2:])]
        wanted = sum(float(model(**batch, num_items_in_batch=1).loss) for batch in batches) / (5 + 1 + 2 + 1)
    run = trainer(model, tmp_path, rows, max_steps=1)
    if not hasattr(run, "_loss_shifts_labels"):
        pytest.skip("this transformers counts first labels too")
    run.train()
    assert logged(run) == pytest.approx([wanted], rel=1e-5)


def test_training_goes_on_from_a_checkpoint(tiny_backbone, tmp_path):
    def start():
        return PrefixModel(tiny_backbone("llama"), settings(reparameterization="mlp"))

    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(start(), tmp_path / "whole", EXAMPLES, **saving)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert set(load_file(checkpoint / "model.safetensors")) == set(whole.model.state_dict())
    resumed = trainer(start(), tmp_path / "resumed", EXAMPLES, **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed)[-3:] == logged(whole)[-3:]
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name])
    # A checkpoint is turned into a prefix without a trainer.
    other = start()
    other.load_state_dict(load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors"))
    assert other.prefix().equal(whole.model.prefix())


def test_autocast_leaves_the_prefix_in_float32(tiny_backbone):
    model = PrefixModel(tiny_backbone("llama"), settings(reparameterization="mlp"))
    made = []
    model.trained.register_forward_hook(lambda module, inputs, prefix: made.append(prefix.dtype))
    batch = model.collator()(EXAMPLES[:3])
    exact = float(model(**batch).loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert set(made) == {torch.float32}
    assert float(loss.detach()) == pytest.approx(exact, rel=0.05)
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())


# --- the collator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_the_collator_lays_examples_as_our_batches_do(name, tiny_backbone):
    model = PrefixModel(tiny_backbone(name), settings())
    backbone = model.backbone
    examples = [Example("a source", ("one", "another one")), Example("b", ("three",))]
    batch = model.collator()(examples)
    apart = name == "bart"
    encoded = encode_examples(backbone, examples, model.text_format, prefix_length=3).examples
    wanted = pad(encoded, pad_id=backbone.pad_id, decoder_start_id=backbone.decoder_start_id if apart else None)
    logits = model.eval()(**batch).logits
    ours = backbone.forward(**wanted.inputs(backbone.device) | {"prefixes": model.trained()}).logits
    learned = batch["labels"] != -100
    if not apart:
        learned, logits = learned[:, 1:], logits[:, :-1]
        batch["labels"] = batch["labels"][:, 1:]
    rows, columns = wanted.label_positions // wanted.width, wanted.label_positions % wanted.width
    assert batch["labels"][learned].tolist() == wanted.labels.tolist()
    assert float((logits[learned] - ours[rows, columns]).detach().abs().max()) < 1e-4


def test_rows_of_a_table_and_too_long_sources(tiny_backbone):
    model = PrefixModel(tiny_backbone("llama"), settings(max_length=30))
    lay = model.collator()
    one = lay([{"source": "item", "target": "ab"}, {"source": "item", "target": ["cd", "ef"]}])
    assert len(one["labels"]) == 3
    assert lay([Example("x" * 200, ("ab",))])["input_ids"].shape[1] == 30
    for row in ({"text": "a"}, {}):
        with pytest.raises(DataError):
            lay([row])
    with pytest.raises(DataError):
        lay([Example("a", ("b" * 50,))])
    strict = PrefixModel(tiny_backbone("llama"), settings(on_too_long="error")).collator()
    with pytest.raises(DataError):
        strict([Example("x" * 200, ("ab",))])
    bare = PrefixModel(tiny_backbone("llama"), settings(prompt_format="{source}")).collator()
    with pytest.raises(DataError, match="empty prompt"):
        bare([Example("", ("ab",))])


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_what_is_refused(tiny_backbone, tmp_path):
    llama = tiny_backbone("llama")
    with pytest.raises(ConfigError, match="method"):
        PrefixModel(llama, settings(method="lora"))
    with pytest.raises(ConfigError, match="encoder"):
        PrefixModel(tiny_backbone("bert"))
    with pytest.raises(ConfigError, match="prefix_dropout"):
        PrefixModel(llama, settings(prefix_dropout=0.3))
    model = PrefixModel(llama, settings())
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(ConfigError, match="position_ids"):
        model(ids, labels=ids, position_ids=torch.tensor([[0, 1, 0]]))
    with pytest.raises(DataError, match="157"):
        model(torch.zeros(1, 158, dtype=torch.long))
    with pytest.raises(ConfigError, match="labels"):
        PrefixModel(tiny_backbone("bart"), settings())(ids)
    own = tiny_backbone("llama")
    own.model.__class__ = type("OwnDecoder", (type(own.model),), {})
    with pytest.raises(ConfigError, match="without labels"):
        PrefixModel(own, settings())(ids)
    model._is_replica = True
    with pytest.raises(ConfigError, match="DataParallel"):
        model(ids)
    llama.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="weights"):
        PrefixModel(llama)


# --- SFTTrainer ------------------------------------------------------------------------------------------------------


CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }}</s>{% endgeneration %}{% else %}{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_trl_trains_it_on_the_answers_of_chats(form, tiny_models, tiny_tokenizer, tmp_path):
    import datasets
    import trl

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHATML.replace("</s>", tokenizer.eos_token)
    backbone = Backbone.from_model(tiny_models("llama"), tokenizer, "tiny-llama")
    chats = [
        [{"role": "user", "content": f"item {n}"}, {"role": "assistant", "content": "ab c " * (1 + n % 3) + str(n)}]
        for n in range(4)
    ]
    rows = (
        [{"messages": chat} for chat in chats]
        if form == "messages"
        else [{"prompt": chat[:1], "completion": chat[1:]} for chat in chats]
    )
    model = PrefixModel(backbone, settings(chat_template="model"))
    options = {"assistant_only_loss": True} if form == "messages" else {"completion_only_loss": True}
    run = in_order(trl.SFTTrainer)(
        model,
        # It recomputes layers by default.
        arguments(tmp_path, trl.SFTConfig, max_length=100, bf16=False, max_steps=1, save_strategy="steps", **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert run.args.gradient_checkpointing
    start, before = model.prefix(), weights_of(backbone)
    run.train()
    # By hand: the prefix before the first step, in front of each chat, with a loss on the answer's tokens alone.
    losses = []
    for chat in chats:
        ids, prompt = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=len(messages) == 1, return_dict=False)
            for messages in (chat, chat[:1])
        )
        logits = backbone.forward(torch.tensor([ids]), prefixes=start).logits[0].float()
        answer = torch.tensor(ids[len(prompt) :])
        losses.append(F.cross_entropy(logits[len(prompt) - 1 : -1], answer, reduction="none").detach())
    assert logged(run) == pytest.approx([float(torch.cat(losses).mean())], rel=1e-4)
    assert model.prefix().header["text_format"]["chat_template"] == "model"
    assert not any(torch.equal(*pair) for pair in zip(model.prefix().tensors(), start.tensors(), strict=True))
    after = weights_of(backbone)
    assert all(torch.equal(after[part], tensor) for part, tensor in before.items())
    assert set(load_file(tmp_path / "checkpoint-1" / "model.safetensors")) == set(model.state_dict())
    with pytest.raises(ConfigError, match="no packing"):
        model.base_model(torch.tensor([[3, 4]]), position_ids=torch.tensor([[0, 0]]))
