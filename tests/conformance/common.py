"""What the conformance tests of several methods share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.engine.stream import Stream
from compress.engine.windows import Windows
from compress.method import StepContext


def random_windows(vocab_size: int, lengths: tuple[int, ...], width: int = 16, seed: int = 1) -> Windows:
    """Windows of random tokens of some lengths, padded to a width."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (len(lengths), max(lengths)), generator=generator)
    tokens = torch.nn.functional.pad(tokens, (0, width - max(lengths)))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Windows(tokens.masked_fill(~mask, 0), mask, source="random")


class Killed(Exception):
    pass


class Moments:
    """The moments of a run: a stream is through a layer, or something is durable. At one it may be killed.

    Attributes:
        passed: since `begin`.
        deadly: which one kills, from 1; 0: none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = self.deadly = 0
        advance = Stream.advance

        def advance_and_pass(stream: Stream, *args: Any, **kwargs: Any) -> None:
            advance(stream, *args, **kwargs)
            self.happens()

        monkeypatch.setattr(Stream, "advance", advance_and_pass)

    def begin(self, deadly: int = 0) -> None:
        self.passed, self.deadly = 0, deadly

    def happens(self, *_: Any) -> None:
        """Also a progress callback, which is called when something is durable."""
        self.passed += 1
        if self.passed == self.deadly:
            raise Killed


def assert_same_draft(found: StepContext, expected: StepContext) -> None:
    """Same config, same tensors, bit for bit."""
    assert found.draft.config == expected.draft.config
    assert found.draft.tensors == expected.draft.tensors
    for tensor in expected.draft.tensors:
        assert torch.equal(found.draft.read(tensor), expected.draft.read(tensor)), tensor
