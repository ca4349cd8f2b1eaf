"""Two models whose logits are combined at every call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.unlearning.parts.generic_model import GenericModel

PROMPT = torch.tensor([[5, 60, 7, 80, 9]])


@pytest.fixture
def models(shared_decoder: Callable[..., Path]):
    base, reinforced = (compress.load(shared_decoder("LlamaForCausalLM")) for _ in range(2))
    """The reinforced model is far surer than the base model, and not of the same."""
    generator = torch.Generator().manual_seed(0)
    reinforced.lm_head.weight.data *= 3
    for parameter in reinforced.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return base, reinforced


@torch.no_grad()
def test_logits(models) -> None:
    base, reinforced = (model(PROMPT).logits.double() for model in models)
    expected = base - 0.5 * (reinforced - base).clamp(min=0)
    torch.testing.assert_close(
        GenericModel(*models, alpha=0.5)(PROMPT).logits.double(), expected, atol=1e-5, rtol=1e-5
    )
    assert not torch.equal(expected.argmax(-1), base.argmax(-1))


@torch.no_grad()
def test_padding_has_no_effect(models) -> None:
    model = GenericModel(*models, alpha=0.5)
    padded = torch.cat([PROMPT, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    mask = (torch.arange(8) < 5).long()[None]
    found = model(padded, attention_mask=mask).logits[:, :5]
    torch.testing.assert_close(found, model(PROMPT).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation(models) -> None:
    model = GenericModel(*models, alpha=0.5)
    tokens = PROMPT
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)
    assert torch.equal(found, tokens)
    assert not torch.equal(
        found, models[0].generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)
    )


@torch.no_grad()
def test_with_alpha_0_it_is_the_base_model(models) -> None:
    assert torch.equal(GenericModel(*models, alpha=0.0)(PROMPT).logits, models[0](PROMPT).logits)
