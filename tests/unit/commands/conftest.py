"""A way to run commands, and what they are run on."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils.logging import set_verbosity_error, set_verbosity_warning

from compress.cli import main
from compress.pipeline.recipe import parse_recipe
from compress.pipeline.run import execute

from ...hub_server import Hub, running_hub
from .common import Command, Ended


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process, through its real way in, and puts the process back as it was."""

    def run(*words: Any) -> Ended:
        monkeypatch.setattr(sys, "argv", ["compress-model", *map(str, words)])
        root, ours = logging.getLogger(), logging.getLogger("compress")
        handlers, levels = root.handlers[:], (root.level, ours.level)
        capsys.readouterr()
        try:
            with mock.patch.dict(os.environ), warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
                main()
        finally:
            root.handlers[:] = handlers
            root.setLevel(levels[0])
            ours.setLevel(levels[1])
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(write_decoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return write_decoder(folder, num_hidden_layers=4, max_position_embeddings=128)


@pytest.fixture(scope="session")
def quantized(tiny: Path) -> Path:
    folder = tiny.with_name("quantized")
    execute(parse_recipe({"model": str(tiny), "steps": [{"method": "rtn", "group_size": 32}]}), folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Two steps that fit the tiny model."""
    path = tmp_path / "recipe.yaml"
    steps = [
        {"method": "replaceme", "layers": 1, "transform": "none"},
        {"method": "rtn", "group_size": 32},
    ]
    path.write_text(yaml.safe_dump({"calibration": {"nsamples": 2, "seqlen": 16}, "steps": steps}))
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process talks to as the user ``me``."""
    with running_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # As the command line sets it where the client was not imported yet.
        disable_progress_bars()
        set_verbosity_error()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found
        enable_progress_bars()
        set_verbosity_warning()
