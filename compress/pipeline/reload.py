"""The check that the written model computes the same as the model in memory, with whom it is promised to."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.engine.config import config_of
from compress.engine.key_values import KEY
from compress.engine.logits import streamed_logits
from compress.engine.remote_code import code_copied_into
from compress.engine.shape import ModelShape
from compress.engine.windows import Windows
from compress.errors import CompressError
from compress.kernels.cpu.library import REFERENCE, using
from compress.pipeline.acting import plain
from compress.pipeline.promise import in_words, obstacle, promised_logits
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import LoaderTrial, ReloadCheck

NOT_ASKED = "that was not asked for"
PROBE_TOKENS = 48
PARITY, RESOLUTION = 1e-3, 1e-6
"""The difference of logits that passes: this share of their standard deviation, and this of the largest one.

Two devices add in different orders, and the rounding of their sums grows with the logits. A few float32 steps
of the largest logit are no error, even where logits hardly differ from each other. What was written wrongly
stands out: rounding one projection of one layer to bfloat16 moves logits by more."""
SAME_ARITHMETIC, HALF_PRECISION, EIGHT_BIT_INPUTS = 1e-3, 0.1, 0.5
"""The difference that passes between us and the promised programs: root mean square, as a share of the
standard deviation of the logits.

Programs that compute in float32 with the same weights differ by rounding only. Those of `in_half_precision`
round activations or weights to 16 bits in every linear, which adds up over the layers to some hundredths.
With `eight_bit_inputs` it adds up to some tenths in a model of 30 layers. A format that is misread, or a
linear that is filled with random numbers, moves logits by about their spread or more."""


def reload_check(current: Checkpoint, folder: Path, device: str, try_loaders: bool = True) -> ReloadCheck:
    """Compare the logits of the model before it was written with those of the folder, read afresh.

    The folder is streamed from its files by this package, and then loaded by the programs that it promises,
    if these are installed and the whole model takes a small share of the free memory; not if ``try_loaders``
    is false.

    Everything of this package runs in plain torch, whose sums do not depend on how many tokens there are: the
    check is of what was written, and models that round inputs to 8 bits enlarge any other difference.

    Raises:
        CompressError: the folder computes something else, or the promised programs fail on it.
    """
    with using(REFERENCE):
        return _compared(current, folder, device, try_loaders)


def _compared(current: Checkpoint, folder: Path, device: str, try_loaders: bool) -> ReloadCheck:
    reloaded, probe = Checkpoint.open(folder), probe_of(current)
    before = streamed_logits(current, probe, device)
    difference = float((before - streamed_logits(reloaded, probe, device)).abs().max())
    if not difference <= PARITY * float(before.std(correction=0)) + RESOLUTION * float(before.abs().max()):
        raise CompressError(
            f"The written model does not compute what it did in memory (logits differ by {difference:.3g}); "
            "nothing was published."
        )
    return ReloadCheck(
        loaded_by="compress-model, layer by layer",
        max_difference=difference,
        tokens=probe.tokens.numel(),
        promised=_try_promise(current, folder, probe, before, device, try_loaders),
    )


def probe_of(current: Checkpoint) -> Windows:
    """The tokens that a model is given before it was written and after: random ones, always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config_of(current).vocab_size, (2, PROBE_TOKENS // 2), generator=generator)
    return Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="random tokens")


def _try_promise(
    current: Checkpoint, folder: Path, probe: Windows, before: torch.Tensor, device: str, try_loaders: bool
) -> LoaderTrial:
    shape = ModelShape.of(current)
    who = shape.loads_with
    if reason := obstacle(shape, device) if try_loaders else NOT_ASKED:
        return LoaderTrial(loader=in_words(who), not_tried=reason)
    if who.key_value_bits is not None and not who.compress_model_only:
        before = streamed_logits(_with_full_cache(current), probe, device)
    if who.at_inference:
        before = streamed_logits(plain(current), probe, device)
    try:
        with code_copied_into(folder.parent):
            after = promised_logits(folder, probe.tokens)
    except CompressError as error:
        raise CompressError(f"{error}; nothing was published. {_WHAT_TO_DO}") from error
    difference = float((before - after).square().mean().sqrt() / before.std(correction=0))
    allowed = HALF_PRECISION if who.in_half_precision else SAME_ARITHMETIC
    if not difference <= (EIGHT_BIT_INPUTS if who.eight_bit_inputs else allowed):
        raise CompressError(
            f"The written model computes something else with {in_words(who)} (logits differ by "
            f"{difference:.2g} of their spread); nothing was published. {_WHAT_TO_DO}"
        )
    return LoaderTrial(loader=in_words(who), difference=difference)


_WHAT_TO_DO = (
    "If it is the fault of that version, install another one or none, and give the same command again: the "
    "finished steps are kept."
)


def _with_full_cache(current: Checkpoint) -> Checkpoint:
    """The model as other programs run it, which do not quantize keys and values."""
    config = {key: value for key, value in current.config.items() if key != KEY}
    return Checkpoint(current.folder, config, current.tensors, current.sources)
