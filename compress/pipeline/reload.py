"""The check that the written model computes the same as the model in memory."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from compress.anatomy import model_class
from compress.engine.config import config_of
from compress.engine.logits import first_output, streamed_logits
from compress.engine.windows import Windows
from compress.errors import CompressError
from compress.storage.checkpoint import Checkpoint
from compress.storage.lineage import ReloadCheck
from compress.system.memory import available_memory

PROBE_TOKENS = 48
PARITY, RESOLUTION = 1e-3, 1e-6
"""The difference of logits that passes: this share of their standard deviation, and this of the largest one.

Two devices add in different orders, and the rounding of their sums grows with the logits. A few float32 steps
of the largest logit are no error, even where logits hardly differ from each other. What was written wrongly
stands out: rounding one projection of one layer to bfloat16 moves logits by more."""


def reload_check(current: Checkpoint, folder: Path, device: str) -> ReloadCheck:
    """Compare the logits of the model before it was written with those of the folder, read afresh.

    A plain model that fits into a quarter of the free memory is loaded by transformers itself, as its users
    will; every other model is streamed from its files.
    """
    reloaded = Checkpoint.open(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config_of(current).vocab_size, (2, PROBE_TOKENS // 2), generator=generator)
    probe = Windows(tokens, torch.ones_like(tokens, dtype=torch.bool), source="random tokens")
    before = streamed_logits(current, probe, device)
    plain = "quantization_config" not in current.config
    if plain and 4 * sum(info.numel for info in current.tensors.values()) < available_memory() / 4:
        loaded_by = "transformers"
        after = _plain_logits(current, folder, tokens)
    else:
        loaded_by = "compress-model, layer by layer"
        after = streamed_logits(reloaded, probe, device)
    difference = float((before - after).abs().max())
    if not difference <= PARITY * float(before.std(correction=0)) + RESOLUTION * float(before.abs().max()):
        raise CompressError(
            f"The written model does not compute what it did in memory (logits differ by {difference:.3g}); "
            "nothing was published."
        )
    return ReloadCheck(loaded_by=loaded_by, max_difference=difference, tokens=tokens.numel())


@torch.no_grad()
def _plain_logits(current: Checkpoint, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    # The code is this package's own, just written (`modeling_source`), and the one that users will run.
    ours = "pruned" in current.config
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=ours)
    name = next((name for name in getattr(config, "auto_map", {}) if name != "AutoConfig"), None)
    cls = getattr(transformers, name) if ours and name else model_class(config_of(current))
    model = cls.from_pretrained(folder, dtype=torch.float32, trust_remote_code=ours).eval()
    return first_output(model(tokens))
