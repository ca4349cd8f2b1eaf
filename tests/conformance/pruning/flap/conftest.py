"""Each tiny model is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .common import FAMILIES, random_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, family in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(name)
        random_model(family).save_pretrained(found[name])
    return found
