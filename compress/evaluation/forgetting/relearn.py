"""Relearning: whether a few updates on adjacent text bring back what was forgotten.

Low-rank updates (peft) are trained on the retained records with the Trainer of transformers. What a model
never learned, it cannot learn from them; what it only hides often returns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.calibration.text.records import TokenSequence, collate
from compress.engine.loading import assemble
from compress.engine.opening import open_checkpoint
from compress.errors import CompressError
from compress.system.device import train_on
from compress.system.progress import Progress

RANK, LEARNING_RATE, BATCH = 16, 2e-4, 8
"""The updates of relearning: rank, learning rate at the first step, and records in a step."""


def relearn(
    folder: Path,
    text: Sequence[TokenSequence],
    pad: int,
    stops: Collection[int],
    look: Callable[[PreTrainedModel, int], None],
    *,
    seed: int,
    device: str,
    progress: Progress,
) -> None:
    """Train low-rank updates of all linears inside the layers, and look at the model on the way.

    Args:
        folder: of a model that is not quantized.
        text: the adjacent text.
        pad: the token that fills up batches.
        stops: numbers of updates, above 0.
        look: called after each of these, with the model in evaluation mode.
        seed: of the updates' random start and the order of the text.
        device: where to compute.
        progress: told the share of the updates that is done.

    Raises:
        CompressError: peft or accelerate is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    except ImportError as error:
        raise CompressError(
            f"Relearning trains with {error.name or 'peft'}; install it with 'pip install "
            "compress-model[peft]', or ask for '--relearn 0'."
        ) from None
    model = assemble(open_checkpoint(folder), device, torch.float32)
    model.config.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained: Any = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        )

    def look_at(step: int) -> None:
        trained.eval()
        model.config.use_cache = True
        look(trained, step)
        model.config.use_cache = False
        trained.train()

    class Looking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            progress("relearning", state.global_step / state.max_steps)
            if state.global_step in stops:
                look_at(state.global_step)

    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=max(stops),
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            seed=seed,
            use_cpu=torch.device(device).type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        train_on(device, arguments)
        trainer = Trainer(
            model=trained,
            args=arguments,
            train_dataset=list(text),
            data_collator=lambda batch: collate(batch, pad),
            callbacks=[Looking()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
