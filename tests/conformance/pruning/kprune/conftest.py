"""Each tiny model is made once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from compress.anatomy import model_class

from .common import MODELS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models whose predictions are far from even."""
    found = {}
    for case, (name, build) in MODELS.items():
        config = build()
        config.architectures = [name]
        torch.manual_seed(0)
        model = model_class(config)._from_config(config, dtype=torch.float32).eval()
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim == 2:
                head = any(
                    part in path for part in ("classifier.weight", "lm_head", "qa_outputs", "out_proj")
                )
                parameter.data = (3 if head else 1) * noise / math.sqrt(parameter.shape[1])
            else:
                parameter.data = parameter.data + 0.2 * noise
        found[case] = tmp_path_factory.mktemp(case)
        model.save_pretrained(found[case])
    return found
