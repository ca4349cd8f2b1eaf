"""What all tests of the demo model need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.system.cache import CACHE_VARIABLE


@pytest.fixture(scope="module", autouse=True)
def in_the_users_cache(users_cache: Path) -> Iterator[None]:
    """The demo model and the texts are fetched once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(users_cache))
        yield
