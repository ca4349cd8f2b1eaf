"""A cache that grows in place holds what a cache of transformers holds, whatever is done to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicLayer

from compress.engine.growing_cache import ROOM, GrowingLayer, let_grow

CONFIG = LlamaConfig(num_hidden_layers=3)
ACTIONS = st.one_of(
    st.tuples(st.just("update"), st.integers(1, 2 * ROOM)),
    st.tuples(st.just("crop"), st.integers(-3, 0)),
    st.tuples(st.just("reorder"), st.integers(0, 9)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("select"), st.integers(0, 9)),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


def act(layer: Any, action: str, number: int, states: Tensor) -> Any:
    rows = 0 if layer.keys is None or not layer.get_seq_length() else len(layer.keys)
    if action == "update":
        return layer.update(states[: rows or 2], 2 * states[: rows or 2])
    if action == "reset":
        return layer.reset()
    if action == "copy":
        return None
    if not rows:
        return None
    if action == "crop":
        return layer.crop(max(number, 1 - layer.get_seq_length()))
    if action == "reorder":
        return layer.reorder_cache(torch.arange(rows).roll(number))
    if action == "repeat":
        return layer.batch_repeat_interleave(number) if rows < 9 else None
    return layer.batch_select_indices(torch.arange(rows)[: number % rows + 1])


@given(st.lists(ACTIONS, max_size=12))
@settings(max_examples=60)
def test_it_holds_what_a_dynamic_layer_holds(actions: list[tuple[str, int]]) -> None:
    plain: Any = DynamicLayer()
    growing: Any = GrowingLayer()
    for number, (action, argument) in enumerate(actions):
        states = torch.randn(18, 2, argument if action == "update" else 1, 4) + number
        wanted, found = (act(layer, action, argument, states) for layer in (plain, growing))
        if action == "copy":
            growing = copy.deepcopy(growing)
        for mine, theirs in zip(found or (), wanted or (), strict=True):
            assert torch.equal(mine, theirs)
        assert growing.get_seq_length() == plain.get_seq_length()
        assert growing.get_mask_sizes(2) == plain.get_mask_sizes(2)
        if plain.get_seq_length():
            assert torch.equal(growing.keys, plain.keys)
            assert torch.equal(growing.values, plain.values)


def states(tokens: int) -> Tensor:
    return torch.randn(1, 2, tokens, 4)


def test_a_token_moves_nothing_while_there_is_room() -> None:
    layer = GrowingLayer()
    layer.update(states(5), states(5))
    rooms = layer.rooms
    for _ in range(ROOM):
        layer.update(states(1), states(1))
    assert layer.rooms is rooms
    layer.update(states(1), states(1))
    assert layer.rooms is not rooms


def test_shallow_copies_do_not_write_into_each_other() -> None:
    layer = GrowingLayer()
    layer.update(states(5), states(5))
    other = copy.copy(layer)
    layer.update(states(1), states(1))
    before = layer.keys.clone()
    other.update(states(1), states(1))
    assert torch.equal(layer.keys, before)
    assert not torch.equal(other.keys, before)


def test_what_others_put_there_is_never_written_to() -> None:
    layer, mine = GrowingLayer(), torch.randn(1, 2, 99, 4)
    layer.update(states(5), states(5))
    layer.keys, layer.values = mine[:, :, :7], mine[:, :, :7]
    before = mine.clone()
    keys, _ = layer.update(states(1), states(1))
    assert torch.equal(mine, before)
    assert torch.equal(keys[:, :, :7], mine[:, :, :7])


def test_tokens_of_inference_mode_can_be_followed_by_others() -> None:
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(states(5), states(5))
    keys, _ = layer.update(states(1), states(1))
    assert keys.shape[2] == 6


def test_gradients_flow_through_it() -> None:
    layer, keys = GrowingLayer(), states(3).requires_grad_()
    layer.update(states(2), states(2))
    layer.update(keys, keys)[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_only_an_empty_dynamic_cache_grows() -> None:
    for cache in (
        DynamicCache(),
        DynamicCache(config=CONFIG),
        DynamicCache(config=MistralConfig(num_hidden_layers=3)),
    ):
        assert let_grow(cache, 3)
        assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
        assert let_grow(cache, 3)
    used = DynamicCache(config=CONFIG)
    used.update(states(2), states(2), 0)
    assert not let_grow(used, 3)
    assert not let_grow(object(), 3)
    assert not let_grow(type("Other", (DynamicCache,), {})(), 3)


def test_reserve_keeps_what_is_there() -> None:
    layer = GrowingLayer()
    layer.update(states(5), states(5))
    keys = layer.keys.clone()
    room, _ = layer.reserve(200)
    assert room.shape[2] >= 205
    assert torch.equal(layer.keys, keys)
    with pytest.raises(AssertionError):
        GrowingLayer().reserve(1)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("count", [1, 3 * ROOM])
def test_a_batch_of_another_size_does_not_follow(first: int, then: int, count: int) -> None:
    layer = GrowingLayer()
    layer.update(*[torch.randn(first, 2, 5, 4)] * 2)
    keys = layer.keys.clone()
    with pytest.raises(ValueError, match="use a cache for each batch"):
        layer.update(*[torch.randn(then, 2, count, 4)] * 2)
    assert torch.equal(layer.keys, keys)
