"""Several results of a method side by side in the one state of a journal."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch


class StatePart(MutableMapping[str, torch.Tensor]):
    """The tensors of a journal's state that belong to one kind of result, without the name of the kind.

    Args:
        state: of the journal; it holds the tensors as ``KIND/KEY``.
        kind: of the result.
    """

    def __init__(self, state: MutableMapping[str, torch.Tensor], kind: str) -> None:
        self._state, self._prefix = state, f"{kind}/"

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._state[self._prefix + key]

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        self._state[self._prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self._state[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in self._state if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
