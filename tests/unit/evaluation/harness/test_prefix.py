"""The beginning that prompts share is read once, and changes no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import compress
from compress.evaluation.harness.prefix import SHORTEST, Prefix

TOKENS = st.integers(1, 250)


@pytest.fixture(scope="module")
def llama(model: Path):
    return compress.load(model)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(TOKENS, min_size=SHORTEST, max_size=30),
    st.lists(st.lists(TOKENS, min_size=1, max_size=9), min_size=2, max_size=4),
)
def test_generation_behind_a_prefix_is_the_same(llama, beginning: list[int], ends: list[list[int]]):
    prompts = [beginning + end for end in ends]
    prefix = Prefix.of(llama, prompts)
    assert prefix is not None
    assert len(beginning) <= len(prefix.tokens) < min(map(len, prompts))
    width = max(map(len, prompts))
    context = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        usual = llama.generate(input_ids=context, attention_mask=mask, **how)
        for _ in range(2):  # the kept beginning is not changed by its use
            moved = llama.generate(**prefix.put_first(context, mask), **how)
            assert torch.equal(moved[:, width:], usual[:, width:])


def test_what_is_no_common_beginning_is_left_alone(llama):
    same = list(range(1, 40))
    assert Prefix.of(llama, [same]) is None
    assert Prefix.of(llama, [[*same[: SHORTEST - 1], 7], [*same[: SHORTEST - 1], 8]]) is None
    prefix = Prefix.of(llama, [[*same, 7], [*same, 8, 9]])
    assert prefix is not None
    cut = torch.tensor([[*same[1:], 7, 8]])
    assert prefix.put_first(cut, torch.ones_like(cut)) is None
    assert Prefix.of(llama, [same, [*same, 8]]).tokens.tolist() == same[:-1]  # a token is left to be asked


def test_sliding_windows_and_rounded_keys_have_no_prefix(tiny_decoder):
    prompts = [[*range(1, 40), 7], [*range(1, 40), 8]]
    sliding = compress.load(tiny_decoder("MistralForCausalLM", sliding_window=8))
    assert Prefix.of(sliding, prompts) is None
