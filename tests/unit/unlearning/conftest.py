"""A tiny model that knows a few facts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from .common import teach


@pytest.fixture(scope="session")
def taught(write_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers that knows all facts; the sets to forget and to retain lie beside it."""
    folder = write_decoder(tmp_path_factory.mktemp("taught") / "model", num_hidden_layers=3)
    teach(folder)
    gc.collect()
    gc.freeze()  # the Trainer collects garbage after every training, and would go through all modules again
    return folder
