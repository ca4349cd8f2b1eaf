"""Where work is computed."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from compress.system.device import train_on


def test_training_takes_the_device_that_was_named_and_no_other(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    arguments._n_gpu = 4  # as on a machine with several
    train_on("cuda:1", arguments)
    assert arguments.device == torch.device("cuda:1")
    assert arguments.distributed_state.device == torch.device("cuda:1")
    assert arguments.n_gpu == 1
