"""The device that these tests run on: a real CUDA device where there is one, and else a pretended one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import compress
from compress.storage.lineage import Lineage

from .pretended import pretended_cuda

REAL = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what another one cached."""
    monkeypatch.setenv("COMPRESS_MODEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cuda() -> Callable[[], AbstractContextManager[SimpleNamespace]]:
    """``with cuda() as device``: a block in which there is a CUDA device. Only a pretended one has counts."""

    @contextmanager
    def real() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace()

    return real if REAL else pretended_cuda


@pytest.fixture
def run_on(tmp_path: Path) -> Callable[..., tuple[Path, Lineage]]:
    """Carries out one step on a model, on a device: the folder of the result and its lineage."""

    def run(device: str, model: Path, method: str, **options: Any) -> tuple[Path, Lineage]:
        text = options.pop("text", model.parent / "text.txt")
        name = options.pop("name", f"{method} on {device}")
        more = {"progress": options.pop("progress")} if "progress" in options else {}
        calibration = {"source": str(text), "nsamples": 6, "seqlen": 32} | options.pop("calibration", {})
        step = {"method": method, **options}
        recipe = {"model": str(model), "calibration": calibration, "steps": [step]}
        return tmp_path / name, compress.run(recipe, tmp_path / name, device=device, overwrite=True, **more)

    return run
