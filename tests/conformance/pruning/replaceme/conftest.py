"""Each tiny model is made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .common import FAMILIES, folder_of, random_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: folder_of(random_model(family.config), tmp_path_factory.mktemp(name))
        for name, family in FAMILIES.items()
    }
