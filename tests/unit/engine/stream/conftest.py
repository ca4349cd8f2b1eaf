"""Each tiny model is made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .common import Subject


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def get(case: str) -> Subject:
        if case not in made:
            made[case] = Subject(case, tmp_path_factory.mktemp("model"))
        return made[case]

    return get


@pytest.fixture
def llama(subject_of: Callable[[str], Subject]) -> Subject:
    return subject_of("llama")
