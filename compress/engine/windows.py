"""Windows of tokens: the text that goes through a model, with its provenance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Windows:
    """N windows of S tokens each.

    Attributes:
        tokens: int64 [N, S], token ids.
        mask: bool [N, S], True for real tokens and False for padding, which is always on the right.
        source: where the text came from, as the user named it.
        document_hashes: sha256 of each document that has tokens here, by which an overlap of calibration and
            evaluation text is found.
        settings: how the windows were made, for provenance: JSON values only.
        token_types: int64 [N, S], 0 or 1 for tokens of the first or second text of a pair, for models that
            read it (BERT); None if all tokens belong to the first text.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    source: str
    document_hashes: frozenset[str] = frozenset()
    settings: dict[str, Any] = field(default_factory=dict)
    token_types: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, count: int, length: int) -> Windows:
        """The first ``count`` windows, cut to their first ``length`` tokens."""
        part = (slice(count), slice(length))
        types = self.token_types
        return replace(
            self,
            tokens=self.tokens[part],
            mask=self.mask[part],
            token_types=None if types is None else types[part],
        )

    @property
    def num_tokens(self) -> int:
        """Real tokens in all windows together."""
        return int(self.mask.sum())

    @cached_property
    def sha256(self) -> str:
        """sha256 over the shape, tokens (as little-endian int64), mask and, if there are any, token types."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i8").tobytes())
        digest.update(self.mask.contiguous().numpy().tobytes())
        if self.token_types is not None:
            digest.update(self.token_types.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def select(self, chosen: torch.Tensor) -> Windows:
        """The windows where ``chosen`` (bool [N]) is True, with the document hashes of all windows."""
        types = None if self.token_types is None else self.token_types[chosen]
        return replace(self, tokens=self.tokens[chosen], mask=self.mask[chosen], token_types=types)

    def describe(self) -> dict[str, Any]:
        """Provenance for ``compression.json``: JSON values only."""
        windows, seqlen = self.tokens.shape
        return {
            "source": self.source,
            "windows": windows,
            "seqlen": seqlen,
            "tokens": self.num_tokens,
            **self.settings,
            "sha256": self.sha256,
            "document_sha256": sorted(self.document_hashes),
        }
