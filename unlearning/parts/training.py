"""Fine-tuning for methods of unlearning: the Trainer of transformers, and peft for low-rank updates."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from compress.calibration.text.records import TokenSequence, collate
from compress.engine.loading import assemble
from compress.engine.logits import last_logits
from compress.engine.weights import Weights
from compress.errors import CompressError
from compress.storage.tensors import DTYPES
from compress.system.device import train_on
from compress.unlearning.parts.losses import predicts_scored
from compress.unlearning.parts.options import rate_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

    from compress.engine.stream import StreamedModel
    from compress.method import StepContext

log = logging.getLogger(__name__)

SAVE_SECONDS = 300.0
"""Seconds between two saved states of the training, from which a killed run goes on."""

ALIKE = 16
"""Batches whose examples are sorted by length together, so that little of a batch is padding."""

Example = dict[str, TokenSequence]
"""One example: role -> sequence, such as ``{"forget": ..., "retain": ...}``."""

Batch = dict[str, dict[str, torch.Tensor]]
"""A batch: role -> ``input_ids``, ``attention_mask`` and ``labels``, int64 [B, S] each."""

Loss = Callable[[nn.Module, Batch], torch.Tensor]
"""The loss of a batch, a scalar: the mean over its examples, in float32."""


class HowToTrain(Protocol):
    """The options that training reads (see `TrainingOptions`)."""

    @property
    def train(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def max_gradient_norm(self) -> float: ...
    @property
    def gradient_checkpointing(self) -> bool: ...


def scored_logits(model: nn.Module, part: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the tokens from the first on that predicts a scored one, and the labels of these tokens.

    Prompts are not scored, so their logits are not computed.

    Args:
        model: that is trained.
        part: of a batch.

    Returns:
        [B, K, V] and int64 [B, K].
    """
    labels = part["labels"]
    scored = predicts_scored(labels).any(0).nonzero()
    kept = labels.shape[1] - (int(scored[0]) if len(scored) else 0)
    inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
    return last_logits(model, kept, **inputs), labels[:, -kept:]


def whole_model(model: StreamedModel, context: StepContext) -> PreTrainedModel:
    """The model in memory, float32, on the step's device, without dropout; nothing in it is trained yet."""
    whole = assemble(model.checkpoint, context.device, torch.float32)
    for module in whole.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "layerdrop"):  # modules that call a function with it
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return whole


def trainable(whole: PreTrainedModel, paths: Iterable[str], options: HowToTrain, seed: int) -> nn.Module:
    """Mark what is trained: all weights, or low-rank updates of some linears.

    Args:
        whole: the model.
        paths: of the linears inside each layer that low-rank updates are of, such as ``self_attn.q_proj``.
        options: ``train``, ``rank`` and ``gradient_checkpointing``.
        seed: of the low-rank updates' random start.

    Returns:
        The model itself, or peft's model around it.
    """
    whole.config.use_cache = False
    if options.gradient_checkpointing:
        whole.gradient_checkpointing_enable({"use_reentrant": False})
        whole.enable_input_require_grads()
    if options.train == "full":
        return whole.requires_grad_(True)
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    conv1d = any(isinstance(module, Conv1D) for module in whole.modules())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft has no generator of its own
        config = LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules=list(paths), fan_in_fan_out=conv1d
        )
        return get_peft_model(whole, config)


def merged(trained: nn.Module) -> PreTrainedModel:
    """The model with its low-rank updates added to the weights, if it has any."""
    merge: Callable[[], PreTrainedModel] | None = getattr(trained, "merge_and_unload", None)
    model: Any = trained if merge is None else merge()
    return model.requires_grad_(False).eval()


def train(
    model: nn.Module,
    examples: Sequence[Example],
    pad: int,
    loss: Loss,
    options: HowToTrain,
    context: StepContext,
    name: str = "training",
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Minimise a loss with AdamW (no weight decay); the learning rate falls to 0 along a line.

    The run's seed decides the order of the examples. A killed run goes on from the state that was saved last.

    Args:
        model: as `trainable` gives it. Its trained weights change in place.
        examples: each goes through the model once an epoch.
        pad: the token that fills up batches.
        loss: of a batch.
        options: see `TrainingOptions`.
        context: of the step.
        name: of the folder for saved states, and of the work in messages.
        callbacks: of transformers, for what a method does around the optimiser's steps.

    Returns:
        Metadata: number of steps and of trained parameters, the learning rate at the first step, mean losses
        of the first and the last tenth of the steps, seconds.

    Raises:
        CompressError: the loss became NaN or infinite.
    """
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    losses: list[float] = []

    def batch_of(chosen: list[Example]) -> Batch:
        return {role: collate([example[role] for example in chosen], pad) for role in chosen[0]}

    class Minimizer(Trainer):
        def compute_loss(  # type: ignore[override]
            self,
            model: nn.Module,
            inputs: Batch,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> torch.Tensor:
            found = loss(model, inputs)
            losses.append(found.item())
            if not math.isfinite(losses[-1]):
                raise CompressError(
                    f"The loss is {losses[-1]} at step {self.state.global_step + 1}; lower the learning_rate "
                    "or max_gradient_norm."
                )
            return found

        def get_train_dataloader(self) -> DataLoader[Example]:
            return DataLoader(examples, batch_sampler=order, collate_fn=batch_of)  # type: ignore[arg-type]

    config: Any = model.config
    rate = options.learning_rate or rate_for(config.hidden_size)
    folder = context.folder / name
    lengths = [sum(len(sequence.tokens) for sequence in example.values()) for example in examples]
    order = batches(lengths, options.batch_size, options.epochs, context.generator())
    steps = len(order)
    started = time.perf_counter()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,  # ``order`` holds all epochs, so that a resumed run goes on in the same order
        learning_rate=rate,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=options.max_gradient_norm,
        seed=context.seed,
        use_cpu=torch.device(context.device).type == "cpu",
        save_strategy="no",  # `_around` saves by the clock; the Trainer would also save the last step
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    train_on(context.device, arguments)
    trainer = Minimizer(
        model=model,
        args=arguments,
        train_dataset=list(examples),
        callbacks=[_around(context, name), *callbacks],
    )
    trainer.remove_callback(_printer())
    trainer.train(resume_from_checkpoint=_saved(folder, get_last_checkpoint))
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "learning_rate": rate,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "first_loss": _mean(losses[:tenth]),  # this and the seconds count from where a resumed run went on
        "last_loss": _mean(losses[-tenth:]),
        "seconds": round(time.perf_counter() - started, 1),
    }


def batches(lengths: Sequence[int], size: int, epochs: int, generator: torch.Generator) -> list[list[int]]:
    """The examples of each step, of all epochs: in a random order, and those of about one length together.

    Args:
        lengths: tokens of each example.
        size: examples in a batch; the last batch of an epoch may be smaller.
        epochs: how often every example is seen.
        generator: decides the order.
    """
    found: list[list[int]] = []
    for _ in range(epochs):
        shuffled = torch.randperm(len(lengths), generator=generator).tolist()
        ordered = [
            index
            for start in range(0, len(shuffled), ALIKE * size)
            for index in sorted(shuffled[start : start + ALIKE * size], key=lengths.__getitem__)
        ]
        cut = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        found += [cut[number] for number in torch.randperm(len(cut), generator=generator).tolist()]
    return found


def _saved(folder: Path, last: Callable[[str], str | None]) -> str | None:
    """The saved state that a run goes on from."""
    return last(str(folder)) if folder.is_dir() else None


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def _around(context: StepContext, name: str) -> TrainerCallback:
    """What happens around steps: progress is shown, and the state is saved every few minutes."""
    from transformers import TrainerCallback

    class Around(TrainerCallback):
        saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            context.progress(name, state.global_step / state.max_steps)
            if time.monotonic() - self.saved > SAVE_SECONDS and state.global_step < state.max_steps:
                control.should_save = True
                self.saved = time.monotonic()

    return Around()


@torch.no_grad()
def write_changed(trained: PreTrainedModel, model: StreamedModel, context: StepContext) -> dict[str, Any]:
    """Write the weights that differ from the checkpoint's into the draft, in the dtypes they are stored in.

    Returns:
        Metadata: ``changed_tensors``, and ``changed_weights``, the number of values that differ once they are
        stored.
    """
    weights = Weights(model.checkpoint, trained, context.device, torch.float32)
    tensors = values = 0
    for name, parameter in trained.named_parameters():
        # Some files hold a tied weight twice, and a reader that finds two different ones unties them.
        names = weights.find_all(name)
        assert names  # the model was read from there
        for stored in names:
            before = model.checkpoint.read(stored)
            after = parameter.to("cpu", DTYPES[model.checkpoint.tensors[stored].dtype])
            if differing := int((before != after).sum()):
                context.draft.write({stored: after})
                tensors, values = tensors + 1, values + differing
    return {"changed_tensors": tensors, "changed_weights": values}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
