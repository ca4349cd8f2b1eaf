"""What BlockPruner is run on, what is found there, and what it does: each made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf

from compress.engine.windows import Windows
from compress.method import StepContext, StepReport
from compress.pruning.parts import block_losses

from .common import CASES, VOCAB, WINDOWS, Plain, applied, save


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {case: save(case, tmp_path_factory.mktemp("model")) for case in CASES}


@pytest.fixture(autouse=True)
def few_likely_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the bounds differ from the losses on a vocabulary this small."""
    monkeypatch.setattr(block_losses, "LIKELY_TOKENS", 4)


@pytest.fixture(scope="session")
def plain_of(folders: dict[str, Path]) -> Callable[[str], Plain]:
    """One for all tests with the same windows, as it remembers what it has found."""
    return cache(lambda case: Plain(case, folders[case], WINDOWS))


@pytest.fixture(scope="session")
def three_removed(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[StepReport, StepContext]]:
    """What the method does when it is asked for nothing but three blocks."""
    return cache(lambda case: applied(folders[case], tmp_path_factory.mktemp("three"), blocks=3))


@pytest.fixture(scope="session")
def likely(folders: dict[str, Path]) -> Windows:
    """Text that the Llama model itself wrote, so that losing a block costs perplexity."""
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCAB, (40, 1), generator=generator)
    with torch.no_grad():
        for _ in range(15):
            probabilities = torch.softmax(model(tokens).logits[:, -1], -1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="generated")
