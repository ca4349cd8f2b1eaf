"""Choosing the type of every tensor by measured sensitivity, so that a model fits into given memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.quantization.parts.choices import Chooser, Corrections, Mix, tell
from compress.quantization.parts.divergence import Divergence
from compress.quantization.parts.head import is_head
from compress.quantization.parts.ladder import Ladder
from compress.quantization.parts.replaced import Replaced
from compress.quantization.parts.sensitivity import Sensitivities, linear_sensitivities

LENGTH = 128
"""Tokens in a window that is measured on: many short windows tell more than a few long ones."""

WINDOWS = 32
"""Number of windows that sensitivities are measured on."""

HELD_OUT = 8
"""Number of other windows that choices are compared on, and of those that tables are measured on."""


def mix(
    model: StreamedModel,
    ladder: Ladder,
    memory: int,
    windows: Windows,
    seed: int,
    folder: Path,
    *,
    held_out: Windows | None = None,
) -> Mix:
    """Give every tensor one of its types, so that the loss is least and everything fits into ``memory``.

    The loss that a linear causes in a type is estimated from its residual after rounding and one backward
    pass; that of a table is measured. The sum is made least by an exact knapsack (`choose`). With held-out
    windows the choice is then corrected by what is measured there (`Corrections`).

    Args:
        model: the dense model.
        ladder: the types.
        memory: bytes that all tensors may take.
        windows: of text, to measure sensitivities on.
        seed: for drawing labels from the model.
        folder: with room for the Fisher information: 4 bytes per weight. It is empty, or another mixture of
            the same model, ladder and windows was made there, whose measurements are then used.
        held_out: other windows.

    Raises:
        BadInput: the model does not fit into ``memory`` in the smallest types, or a weight holds NaN.
    """
    smallest = ladder.fixed + sum(min(sizes.values()) for sizes in ladder.sizes.values())
    if smallest > memory:
        raise BadInput(
            f"In the smallest types the model takes {smallest / 1e6:,.1f} MB, more than the "
            f"{memory / 1e6:,.1f} MB allowed; allow more, or prune the model first."
        )
    if (found := Sensitivities.read(folder)) is None:
        found = linear_sensitivities(model, ladder, windows, seed, folder)
        measure_tables(model, ladder, windows.part(HELD_OUT, LENGTH), found)
        found.write(folder)
    chooser = Chooser(ladder, found, memory)
    if held_out is None:
        return chooser.choose()
    return Corrections(model, chooser, held_out, folder).best()


def measure_tables(model: StreamedModel, ladder: Ladder, windows: Windows, found: Sensitivities) -> None:
    """Add the losses of what no backward pass was taken for, the tables: measured in one type after another.

    A table that serves as embedding and as head is measured in both roles at once.
    """
    tables = [name for name in ladder.sizes if name not in found.losses]
    if not tables:
        return
    divergence = Divergence(model, windows)
    wanted = [(name, kind) for name in tables for kind in ladder.sizes[name]]
    for done, (name, kind) in enumerate(wanted):
        tell(model, "measuring tables", done / len(wanted))
        if is_head(model.anatomy, name) and name not in found.importance:
            found.importance[name] = divergence.head_inputs()
        tried = {}
        for power in ladder.powers(name):
            found.powers[name, kind] = power
            tried[power] = divergence.of(Replaced.of(model, ladder, found, {name: kind}))
        found.powers[name, kind] = min(tried, key=tried.__getitem__)
        found.losses.setdefault(name, {})[kind] = min(tried.values())
    tell(model, "measuring tables", 1.0)


def split(windows: Windows, decoder: bool) -> tuple[Windows, Windows | None]:
    """Windows to measure sensitivities on, and held-out ones: the last quarter of the windows, at least one.

    Both are cut into `pieces`, of which `WINDOWS` and `HELD_OUT` are taken.

    Returns:
        The two; of a single window nothing is held out.
    """
    count = len(windows) // 4 or int(len(windows) > 1)
    first = torch.arange(len(windows)) < len(windows) - count
    measured = pieces(windows.select(first), WINDOWS, decoder)
    return measured, pieces(windows.select(~first), HELD_OUT, decoder) if count else None


def pieces(windows: Windows, most: int, decoder: bool) -> Windows:
    """Cut windows into pieces of `LENGTH` tokens, and take the first ``most`` of them.

    The beginnings of all windows come first. If all windows begin with the same token, so do all pieces: it
    begins texts. Of the inputs of an encoder only the beginnings are taken.
    """
    if not decoder or windows.tokens.shape[1] <= LENGTH:
        return windows.part(most, LENGTH)
    tokens, mask = windows.tokens, windows.mask
    kept = int(len(tokens) > 1 and bool((tokens[:, 0] == tokens[0, 0]).all()))  # a BOS token
    step = LENGTH - kept

    def cut(values: torch.Tensor) -> torch.Tensor:
        starts = range(kept, values.shape[1] - step + 1, step)
        return torch.cat([torch.cat([values[:, :kept], values[:, at : at + step]], 1) for at in starts])

    cut_mask = cut(mask)
    real = cut_mask[:, kept:].any(1)
    return replace(windows, tokens=cut(tokens)[real][:most], mask=cut_mask[real][:most])
