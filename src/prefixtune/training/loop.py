"""Loop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune import __version__
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.loss import batch_loss
from prefixtune.backbone.prefixes import make_header
from prefixtune.data import TASKS, Example
from prefixtune.data.batching import collate, epoch_batches, join
from prefixtune.data.encoding import TokenizedDataset, TokenizedExample, encode_examples
from prefixtune.data.labels import Labels, choose_labels, encode_labelled, with_label_words
from prefixtune.errors import CheckpointError, ConfigError, TrainingError
from prefixtune.prefix.artifact import check_storable, describe_tensors, save_prefix
from prefixtune.prefix.encoder import PrefixEncoder, PromptEncoder
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.baselines import Tuning, tuned_weights
from prefixtune.training.checkpoint import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    EVENTS_FILE,
    LENGTHS,
    PREFIX_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    Event,
    digest_dataset,
    events_until,
    finite_or_none,
    save_state,
    save_weights,
)
from prefixtune.training.checks import no_head
from prefixtune.training.config import TrainConfig
from prefixtune.training.distributed import SINGLE_PROCESS, ProcessGroup
from prefixtune.training.initialize import build_module, choose_sites, sample_hidden, training_format
from prefixtune.utils.files import line_writer, write_text

__all__ = ["evaluation_loss", "stop_requests"]


@torch.no_grad()
def evaluation_loss(
    backbone: Backbone,
    prefix: Prefix | None,
    examples: Sequence[TokenizedExample],
    batch_size: int = 64,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> float:
    """Mean loss per target token, in nats, over all targets of `examples`, shared among processes."""
    total, count = 0.0, 0.0
    for target_groups in epoch_batches(examples, batch_size=batch_size, targets_per_source=batch_size, seed=None):
        batch, is_own = _share(processes, backbone, target_groups)
        losses = batch_loss(backbone, prefix, batch)
        if is_own:
            total += float(losses.sum())
            count += len(batch.labels)
    total, targets = processes.all_reduce(total, count)
    return total / targets


def _share(
    processes: ProcessGroup, backbone: Backbone, target_groups: Sequence[TokenizedExample]
) -> tuple[Batch, bool]:
    """This process's part of a batch, and whether it is any.

    Where there is none, it computes something of others', which counts for nothing: with a split backbone all processes
    must go through it.
    """
    own = processes.share(target_groups)
    return collate(backbone, own or target_groups[:1]), bool(own)


def _labels(
    config: TrainConfig, backbone: Backbone, examples: Sequence[Example], dev_examples: Sequence[Example]
) -> Labels | None:
    """What a run learns to tell apart; None: it learns to generate.

    Raises:
        ConfigError: The backbone cannot do what the task is.
    """
    kind = TASKS[config.task].kind if config.task in TASKS else "generation"
    if kind != "generation":
        return choose_labels(kind, backbone, examples, dev_examples, by=config.classifier, words=config.words_by_label)
    if backbone.kind == "encoder":
        raise ConfigError(
            f"{backbone.name!r} is an encoder, which reads text and writes none, but task {config.task!r} generates.",
            hint="use --task classification or tagging, or choose a model that generates.",
        )
    return None


@dataclass(eq=False)
class PendingStep:
    """An optimizer step whose losses are to be computed.

    Attributes:
        began: When, in seconds.
        batches: Of the step, one after the other.
        weights: Each label's weight in the loss, per batch.
        live: The prefix, as the module makes it; None: the model's own weights train.
        leaf: The same numbers, at which the gradients gather.
        num_targets: Targets of the step.
        tokens: Labels of the step.
        loss: The step's, once it is computed.
    """

    began: float
    batches: Sequence[Batch]
    weights: Sequence[Tensor]
    live: Prefix | None
    leaf: Prefix | None
    num_targets: int
    tokens: int
    loss: float = 0.0


def forward_backward(backbone: Backbone, pendings: Sequence[PendingStep]) -> None:
    """Losses and gradients of the steps of one or several runs, each batch together with those of the others."""
    for number in range(max(len(pending.batches) for pending in pendings)):
        those = [pending for pending in pendings if number < len(pending.batches)]
        batches = [pending.batches[number] for pending in those]
        if len(those) == 1:
            losses = batch_loss(backbone, those[0].leaf, batches[0])
        else:
            losses = batch_loss(backbone, [pending.leaf for pending in those], join(batches))
        weights = [pending.weights[number].to(losses.device) for pending in those]
        weighted = losses * torch.cat(weights)
        weighted.sum().backward()
        for pending, part in zip(those, weighted.detach().split([len(each) for each in weights]), strict=True):
            pending.loss += float(part.sum())


class TrainLoop:
    """The mutable state of one run: module, optimizer, and where it stands."""

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        examples: Sequence[Example],
        dev_examples: Sequence[Example],
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.config, self.backbone, self.folder, self.processes = config, backbone, Path(config.output), processes
        self.labels = _labels(config, backbone, examples, dev_examples)
        by_head = self.labels is not None and self.labels.by == "head"
        self.format = training_format(config, backbone, for_head=by_head)
        self.data = self._encode(examples)
        self.dev = self._encode(dev_examples) if dev_examples else None
        self.format = dataclasses.replace(
            self.format,
            longest_target=self.data.longest_target,
            longest_prompt=max(data.longest_prompt for data in (self.data, self.dev) if data is not None),
        )
        self.data_digest = digest_dataset(self.data, self.dev)
        num_labels = len(self.labels.names) if by_head and self.labels is not None else 0
        self.module: PrefixEncoder | PromptEncoder | None = None
        self.initialization: dict[str, Any] = {"kind": "backbone"}
        if config.trains_prefix:
            self.module, self.initialization = build_module(config, backbone, num_labels=num_labels)
            if self.module.head is not None:
                self.module.head.standardize(sample_hidden(backbone, self.module.bake(), self.data.examples))
        elif num_labels:
            raise no_head(config)
        # The model's own weights that train: a LoRA adapter's, or what another method trains; empty otherwise.
        self.adapter = backbone.adapter_parameters
        self.trained = [*(() if self.module is None else self.module.parameters()), *self.adapter.values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.peak_learning_rate, weight_decay=config.weight_decay)
        self.steps_per_epoch = math.ceil(sum(1 for _ in self._plan(epoch=0)) / config.gradient_accumulation)
        self.total_steps = self._planned(config.max_steps, config.epochs)
        self.extended_from: int | None = None
        self.step, self.best_loss, self.best_step, self.evals_without_improvement = 0, math.nan, 0, 0
        start = self.bake()
        # Not after the work.
        check_storable({**self._header(backbone, start), **({} if start is None else describe_tensors(start))})

    def _planned(self, max_steps: int, epochs: float) -> int:
        """The steps that a configuration plans."""
        return max_steps or max(1, round(epochs * self.steps_per_epoch))

    def _encode(self, examples: Sequence[Example]) -> TokenizedDataset:
        room: dict[str, Any] = {
            "prefix_length": (
                choose_sites(self.config, self.backbone).get("decoder", 0) if self.config.trains_prefix else 0
            ),
            "max_length": self.config.max_length,
            "on_too_long": self.config.on_too_long,
        }
        if self.labels is None:
            return encode_examples(self.backbone, examples, self.format, **room)
        if self.labels.by == "head":
            return encode_labelled(self.backbone, examples, self.labels, self.format, **room)
        return encode_examples(self.backbone, with_label_words(examples, self.labels), self.format, **room)

    def bake(self) -> Prefix | None:
        """The prefix as it is now; None: the method has none."""
        if self.module is None:
            return None
        made = self.module.bake()
        return Prefix(made.layers, self._placement, made.head)

    @property
    def _placement(self) -> dict[str, Any]:
        return {"placement": "infix"} if self.config.method == "infix" else {}

    # The order of the data is a function of the seed and the step: nothing has to be stored to find one's place.

    def _plan(self, epoch: int) -> Iterator[list[TokenizedExample]]:
        return epoch_batches(
            self.data.examples,
            batch_size=self.config.batch_size,
            targets_per_source=self.config.targets_per_source,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _batches(self) -> Iterator[list[tuple[Batch, bool]]]:
        """This process's part of the batches of every optimizer step still to come, and whether it is any."""
        step = 0
        for epoch in range(self.total_steps):
            chosen: list[list[TokenizedExample]] = []
            plan = list(self._plan(epoch))
            for number, target_groups in enumerate(plan):
                chosen.append(target_groups)
                if len(chosen) == self.config.gradient_accumulation or number == len(plan) - 1:
                    step += 1
                    if step > self.step:
                        yield [_share(self.processes, self.backbone, target_groups) for target_groups in chosen]
                    if step == self.total_steps:
                        return
                    chosen = []

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero; `step` counts from 1."""
        warmup = min(self.config.warmup_steps, self.total_steps // 2)
        if step <= warmup:
            return self.config.peak_learning_rate * step / warmup
        return self.config.peak_learning_rate * (self.total_steps - step + 1) / (self.total_steps - warmup)

    def events(self, stopping: threading.Event, *, fresh: bool) -> Iterator[Event]:
        """Run to the end, saving on the way."""
        with contextlib.closing(self.steps(stopping, fresh=fresh)) as steps:
            for told in steps:
                if isinstance(told, PendingStep):
                    forward_backward(self.backbone, [told])
                else:
                    yield told
        if stopping.is_set():
            raise KeyboardInterrupt("the state is saved")

    def steps(self, stopping: threading.Event, *, fresh: bool) -> Generator[Event | PendingStep]:
        """Everything that happens, and before each optimizer step what is to be computed for it, by whoever asks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if fresh and self.processes.is_main:
            write_text(self.folder / CONFIG_FILE, self.config.to_toml())
            write_text(self.folder / EVENTS_FILE, "")
            # From the very start on, a kill can be resumed from.
            self.save()
        with line_writer(self.folder / EVENTS_FILE) as log:
            for told in self._steps(stopping, fresh):
                if self.processes.is_main and not isinstance(told, PendingStep):
                    log(json.dumps(told))
                yield told

    def _steps(self, stopping: threading.Event, fresh: bool) -> Iterator[Event | PendingStep]:
        yield self._start_event() if fresh else {"event": "resume", "step": self.step, "total_steps": self.total_steps}
        if self.extended_from is not None:
            extended = {"step": self.step, "total_steps": self.total_steps, "planned": self.extended_from}
            yield {"event": "extend", **extended}
        every = self.config.eval_every
        for batches in () if self.ended else self._batches():
            pending = self._begin(batches)
            yield pending
            # One signal to one process stops all, after the same step.
            pending.loss, asked = self.processes.all_reduce(pending.loss, float(stopping.is_set()))
            if asked:
                stopping.set()
            yield self._optimize(pending)
            if self.step == self.total_steps or (every and self.step % every == 0):
                yield self._evaluate()
            leaving = self.ended or stopping.is_set()
            if leaving or self.step % self.config.save_every == 0:
                self.save()
                yield {"event": "save", "step": self.step}
            if leaving:
                break
        if self.ended:
            yield {
                "event": "end",
                "step": self.step,
                "best_loss": finite_or_none(self.best_loss),
                "best_step": self.best_step,
            }

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or the patience is."""
        return self.step >= self.total_steps or 0 < self.config.patience <= self.evals_without_improvement

    def _start_event(self) -> Event:
        return {
            "event": "start",
            "total_steps": self.total_steps,
            "num_sources": len(self.data.examples),
            "num_targets": self.data.num_targets,
            "num_cut": self.data.num_truncated,
            "num_trained": sum(parameter.numel() for parameter in self.trained),
            "num_stored": sum(tensor.numel() for tensor in self._stored()),
            "initialization": self.initialization,
            "backbone": self.backbone.name,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "device": str(self.backbone.device),
        }

    def _stored(self) -> list[Tensor]:
        """What the artifact holds."""
        prefix = self.bake()
        return list(self.adapter.values()) if prefix is None else prefix.stored_tensors()

    def _begin(self, shares: Sequence[tuple[Batch, bool]]) -> PendingStep:
        """Prepare an optimizer step."""
        began = time.perf_counter()
        own = [batch for batch, is_own in shares if is_own]
        counts = sum(batch.num_targets for batch in own), sum(len(batch.labels) for batch in own)
        num_targets, tokens = map(int, self.processes.all_reduce(*map(float, counts)))
        self.optimizer.zero_grad(set_to_none=True)
        # The reparameterization runs once: rows' gradients gather at the prefix, then flow back through it together.
        live: Prefix | None = None if self.module is None else self.module()
        leaf = None if live is None else Prefix(live.leaves().layers, self._placement, live.head)
        weights = [
            batch.weights(self.config.loss_reduction, num_targets, tokens) * float(is_own) for batch, is_own in shares
        ]
        return PendingStep(began, [batch for batch, _ in shares], weights, live, leaf, num_targets, tokens)

    def _optimize(self, pending: PendingStep) -> Event:
        """Take the optimizer step whose losses are computed.

        Raises:
            TrainingError: Loss or gradient is not finite; nothing was moved.
        """
        live, leaf, loss = pending.live, pending.leaf, pending.loss
        # What other processes add: at the prefix, not at its reparameterization, which each runs by itself.
        head = None if self.module is None else self.module.head
        met = [*(() if leaf is None else leaf.tensors()), *self.adapter.values()]
        self.processes.all_reduce_gradients([*met, *(() if head is None else head.parameters())])
        if live is not None and leaf is not None:
            torch.autograd.backward(live.tensors(), [tensor.grad for tensor in leaf.tensors()])
        limit = self.config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {loss} and the gradient's norm {norm} at step {self.step + 1}; the state of the last "
                f"good save is kept in {str(self.folder)!r}.",
                hint="start anew in another --output with a lower learning rate "
                f"(now {self.config.peak_learning_rate:g}), or with --dtype float32.",
            )
        rate = self.learning_rate(self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        by_token = pending.num_targets / pending.tokens if self.config.loss_reduction == "sentence" else 1.0
        return {
            "event": "step",
            "step": self.step,
            "loss": loss,
            "loss_per_token": loss * by_token,
            "lr": rate,
            "grad_norm": norm,
            "target_tokens": pending.tokens,
            "seconds": round(time.perf_counter() - pending.began, 4),
        }

    def _evaluate(self) -> Event:
        """Development loss; the best prefix so far becomes the artifact. Without a development file: the latest."""
        prefix = self.bake()
        event: Event = {"event": "evaluation", "step": self.step}
        better = True
        if self.dev is not None:
            loss = evaluation_loss(self.backbone, prefix, self.dev.examples, self.config.batch_size, self.processes)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the development loss is {loss} at step {self.step}; the best prefix so far is kept.",
                    hint="look for a broken development example, or use --dtype float32.",
                )
            better = math.isnan(self.best_loss) or loss < self.best_loss
            event["loss"] = loss
            self.best_loss = loss if better else self.best_loss
            self.evals_without_improvement = 0 if better else self.evals_without_improvement + 1
        if better:
            self.best_step = self.step
            self._save_artifact(prefix)
        return {**event, "best_loss": finite_or_none(self.best_loss), "best_step": self.best_step}

    def _save_artifact(self, prefix: Prefix | None) -> None:
        if not self.processes.is_main:
            return
        config, backbone = self.config, self.backbone
        if self.adapter and prefix is not None:
            backbone = backbone.save_adapter(self.folder / ADAPTER_FOLDER)
        header = self._header(backbone, prefix)
        dtype = torch.float32 if config.save_dtype == "float32" else torch.bfloat16
        if prefix is None:
            size = Tuning(config.method, config.method_size).size
            weights = {name: tensor.to(dtype) for name, tensor in tuned_weights(self.backbone).items()}
            save_weights(self.folder / WEIGHTS_FILE, weights, {**header, "method_size": size})
            return
        save_prefix(self.folder / PREFIX_FILE, Prefix(prefix.layers, header, prefix.head), dtype=dtype)

    def _header(self, backbone: Backbone, prefix: Prefix | None) -> dict[str, Any]:
        """What the artifact says of this run."""
        config = self.config
        return make_header(
            backbone,
            task=config.task,
            method=config.method,
            **self._placement,
            text_format=self.format.to_dict(),
            **({} if self.labels is None else {"labels": self.labels.to_dict()}),
            initialization=self.initialization,
            training={
                "steps": self.step,
                "total_steps": self.total_steps,
                "dev_loss": finite_or_none(self.best_loss),
                "num_targets": self.data.num_targets,
                "backbone_dtype": str(self.backbone.dtype).removeprefix("torch."),
                **{
                    name: getattr(config, name)
                    for name in ("reparameterization", "bottleneck_size", "batch_size", "loss_reduction", "seed")
                },
                "learning_rate": config.peak_learning_rate,
            },
            **(
                {"adapter": ADAPTER_FOLDER if self.adapter else config.adapter}
                if config.adapter or (self.adapter and prefix is not None)
                else {}
            ),
            license=config.license,
            made_with={"prefixtune": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    def save(self) -> None:
        """Write the resumable state."""
        if not self.processes.is_main:
            return
        tensors = {} if self.module is None else {f"module.{n}": t for n, t in self.module.state_dict().items()}
        tensors |= {f"adapter.{name}": parameter for name, parameter in self.adapter.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in values.items()})
        save_state(
            self.folder / STATE_FILE,
            tensors,
            {
                "step": self.step,
                "best_loss": finite_or_none(self.best_loss),
                "best_step": self.best_step,
                "misses": self.evals_without_improvement,
                "fingerprint": self.backbone.fingerprint,
                "dtype": str(self.backbone.dtype).removeprefix("torch."),
                "data": self.data_digest,
                "config": self.config.to_dict(),
            },
        )

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> list[Event]:
        """Go on from a state, and cut the log back to it; returns the events up to it.

        Args:
            tensors: As `read_state` gives them.
            facts: Likewise.

        Raises:
            CheckpointError: The state does not fit the run, or the log is damaged.
            ConfigError: The state belongs to another backbone or other data.
        """
        if not fingerprints_match(facts["fingerprint"], self.backbone.fingerprint):
            raise ConfigError(
                f"the run in {str(self.folder)!r} was started on another backbone.", hint="load that one."
            )
        dtype = str(self.backbone.dtype).removeprefix("torch.")
        if facts["dtype"] != dtype:
            raise ConfigError(
                f"the run in {str(self.folder)!r} was started in {facts['dtype']}, but the backbone is in {dtype}.",
                hint=f"resume with --dtype {facts['dtype']}.",
            )
        if facts["data"] != self.data_digest:
            raise ConfigError(
                f"the run in {str(self.folder)!r} was started on other data.",
                hint="give it the same files, or start anew in another --output.",
            )
        try:
            self._load(tensors)
        except (RuntimeError, LookupError, ValueError) as error:
            raise CheckpointError(
                f"the state in {str(self.folder)!r} does not fit the run: {str(error).splitlines()[0]}",
                hint="start anew in another --output.",
            ) from error
        self.step, self.evals_without_improvement, self.best_step = facts["step"], facts["misses"], facts["best_step"]
        self.best_loss = math.nan if facts["best_loss"] is None else facts["best_loss"]
        relengthened = self._extend(facts["config"])
        kept = events_until(self.folder / EVENTS_FILE, self.step)
        # All have read it before the first process changes anything.
        self.processes.barrier()
        if self.processes.is_main:
            write_text(self.folder / EVENTS_FILE, "".join(json.dumps(event) + "\n" for event in kept))
            if relengthened:
                # What is resumed without options goes on as far as this run.
                write_text(self.folder / CONFIG_FILE, self.config.to_toml())
        return kept

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the parameters and the optimizer's moments from a state."""
        if self.module is not None:
            self.module.load_state_dict(
                {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
            )
        with torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.copy_(tensors[f"adapter.{name}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                slots.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})

    def _extend(self, stored: Mapping[str, Any]) -> bool:
        """Whether the run is to end otherwise than was planned, and that it can.

        Raises:
            ConfigError: All of the steps asked for are taken, or the patience is.
        """
        config = self.config
        if all(stored[name] == getattr(config, name) for name in LENGTHS):
            return False
        planned = self._planned(stored["max_steps"], stored["epochs"])
        if self.total_steps != planned and self.total_steps <= self.step:
            raise ConfigError(
                f"{self.total_steps} steps are asked for, but the run in {str(self.folder)!r} has taken {self.step}.",
                hint=f"give more, as in --max-steps {2 * self.step}.",
            )
        waited = self.evals_without_improvement
        if self.total_steps > planned and 0 < config.patience <= waited:
            raise ConfigError(
                f"the run in {str(self.folder)!r} stopped at step {self.step}, as {waited} evaluations brought no "
                "better loss; more steps alone do not make it go on.",
                hint=f"give more patience, too, as in --patience {2 * waited}, or 0 for any number.",
            )
        self.extended_from = None if planned == self.total_steps else planned
        return True


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """While the block runs, the first Ctrl-C or SIGTERM asks to stop after the step; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
