"""Choosing the bits of every linear by its measured sensitivity, so that a model fits into given memory."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from compress.anatomy import weight
from compress.calibration.statistics.fisher import Fisher, expected_loss, sampled_loss
from compress.engine.shape import ModelShape
from compress.engine.stream import StreamedModel
from compress.engine.windows import Windows
from compress.errors import BadInput
from compress.kernels.codes.integer import quantize_weight
from compress.quantization.parts.block_order import LENGTH, by_gain
from compress.quantization.parts.layout import plan_layout, plan_packed, stored_linears
from compress.quantization.parts.options import WeightOptions
from compress.storage.formats.base import Format
from compress.storage.tensors import DTYPES

WINDOWS = 32
"""Number of windows of `LENGTH` tokens that sensitivities are measured on."""

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""For methods that look at text, channels are scaled by these powers of their importance."""


@dataclass(frozen=True)
class Mix:
    """The chosen bits of the linears of one model.

    Attributes:
        options: of the method, with the most frequent width as ``bits`` and all others in ``set``.
        bits: full name of a linear -> its width.
        nbytes: bytes of all tensors of the model.
        loss: the loss that these widths are expected to cause, nats per token.
    """

    options: WeightOptions
    bits: dict[str, int]
    nbytes: int
    loss: float


def mix(
    model: StreamedModel,
    options: WeightOptions,
    widths: Sequence[int],
    memory: int | None,
    windows: Windows,
    seed: int,
    folder: Path,
    *,
    calibrated: bool,
) -> Mix:
    """Give every linear one of some widths, so that the loss is least and all tensors fit into ``memory``.

    The loss that a linear causes at a width is estimated from its residual after rounding and one backward
    pass (`expected_loss`). Bits go where they lower the total most per byte, until no more fit.

    A method that looks at text spares the input channels that matter most, so the residual of plain rounding
    says little about it. For such a method the residual is the best of several: each is rounded with the
    channels scaled by a power of their importance, as AWQ does it (`channel_scales`).

    Args:
        model: the dense model.
        options: of the method. They say what is packed and how; the width is chosen for what has ``bits``.
        widths: to choose from, in bits.
        memory: bytes that all tensors may take; None allows what ``options.bits`` everywhere takes.
        windows: of text; their beginnings are used.
        seed: for drawing labels from the model.
        folder: an empty folder with room for the Fisher information: 4 bytes per weight.
        calibrated: whether the method looks at text.

    Raises:
        BadInput: the options do not fit the model, or the model does not fit into ``memory`` at the least
            width.
    """
    if options.set:
        raise BadInput(
            "Mixing chooses the bits of every linear itself, so 'set' does not apply; leave the option out."
        )
    widths = sorted(set(widths))
    shape = ModelShape.of(model.checkpoint)
    # Every width is measured as it will be stored beside the others.
    symmetric = plan_layout(shape, options.model_copy(update={"mix": True})).default.symmetric
    options = options.model_copy(update={"mix": False, "symmetric": symmetric})
    by_width = {bits: options.model_copy(update={"bits": bits}) for bits in widths}
    forms = {bits: plan_layout(shape, each).linears for bits, each in by_width.items()}
    if memory is None:
        memory = plan_packed(shape, options).nbytes
    nbytes = plan_packed(shape, by_width[widths[0]]).nbytes
    if nbytes > memory:
        raise BadInput(
            f"At {widths[0]} bits everywhere the model takes {nbytes / 1e6:,.1f} MB, more than the "
            f"{memory / 1e6:,.1f} MB allowed; allow more, or quantize the embeddings as well."
        )
    names = list(forms[widths[0]])
    linears = shape.linears()

    def size(name: str, form: Format) -> int:
        infos = form.tensor_infos(name, linears[name], shape.tensors[f"{name}.weight"].dtype)
        return sum(info.nbytes for info in infos.values())

    sizes = [[size(name, forms[bits][name]) for bits in widths] for name in names]
    part = windows.part(WINDOWS, LENGTH)
    fisher = Fisher(model, part, sampled_loss(model, part, seed), folder)
    losses = _losses(model, forms, fisher, part, ALPHAS if calibrated else (0.0,))
    costs = [[each[0], *(after - before for before, after in pairwise(each))] for each in sizes]
    at = [0] * len(names)
    full: set[int] = set()
    for linear in by_gain([losses[name] for name in names], costs):
        cost = costs[linear][at[linear] + 1]
        if linear in full or nbytes + cost > memory:
            full.add(linear)  # the gain of its further bits was computed on top of these
        else:
            at[linear] += 1
            nbytes += cost
    bits = {name: widths[index] for name, index in zip(names, at)}
    most = Counter(bits.values()).most_common(1)[0][0]
    chosen = options.model_copy(update={"bits": most, "set": _patterns(shape, bits, most)})
    loss = sum(losses[name][index] for name, index in zip(names, at))
    return Mix(chosen, bits, plan_packed(shape, chosen).nbytes, loss)


def _losses(
    model: StreamedModel,
    forms: dict[int, dict[str, Format]],
    fisher: Fisher,
    windows: Windows,
    alphas: Sequence[float],
) -> dict[str, list[float]]:
    """Full name of a linear -> its expected loss at each width, nats per token."""
    found: dict[str, list[float]] = {}
    every = {name for each in forms.values() for name in each}
    for layer in model.walk(None, label="measuring sensitivities"):
        information = fisher.read(layer)
        for path, stored in stored_linears(layer, every).items():
            name, dense = stored.removesuffix(".weight"), weight(layer.linears[path])
            dtype = DTYPES[model.checkpoint.tensors[stored].dtype]
            scales = [channel_scales(information[path], alpha) for alpha in alphas]
            for form in (each[name] for each in forms.values() if name in each):
                grid = (form.bits, form.group_size, form.symmetric, form.scale_dtype(dtype), name)
                residuals = (dense - quantize_weight(dense * s, *grid).dequantize() / s for s in scales)
                least = min(expected_loss(information[path], each, windows) for each in residuals)
                found.setdefault(name, []).append(least)
    return found


def channel_scales(information: torch.Tensor, alpha: float) -> torch.Tensor:
    """c^alpha, where c_j is the importance of input channel j, divided by sqrt(max * min): float32 [in].

    A channel's share of the Fisher information grows with the squares of its inputs, so c is the root of it.

    Args:
        information: diagonal Fisher information of a weight, float32 [out, in].
        alpha: between 0 (all 1) and 1.
    """
    importance = information.mean(0).sqrt()
    importance = (importance / importance.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=1e-4)
    scales = importance**alpha
    return scales / (scales.max() * scales.min()).sqrt()


def _patterns(shape: ModelShape, bits: dict[str, int], default: int) -> dict[str, int]:
    """The widths other than the default as patterns for ``set``, one per projection and width."""
    anatomy = shape.anatomy
    indices: dict[tuple[str, int], list[str]] = defaultdict(list)
    for index in range(shape.num_layers):
        start = f"{anatomy.layer_name(index)}."
        for name, width in bits.items():
            if name.startswith(start) and width != default:
                indices[name.removeprefix(start), width].append(str(index))
    layers = re.escape(anatomy.layer_name(0).removesuffix("0"))
    return {
        f"re:{layers}({'|'.join(found)})\\.{re.escape(path)}$": width
        for (path, width), found in sorted(indices.items())
    }
