"""Abstention at inference: where the key of a prompt looks like forgotten text, the answer is a refusal.

The key x of a token is the input of the last down projection. It is inside the space of forgotten prompts if
|x_j - mu_j| <= h k sigma_j for every coordinate j (arXiv:2503.21730), that is if its distance
max_j |x_j - mu_j| / sigma_j is at most h k.

The last token of a prompt decides for its text; with ``every-step`` every later token does so as well. From
a hit on, the logits of the text allow nothing but the tokens of the refusal, one after the other; then its
last one, the end of the text, for ever. The next prompt of the same conversation is judged anew.

A pass is taken for a prompt if nothing is cached, or if it has several tokens of which not all are asked for
logits (``logits_to_keep``, as ``generate`` sets it). The prompt ends with the first token that is asked for
logits: what follows it are guesses at the answer. If all are asked for, it ends with the last one. So without
a cache every token is judged as if a prompt ended there.

How far the refusal of a text is lies in the cache, as the states of one more layer. So it follows the texts
when a beam search reorders them, and goes back when guesses are taken back. A pass without a cache finds it
in the text: it goes on with a refusal that follows a token inside the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from compress.engine.adjusting import Measured
from compress.engine.passes import Pass

NEVER = -1e4
"""The logit of a token that must not come, where that of the token to come is 0: a probability of 0, and no
infinity in any dtype."""

Check = Literal["prompt-only", "every-step"]


class KeySpace(Measured):
    """The space of the keys of forgotten prompts.

    Args:
        width: of a key, I.
        radius: h k.
        device: where the statistics are.

    Attributes:
        mean, deviation: mu and sigma, float32 [I]. Coordinates with a sigma of 0 are not looked at.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, radius: float, device: str | torch.device) -> None:
        super().__init__(dict.fromkeys(("mean", "deviation"), (torch.float32, width)), device)
        self.radius = radius

    def forward(self, keys: Tensor) -> Tensor:
        """Whether keys [..., I] are inside: bool [...]."""
        return distance(keys.float(), self.mean, self.deviation) <= self.radius


def distance(keys: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """max_j |x_j - mu_j| / sigma_j of keys [..., I], over the coordinates with a sigma above 0: [...]."""
    kept = deviation > 0
    return torch.where(kept, (keys - mean).abs() / deviation.where(kept, 1.0), 0.0).amax(-1)


class States(DynamicLayer):
    """How far refusals are, in a cache: [B, 1, T, 1].

    The cache may be a static one, for which transformers makes another mask if all its layers are static.
    """

    is_compileable = True


class Abstention:
    """Makes a decoder refuse, text by text.

    Args:
        space: of the keys.
        check: which tokens decide.
        refusal: tokens of the answer, the end of the text last.
        layers: of the model; the cache holds the states behind theirs.
        now: the pass that is running.
    """

    def __init__(self, space: KeySpace, check: Check, refusal: Sequence[int], layers: int, now: Pass) -> None:
        self.space, self.check, self.refusal = space, check, tuple(refusal)
        self.layers, self.now = layers, now

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the whole model: watch this pass."""
        self.now.read(model, args, kwargs)
        self.now.keys, self.now.watched = None, self.space.acting

    def keep(self, down: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the last down projection: keep its input."""
        if self.now.watched:
            self.now.keys = inputs[0]

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook of the whole model: decide, remember it in the cache, and force the refusal."""
        now, keys = self.now, self.now.keys
        now.keys, now.watched = None, False
        if keys is None or now.real is None:
            return output
        parts = output if isinstance(output, tuple) else output.to_tuple()
        cache = next((part for part in parts if isinstance(part, Cache)), now.cache)
        logits = output[0] if isinstance(output, tuple) else output.logits
        asked = _asked(kwargs.get("logits_to_keep", 0), now.real.shape[1])
        keys = keys.view(*now.real.shape, -1)
        states = self.states(keys, now.tokens, now.real, asked, _before(self.layers, cache))
        if cache is not None:
            self._remember(cache, states)
        if not bool(states.any()):
            return output
        kept = kwargs.get("logits_to_keep", 0)
        shown = states[:, kept] if isinstance(kept, Tensor) else states[:, -logits.shape[1] :]
        forced = self.forced(logits, shown)
        if isinstance(output, tuple):
            return (forced, *output[1:])
        output["logits"] = forced
        return output

    def states(
        self, keys: Tensor, tokens: Tensor | None, real: Tensor, asked: int, before: Tensor | None
    ) -> Tensor:
        """How many tokens of the refusal are due after each new token; 0: the text is not refused.

        Args:
            keys: of the new tokens [B, T, I].
            tokens: their ids [B, T], if they are known.
            real: bool [B, T], False for padding.
            asked: how many of the last tokens are asked for logits; 0: all of them.
            before: the states after the cached tokens, int64 [B]; None if the text begins here.

        Returns:
            int64 [B, T].
        """
        length = real.shape[1]
        prompt = before is None or (length > 1 and asked < length)
        end = _last(real, length - max(asked, 1))
        judged = torch.zeros_like(real)
        if self.check == "every-step":
            judged = real & (torch.arange(length, device=real.device) >= end[:, None])
        elif prompt:
            judged = judged.scatter(1, end[:, None], True) & real
        hits = torch.zeros_like(real)
        hits[judged] = self.space(keys[judged])
        states = ((hits.long().cumsum(-1) > 0) & real).long().cumsum(-1)
        if before is None:
            return states if tokens is None else self._going_on(states, keys, tokens, real, end)
        if prompt:  # a refusal that is over says nothing about the next prompt
            before = torch.where(before >= len(self.refusal), 0, before)
        started = before[:, None]
        return torch.where(started > 0, started + real.long().cumsum(-1), states)

    def forced(self, logits: Tensor, states: Tensor) -> Tensor:
        """Logits [B, T, V] that allow only the refusal's next token where states [B, T] are above 0."""
        refused = states > 0
        refusal = torch.tensor(self.refusal, device=logits.device)
        due = refusal[states[refused].clamp(max=len(self.refusal)) - 1]
        changed = logits.clone()
        changed[refused] = logits.new_full((len(due), logits.shape[-1]), NEVER).scatter(1, due[:, None], 0.0)
        return changed

    def _going_on(self, states: Tensor, keys: Tensor, tokens: Tensor, real: Tensor, end: Tensor) -> Tensor:
        """The states of texts that begin here, where a text up to ``end`` [B] ends within a refusal: it goes
        on from there."""
        rows = torch.arange(len(real), device=real.device)
        counts = real.long().cumsum(-1)
        there = counts[rows, end]  # real tokens up to the end
        for length in range(1, min(len(self.refusal), real.shape[1] - 1) + 1):
            said = there > length
            for back, token in enumerate(reversed(self.refusal[:length])):
                said = said & (tokens[rows, _place(real, counts, there - back)] == token)
            if bool(said.any()):
                said = said & self.space(keys[rows, _place(real, counts, there - length)])
                onward = length + 1 + counts - there[:, None]
                behind = said[:, None] & (counts >= there[:, None])
                states = torch.where(behind, onward, states)
        return states

    def _remember(self, cache: Cache, states: Tensor) -> None:
        """Put the states of the new tokens into the cache."""
        rows, new = states.shape
        layer = _states_in(cache, self.layers)
        if layer is None:
            layer = States()
            cache.layers.append(layer)
        missing = int(cache.get_seq_length()) - new - layer.get_seq_length()
        if missing > 0:  # read by something else than this model, such as its base model
            states = torch.cat([states.new_zeros(rows, missing), states], dim=1)
        layer.update(states[:, None, :, None], states[:, None, :, None])


def _states_in(cache: Cache | None, layers: int) -> States | None:
    """What `Abstention` has put into a cache of a model with so many layers."""
    layer = cache.layers[layers] if cache is not None and len(cache.layers) > layers else None
    return layer if isinstance(layer, States) else None


def _before(layers: int, cache: Cache | None) -> Tensor | None:
    """The states after the tokens that the cache held before this pass: [B]; None if it held none."""
    layer = _states_in(cache, layers)
    if layer is None or layer.keys is None or not layer.keys.numel():
        return None
    return layer.keys[:, 0, -1, 0]


def _asked(kept: Tensor | int, length: int) -> int:
    """How many of the last tokens of a pass are asked for logits; 0: all of them."""
    if isinstance(kept, Tensor):
        return length - int(kept.min()) if kept.numel() else 0
    return min(kept, length)


def _last(real: Tensor, limit: int) -> Tensor:
    """The place [B] of the last real token up to ``limit``; 0 where there is none."""
    counts = real[:, : limit + 1].long().cumsum(-1)
    return _place(real[:, : limit + 1], counts, counts[:, -1])


def _place(real: Tensor, counts: Tensor, number: Tensor) -> Tensor:
    """The place [B] of the real token with the ``number`` [B], from 1, where ``counts`` is the sum of real
    tokens up to each; 0 where there is none."""
    return (real & (counts == number[:, None])).long().argmax(-1)
