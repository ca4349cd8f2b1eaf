"""The calibration source ``generate``: text that the model writes itself, as in LLM-QAT (arXiv:2305.17888).

For every token v of the vocabulary and every L in {3, 4, 5} there is one sequence. It starts with v, goes on
greedily to L tokens, and is then sampled (temperature 1, from the whole vocabulary) to the end of text or to
the length of a window. The seed shuffles the order in which sequences are used until there are enough
windows, so that a few windows already cover all parts of the vocabulary. No sequence starts with a special or
unused token. If the tokenizer begins texts with BOS, one is put before v and does not count for L.

Each sequence has random numbers of its own, which follow from seed, v and L. So a sequence depends neither on
the other sequences of its batch nor on those before it, except for the last bits of the logits.

Sequences are kept as token ids in the cache folder, `FILE` of them per file. A file appears whole or not at
all, so an interrupted generation continues after the last file, and so does one for more windows of the same
length. The whole model is in memory, because every token needs all layers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from compress.calibration.text.tokens import fingerprint, first_tokens
from compress.engine.loading import assemble
from compress.engine.tokenizer import load_tokenizer
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.storage.checkpoint import Checkpoint
from compress.storage.writer import write_tensors
from compress.system.cache import cache_folder, make_folder, not_written

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

GENERATE = "generate"
"""The source that asks for text of the model's own."""
GREEDY_LENGTHS = (3, 4, 5)
TEMPERATURE = 1.0

FILE = 64
"""Sequences in one file of the cache, and in a batch by default."""

UNUSED = re.compile(r"[<\[]\|?[^<>\[\]]*(unused|reserved)[^<>\[\]]*\|?[>\]]", re.IGNORECASE)
"""Names of tokens that only reserve room in a vocabulary: ``<unused7>``, ``<|reserved_token_1|>``."""

Start = tuple[int, int]
"""The first token v, and the number L of tokens before the rest is sampled."""


def generated_windows(
    checkpoint: Checkpoint,
    nsamples: int,
    seqlen: int,
    seed: int,
    device: str = "cpu",
    progress: Callable[[str, float], None] = lambda text, share: None,
    batch_size: int = FILE,
) -> Windows:
    """``nsamples`` windows of ``seqlen`` tokens that the model of ``checkpoint`` generates.

    A sequence as long as a window becomes a window. Shorter ones, which end with the end-of-text token, are
    written one after the other and cut into whole windows. If even all sequences are not enough, there are
    fewer windows, and a warning says so.

    Args:
        checkpoint: a causal language model with a tokenizer in its folder.
        nsamples: number of windows.
        seqlen: tokens in each window.
        seed: of the order of the sequences and of all sampling.
        device: where to generate, in float32.
        progress: called with a text and the share done (0 to 1).
        batch_size: sequences that are generated together.

    Raises:
        BadInput: the model cannot generate text, seqlen leaves nothing to sample, or all sequences together
            do not fill one window.
        CompressError: the cache folder cannot be written.
    """
    if seqlen <= max(GREEDY_LENGTHS) + 1:
        raise BadInput(f"Windows of {seqlen} tokens leave nothing to sample; use a larger seqlen.")
    tokenizer = load_tokenizer(checkpoint.folder)
    first = first_tokens(tokenizer)
    room = seqlen - len(first)
    starts = _starts(tokenizer, seed)
    settings = {
        "seed": seed,
        "greedy_lengths": list(GREEDY_LENGTHS),
        "temperature": TEMPERATURE,
        "top_k": 0,
        "tokenizer": fingerprint(tokenizer),
    }
    key = json.dumps([checkpoint.sha256, room, first, settings], sort_keys=True)
    folder = cache_folder() / "generated" / hashlib.sha256(key.encode()).hexdigest()[:32]
    writer = _Writer(checkpoint, tokenizer, first, room, seed, device, batch_size)
    before = torch.tensor(first, dtype=torch.int32)
    rows: list[torch.Tensor] = []
    packed = torch.tensor([], dtype=torch.int32)
    sequences = 0
    for sequence in _sequences(folder, starts, writer):
        sequences += 1
        if len(sequence) < room:
            packed = torch.cat([packed, sequence])
            if len(packed) < room:
                continue
            sequence, packed = packed[:room], packed[room:]
        rows.append(torch.cat([before, sequence]))
        progress("generating calibration text", min(1.0, len(rows) / nsamples))
        if len(rows) == nsamples:
            break
    if not rows:
        raise BadInput(
            f"The text this model generates does not fill a window of {seqlen} tokens; use a smaller seqlen."
        )
    if len(rows) < nsamples:
        log.warning(
            "All %d sequences fill only %d of the %d windows asked for; calibration uses these.",
            *(sequences, len(rows), nsamples),
        )
    tokens = torch.stack(rows).long()
    about = {"nsamples": nsamples, **settings, "sequences": sequences}
    return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), GENERATE, settings=about)


def _starts(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Start]:
    """All (v, L) in the order in which they are used."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    used = sorted(
        index
        for token, index in tokenizer.get_vocab().items()
        if index not in special and not UNUSED.fullmatch(token)
    )
    pairs = [(index, length) for index in used for length in GREEDY_LENGTHS]
    generator = torch.Generator().manual_seed(seed)
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


def _sequences(folder: Path, starts: list[Start], writer: _Writer) -> Iterator[torch.Tensor]:
    """Yield the sequences of ``starts`` in order, read from the files of ``folder`` or else generated and
    written there."""
    for number, begin in enumerate(range(0, len(starts), FILE)):
        file = folder / f"{number:06d}.safetensors"
        if file.exists():
            held = load_file(file)
        else:
            make_folder(folder)
            found = writer.write(starts[begin : begin + FILE])
            lengths = torch.tensor([len(sequence) for sequence in found], dtype=torch.int32)
            flat = torch.tensor([token for sequence in found for token in sequence], dtype=torch.int32)
            held = {"tokens": flat, "lengths": lengths}
            try:
                write_tensors(held, file)
            except OSError as error:
                raise not_written(folder, error) from error
        yield from held["tokens"].split(held["lengths"].tolist())


class _Writer:
    """Generates sequences. The model is loaded when the first one is needed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        first: list[int],
        room: int,
        seed: int,
        device: str,
        batch_size: int,
    ) -> None:
        self.checkpoint, self.first, self.room = checkpoint, first, room
        self.seed, self.device, self.batch_size = seed, device, batch_size
        self.ends = _end_tokens(checkpoint, tokenizer)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The whole model in float32."""
        model = assemble(self.checkpoint, self.device, torch.float32)
        if not model.can_generate():
            raise BadInput(
                f"'{self.checkpoint.folder}' is not a causal language model, so it cannot generate its "
                "calibration text; choose another source."
            )
        return model

    def write(self, starts: list[Start]) -> list[list[int]]:
        """One sequence for each start: at most ``room`` tokens, fewer only if the last one ends the text."""
        size = self.batch_size
        return [one for i in range(0, len(starts), size) for one in self._batch(starts[i : i + size])]

    @torch.no_grad()
    def _batch(self, starts: list[Start]) -> list[list[int]]:
        rows = len(starts)
        tokens = torch.zeros(rows, self.room, dtype=torch.int64)
        tokens[:, 0] = torch.tensor([token for token, _ in starts])
        greedy = torch.tensor([length for _, length in starts])
        uniform = torch.stack([self._random(*start) for start in starts])
        ends = torch.tensor(self.ends)
        length = torch.full((rows,), self.room)
        alive = torch.arange(rows)  # the rows still in the batch; some of them may have ended
        inputs = torch.cat([torch.tensor(self.first).expand(rows, -1).long(), tokens[:, :1]], dim=1)
        cache: Any = None
        for position in range(1, self.room):
            given = {} if cache is None else cache
            output = self.model(inputs.to(self.device), use_cache=True, **given)
            name = "cache" if "cache" in output.keys() else "past_key_values"  # noqa: SIM118
            cache = {name: output[name]}
            logits = output.logits[:, -1].double().cpu()
            sampled = sample(logits, uniform[alive, position])
            new = torch.where(position < greedy[alive], logits.argmax(-1), sampled)
            tokens[alive, position] = new
            ended = torch.isin(new, ends) & (length[alive] == self.room)
            length[alive[ended]] = position + 1
            going = length[alive] == self.room
            if not bool(going.any()):
                break
            if 2 * int(going.sum()) <= len(alive):
                cache[name].batch_select_indices(going.nonzero()[:, 0].to(self.device))
                alive, new = alive[going], new[going]
            inputs = new[:, None]
        return [row[:n].tolist() for row, n in zip(tokens, length.tolist(), strict=True)]

    def _random(self, token: int, length: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed} {token} {length}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(self.room, generator=generator, dtype=torch.float64)


def sample(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample one token for each row of ``logits`` (float64 [B, V]), by inverting its cumulative distribution
    at ``uniform`` (float64 [B], from 0 to 1)."""
    cumulative = (logits / TEMPERATURE).softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return chosen[:, 0].clamp(max=logits.shape[-1] - 1)


def _end_tokens(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's end-of-text token, and all at which generation stops."""
    found = [tokenizer.eos_token_id]
    file = checkpoint.folder / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else checkpoint.config
    stop = values.get("eos_token_id")
    found += stop if isinstance(stop, list) else [stop]
    return sorted({token for token in found if token is not None})
