"""The training loop: prepare a step, run it forward and backward, apply the gradients, evaluate, save.

One loop trains a prefix and the methods that it is compared with: the same data, order, loss and schedule. In a step
the encoder yields the prefix once, packed rows go through the frozen backbone with the prefix in front, logits are
computed where there is a label, and AdamW moves the encoder's parameters. Everything is a function of the
configuration and the step's index, so that a resumed run continues exactly.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.batch import Batch
from prefixtune.backbone.devices import is_quantized
from prefixtune.backbone.loss import batch_loss
from prefixtune.data.batching import join
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import TrainingError
from prefixtune.prefix.encoder import PrefixEncoder
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.header import check_storable
from prefixtune.prefix.prefix import Prefix, describe_tensors
from prefixtune.training.artifact import make_run_header, save_artifact
from prefixtune.training.beside import Beside, check_beside
from prefixtune.training.checkpoint import Checkpoint, Facts, check_same_run, load_tensors, save_state, state_tensors
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.training.distributed import SINGLE_PROCESS, ProcessGroup
from prefixtune.training.run_folder import EARLIER_STATE_FILE, STATE_FILE, Event
from prefixtune.training.schedule import TrainState, count_steps, learning_rate, optimizer_steps, variation_facts, vary
from prefixtune.training.score import MOST_POSITIONS, divided, evaluation_loss, local_batch
from prefixtune.training.silence import general_of_step


@dataclass(eq=False)
class PendingStep:
    """An optimizer step, prepared for `forward_backward`.

    Attributes:
        started: When, in seconds.
        batches: Those of the step, one after the other.
        weights: What a label of each batch counts in the loss.
        prefix: As the encoder yields it; None: the model's own weights train.
        prefix_leaf: The same numbers as leaves, at which the gradients gather.
        num_targets: Targets of the step, in all processes.
        num_tokens: Labels of the step, in all processes.
        beside: What stands beside the prefix in some samples; None: nothing.
        scale: What gradients are computed larger by, so that none is too small for float16; `apply` divides by it.
        losses: Of this process's batches, where they were computed: nothing waits for them until `apply`.
    """

    started: float
    batches: Sequence[Batch]
    weights: Sequence[float]
    prefix: Prefix | None
    prefix_leaf: Prefix | None
    num_targets: int
    num_tokens: int
    beside: Beside | None = None
    scale: float = 1.0
    losses: list[Tensor] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The loss of this process's part."""
        return float(sum(torch.stack(self.losses).tolist())) if self.losses else 0.0

    def prefixes(self, index: int) -> list[Prefix | None]:
        """What is in front of the rows of a batch: one prefix, or as many as its packing counts through."""
        leaf, fronts = self.prefix_leaf, self.batches[index].fronts
        if leaf is None:
            return [None]
        return [leaf[: front.length] if self.beside is None else self.beside.join(front, leaf) for front in fronts]

    @property
    def size(self) -> int:
        """Positions of the largest batch, with what the others in front of it count for."""
        counts = (0 if self.beside is None else sum(map(self.beside.size, batch.fronts)) for batch in self.batches)
        return max(batch.input_ids.numel() + count for batch, count in zip(self.batches, counts, strict=True))


def forward_backward(backbone: Backbone, steps: Sequence[PendingStep]) -> None:
    """Losses and gradients of one step of each of several runs; their batches go through the backbone together."""
    for index in range(max(len(step.batches) for step in steps)):
        active = [step for step in steps if index < len(step.batches)]
        batches = [step.batches[index] for step in active]
        prefixes = [prefix for step in active for prefix in step.prefixes(index)]
        batch = batches[0] if len(active) == 1 else join(batches)
        losses = batch_loss(backbone, prefixes[0] if len(prefixes) == 1 else prefixes, batch)
        parts = losses.split([len(batch.labels) for batch in batches])
        sums = [part.sum() * step.weights[index] for step, part in zip(active, parts, strict=True)]
        torch.stack([part * step.scale for step, part in zip(active, sums, strict=True)]).sum().backward()
        for step, part in zip(active, sums, strict=True):
            step.losses.append(part.detach())


class TrainLoop:
    """One run: what it trains, its optimizer, and how far it is.

    Args:
        config: The run.
        backbone: The frozen model, or one whose own weights train.
        data: Tokenized.
        encoder: The trainable prefix; None: the backbone's own weights train.
        initialization: Where the encoder starts, for the header and the log.
        processes: Those that share the work.

    Attributes:
        most_positions: Tokens that a process computes at once: a larger batch is computed in parts, whose gradients
            add up to those of the whole; 0: any number. It may be set before the first step.
        keeps_earlier: Keep the state before the last one, too: runs that see each other resume at one step.

    Raises:
        CheckpointError: The header of the artifact would be too long; checked before the work, not after it.
    """

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        data: TrainData,
        encoder: PrefixEncoder | None,
        initialization: Mapping[str, Any],
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.config, self.backbone, self.data, self.encoder = config, backbone, data, encoder
        self.initialization, self.processes = initialization, processes
        # Of another method, the model's own parameters that train.
        self.weights = {} if config.trains_prefix else backbone.adapter_parameters
        self.trained = [*(() if encoder is None else encoder.parameters()), *self.weights.values()]
        # One pass over the parameters, where torch's default takes ten; on a GPU it has a quick way of its own.
        fused = all(parameter.device.type == "cpu" for parameter in self.trained) or None
        rate = config.peak_learning_rate
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=config.weight_decay, fused=fused)
        self.steps_per_epoch = count_steps(config, data.train.examples)
        total_steps = config.max_steps or max(int(config.epochs > 0), round(config.epochs * self.steps_per_epoch))
        self.state = TrainState(total_steps, config.patience)
        self.resumed = self.stopped = False
        self.most_positions, self.keeps_earlier = MOST_POSITIONS, False
        self.beside: Beside | None = None
        self.leaf: Prefix | None = None
        start = self.bake()
        self.site_lengths = {} if start is None else start.lengths
        check_storable({**self._header(), **({} if start is None else describe_tensors(start))})

    def _header(self) -> dict[str, Any]:
        return make_run_header(self.config, self.backbone, self.data, self.initialization, self.state)

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or the patience is used up."""
        return self.state.is_over

    def bake(self) -> Prefix | None:
        """The prefix as it is now; None: the method has none."""
        return None if self.encoder is None else self.encoder.bake()

    def snapshot(self) -> Prefix | None:
        """The prefix as it is now, with the header of an artifact; None: the method has none."""
        prefix = self.bake()
        return None if prefix is None else Prefix(prefix.layers, self._header(), prefix.head)

    # --- the run, from the top down ----------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> Iterator[Event]:
        """Train to the end, or until `stop` is set; every event as it happens.

        Raises:
            TrainingError: A loss or a gradient is not finite; the last good state is kept.
        """
        yield self.first_event()
        for batches in self.remaining_steps():
            step = self.prepare(batches)
            forward_backward(self.backbone, [step])
            yield self.apply(step, stop)
            yield from self.evaluate_and_save(stop)
        yield from self.last_events()

    def first_event(self) -> Event:
        """What happens before the first step."""
        step, total_steps, data = self.state.step, self.state.total_steps, self.data
        if self.resumed:
            return {"event": "resume", "step": step, "total_steps": total_steps}
        prefix = self.bake()
        stored = list(self.weights.values()) if prefix is None else prefix.stored_tensors()
        return {
            "event": "start",
            "total_steps": total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "num_sources": data.train.num_sources,
            "num_targets": data.train.num_targets,
            "num_cut": data.train.num_truncated,
            "num_dropped_turns": data.train.num_dropped_turns,
            "num_dev_targets": 0 if data.dev is None else data.dev.num_targets,
            "num_trained": sum(parameter.numel() for parameter in self.trained),
            "num_stored": sum(tensor.numel() for tensor in stored),
            "initialization": self.initialization,
            "prefix_length": 0 if prefix is None else prefix.prefix_length,
            **variation_facts(self.config, 0 if self.beside is None else len(self.beside.others)),
            "backbone": self.backbone.name,
            "dtype": self.backbone.dtype_name,
            "device": str(self.backbone.device),
        }

    def remaining_steps(self) -> Iterator[list[tuple[Batch, bool]]]:
        """This process's part of the batches of each optimizer step to come, and whether it counts.

        The order of the data, and what varies from step to step, is a function of the seed and the step alone, so that
        a resumed run finds its place, and the number of processes changes nothing.
        """
        index, steps_taken = 0, self.state.step
        examples = self.data.train.examples
        for epoch in range(self.state.total_steps):
            for batches in optimizer_steps(self.config, examples, epoch):
                if self.ended or self.stopped:
                    return
                index += 1
                if index > steps_taken:
                    batches = [*batches[:-1], [*batches[-1], *self._general(batches, index)]]
                    varied = self._vary(batches, index)
                    options = {} if self.beside is None else {"front_size": self.beside.size}
                    parts = divided(self.backbone, varied, self.most_positions * self.processes.size, **options)
                    yield [local_batch(self.backbone, part, self.processes) for part in parts]

    def _general(self, batches: Sequence[Sequence[TokenizedExample]], step: int) -> list[TokenizedExample]:
        """The requests about other things of a step."""
        targets = sum(example.num_targets for batch in batches for example in batch)
        return general_of_step(self.data.general, self.config.keep_general, targets, self.config.seed, step)

    def _vary(self, batches: Sequence[Sequence[TokenizedExample]], step: int) -> list[list[TokenizedExample]]:
        """The batches of a step, with what each group has in front, and what it sees of it."""
        # Padded rows, and those with a head, have one prefix in front.
        one_front = not self.backbone.layout.packable or self.data.has_head
        varied = vary(self.config, step, batches, self.site_lengths, one_length=one_front)
        if self.beside is None:
            return varied
        site: Site = "decoder" if self.backbone.kind == "decoder" else "encoder"
        length, sample = self.site_lengths.get(site, 0), 0
        for groups in varied:
            for index, group in enumerate(groups):
                groups[index] = group.beside(self.beside.draw(self.config, step, sample, group.front.company), length)
                sample += not one_front
            sample += one_front
            # What is in front of several is computed once for those that follow one another.
            groups.sort(key=lambda group: group.front.company)
        return varied

    def prepare(self, batches: Sequence[tuple[Batch, bool]]) -> PendingStep:
        """Prepare an optimizer step: the prefix once for all of its batches, and what labels count in the loss."""
        started = time.perf_counter()
        own = [batch for batch, counts in batches if counts]
        sums = sum(batch.num_targets for batch in own), sum(len(batch.labels) for batch in own)
        num_targets, num_tokens = map(int, self.processes.all_reduce(*map(float, sums)))
        self.optimizer.zero_grad(set_to_none=True)
        # Every row's gradient gathers at the leaf; then it flows back through the encoder once.
        prefix = None if self.encoder is None else self.encoder()
        self.leaf = None if prefix is None else prefix.leaves()
        total = num_targets if self.config.loss_reduction == "sentence" else num_tokens
        # In float16, a power of two that brings the weights near 1.
        scale = 2.0 ** math.floor(math.log2(total)) if self.backbone.dtype == torch.float16 else 1.0
        return PendingStep(
            started,
            [batch for batch, _ in batches],
            [counts / total for _, counts in batches],
            prefix,
            self.leaf,
            num_targets,
            num_tokens,
            self.beside,
            scale,
        )

    def apply(self, step: PendingStep, stop: threading.Event) -> Event:
        """Move the parameters by the gradients of a step.

        Args:
            step: After `forward_backward`.
            stop: When it is set in one process, all of them stop after this step.

        Raises:
            TrainingError: Loss or gradient is not finite; no parameter was moved.
        """
        self.leaf = None
        loss, stops = self.processes.all_reduce(step.loss, float(stop.is_set()))
        if stops:
            self.stopped = True
            stop.set()
        norm = self._backward_through_encoder(step)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"the loss is {loss} and the gradient's norm {norm} at step {self.state.step + 1}; the state of "
                f"the last good save is kept in {str(Path(self.config.output))!r}.",
                hint="start again in another --output with a lower learning rate "
                f"(now {self.config.peak_learning_rate:g}), or with --dtype float32.",
            )
        rate = learning_rate(self.config, self.state.step + 1, self.state.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.state.step += 1
        per_token = step.num_targets / step.num_tokens if self.config.loss_reduction == "sentence" else 1.0
        return {
            "event": "step",
            "step": self.state.step,
            "loss": loss,
            "loss_per_token": loss * per_token,
            "lr": rate,
            "grad_norm": norm,
            "target_tokens": step.num_tokens,
            "seconds": round(time.perf_counter() - step.started, 4),
        }

    def _backward_through_encoder(self, step: PendingStep) -> float:
        """Sum the gradients over the processes, take them through the encoder, and clip them; returns their norm."""
        # Summed at the prefix: the backward pass through the encoder is the same in every process.
        leaves = [] if step.prefix_leaf is None else step.prefix_leaf.stored_tensors()
        for tensor in [*leaves, *self.weights.values()] if step.scale != 1 else ():
            if tensor.grad is not None:
                tensor.grad /= step.scale
        self.processes.all_reduce_gradients([*leaves, *self.weights.values()])
        if step.prefix is not None:
            torch.autograd.backward(step.prefix.stored_tensors(), [leaf.grad for leaf in leaves])
        return float(torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm or math.inf))

    def evaluate_and_save(self, stop: threading.Event) -> Iterator[Event]:
        """After a step: evaluate and save if it is time, or if the run stops here.

        Args:
            stop: A run of one process also stops here, at this step; several processes agree on it in `apply`.
        """
        step, every = self.state.step, self.config.eval_every
        if step == self.state.total_steps or (every and step % every == 0):
            yield self.evaluate()
        if self.processes.size == 1 and stop.is_set():
            self.stopped = True
        if self.ended or self.stopped or step % self.config.save_every == 0:
            self.save()
            yield {"event": "save", "step": step}

    def evaluate(self) -> Event:
        """Compute the development loss; the best prefix so far becomes the artifact (without such data, the latest).

        Raises:
            TrainingError: The development loss is not finite.
        """
        prefix, state, data = self.bake(), self.state, self.data
        event: Event = {"event": "evaluation", "step": state.step}
        loss = math.nan
        if data.dev is not None:
            examples, size = data.dev.examples, self.config.batch_size
            loss = evaluation_loss(self.backbone, prefix, examples, size, self.processes, self.most_positions)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the development loss is {loss} at step {state.step}; the best prefix so far is kept.",
                    hint="look for a broken development example, or use --dtype float32.",
                )
            event["loss"] = loss
        if state.observe(loss) and self.processes.is_main:
            save_artifact(self.config, self.backbone, prefix, self._header())
        return {**event, **state.best()}

    def last_events(self) -> Iterator[Event]:
        """What happens after the last step; nothing if the run was stopped before it."""
        if not self.state.total_steps:
            # The start is the result.
            yield self.evaluate()
        if self.ended:
            yield {"event": "end", "step": self.state.step, **self.state.best()}

    # --- beside others -----------------------------------------------------------------------------------------------

    def stand_beside(self, beside: Beside) -> None:
        """Let other prefixes stand beside this one in some of the samples.

        Raises:
            ConfigError: They do not fit.
        """
        rows = (*self.data.train.examples, *self.data.general)
        check_beside(self.config, self.backbone, self.site_lengths, beside.lengths, rows)
        self.beside = beside

    def current_prefix(self) -> Prefix:
        """The prefix as it is now, in float32 on its device, for another run; in a step, where its gradients gather."""
        assert self.encoder is not None, "only prefixes stand beside each other"
        if self.leaf is not None:
            return self.leaf
        with torch.no_grad():
            prefix: Prefix = self.encoder()
        return prefix

    @property
    def data_digest(self) -> str:
        """Tells what the run learns from, and what stands beside it, from any other."""
        return self.data.digest if self.beside is None else f"{self.data.digest}+{self.beside.digest}"

    # --- stopping and resuming ---------------------------------------------------------------------------------------

    def _named_tensors(self) -> dict[str, Tensor]:
        """What trains, by its name in a state."""
        encoder = {} if self.encoder is None else self.encoder.state_dict()
        own = {f"module.{name}": tensor for name, tensor in encoder.items()}
        return own | {f"adapter.{name}": parameter for name, parameter in self.weights.items()}

    def save(self) -> None:
        """Store the state to resume from."""
        if not self.processes.is_main:
            return
        path = Path(self.config.output) / STATE_FILE
        if self.keeps_earlier and path.exists():
            os.replace(path, path.with_name(EARLIER_STATE_FILE))
        facts = Facts(
            step=self.state.step,
            misses=self.state.misses,
            **self.state.best(),
            fingerprint=self.backbone.fingerprint,
            dtype=self.backbone.dtype_name,
            quantized=is_quantized(self.backbone.model),
            data=self.data_digest,
            config=self.config.to_dict(),
            initialization=dict(self.initialization),
        )
        save_state(path, state_tensors(self._named_tensors(), self.optimizer), facts.model_dump())

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a stored state.

        Raises:
            CheckpointError: The state does not fit the run.
            ConfigError: The state belongs to another backbone or other data.
        """
        check_same_run(checkpoint, self.backbone, self.data_digest)
        load_tensors(checkpoint, self._named_tensors(), self.optimizer)
        self.state = checkpoint.state(self.state)
        self.resumed = True
