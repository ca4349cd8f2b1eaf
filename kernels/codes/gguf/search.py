"""Choosing the scales of blocks: those with the least squared error, weighted by importance.

Every group of weights x with importance w gets a step s and, in types that have one, an offset o. Several
steps are tried. For each, the weights are rounded to levels l, and least squares gives the best s and o for
these levels, with what is left of sum w (x - s l - o)^2 in closed form. The best try is rounded and fitted
again. In types whose groups have scales in few bits, s and o are then rounded to multiples of the block's
numbers d and dmin, each group tries the neighbours of its scale, and d and dmin are fitted again.

Weights are held as [weights of a group, groups], so that sums over a group run through contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.kernels.codes.gguf.fields import Fields
from compress.kernels.codes.gguf.levels import Levels

CHUNK = 2**16
"""Weights that are rounded together. Only speed and memory depend on it."""

LEAST_IMPORTANCE = 1e-5
"""Added to importances, as a share of their mean, so that weights without any are still rounded well."""

TRIES = 13
FITS = 2
"""Times that the best try is rounded and fitted again, and that scales of groups are."""


@dataclass(frozen=True)
class GroupScales:
    """The scales of the groups of a block, and their minima if the type has any.

    Attributes:
        groups: of a block.
        lowest, highest: what a scale can be; minima are from 0 to ``highest``.
    """

    groups: int
    lowest: int
    highest: int


def choose_fields(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    size: int,
    levels: Levels,
    groups: GroupScales | None,
    minima: bool,
) -> Fields:
    """Round a weight [out, in] to blocks of ``size``.

    Args:
        weight, importance: as in `BlockType.encode`.
        size: weights of a block; ``in`` is a multiple of it.
        levels: of the type.
        groups: how steps are stored in few bits; None if every block has one step.
        minima: whether the type has an offset; with ``groups`` it can only be negative or 0.
    """
    out, width = weight.shape
    group = size if groups is None else size // groups.groups
    shared = None if importance is None else _relative(importance, width)
    rows = max(1, CHUNK // width)
    parts = []
    for start in range(0, max(out, 1), rows):
        part = weight[start : start + rows].float()
        own = torch.ones_like(part) if shared is None else _rows(shared, start, part)
        x = part.reshape(-1, group).T.contiguous()
        w = own.reshape(-1, group).T.contiguous()
        if groups is None:
            parts.append(_plain(x, w, levels, minima))
        else:
            parts.append(_grouped(x, w, levels, groups, minima))
    return _joined(parts)


def _relative(importance: torch.Tensor, width: int) -> torch.Tensor:
    found = importance.float().reshape(-1, width)
    mean = found.mean().clamp(min=torch.finfo(torch.float32).tiny)
    return found / mean + LEAST_IMPORTANCE


def _rows(shared: torch.Tensor, start: int, part: torch.Tensor) -> torch.Tensor:
    """The importances of the rows of ``part`` from ``start`` on, where all rows have one, or each its own."""
    own = shared if len(shared) == 1 else shared[start : start + len(part)]
    return own.expand_as(part)


def _joined(parts: list[Fields]) -> Fields:
    def all_of(name: str) -> torch.Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    codes, scale = all_of("codes"), all_of("scale")
    assert codes is not None
    assert scale is not None
    return Fields(codes, scale, all_of("minimum"), all_of("group_scales"), all_of("group_minima"))


def _inverse(step: torch.Tensor) -> torch.Tensor:
    found = step.reciprocal()
    return found.masked_fill_(~found.isfinite(), 0)


def half(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of float16, as float32; too large ones become its largest."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).to(torch.float16).float()


class Fit:
    """Sums over groups, of which least squares is made: x [size, N], importances w, and levels l.

    Args:
        x, w: weights and importances, [size, N].
    """

    def __init__(self, x: torch.Tensor, w: torch.Tensor) -> None:
        self.x, self.w, self.wx = x, w, w * x
        self.sw, self.sx, self.sxx = w.sum(0), self.wx.sum(0), (self.wx * x).sum(0)

    def sums(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of w l, w l^2 and w l x, [N] each. ``level`` [size, N] is overwritten."""
        sxl = (self.wx * level).sum(0)
        weighted = self.w * level
        return weighted.sum(0), weighted.mul_(level).sum(0), sxl

    def levels(self, levels: Levels, step: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """The nearest levels with these steps and offsets [N], float32 [size, N]."""
        inverse = _inverse(step)
        if offset is None:
            return levels.nearest_(self.x * inverse)
        return levels.nearest_(torch.addcmul(-offset * inverse, self.x, inverse))

    def error(
        self,
        sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        step: torch.Tensor,
        offset: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sum of w (x - s l - o)^2 of every group, [N]."""
        sl, sll, sxl = sums
        error = self.sxx - 2 * step * sxl + step * step * sll
        if offset is not None:
            error += offset * (offset * self.sw + 2 * (step * sl - self.sx))
        return error

    def best(
        self, sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor], offsets: bool, negative: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Step and offset by least squares for given levels.

        Args:
            sums: of the levels.
            offsets: whether there is an offset.
            negative: whether the offset may not be above 0.
        """
        sl, sll, sxl = sums
        alone = torch.where(sll > 0, sxl / sll, 0)
        if not offsets:
            return alone, None
        determinant = self.sw * sll - sl * sl
        regular = determinant > 1e-6 * self.sw * sll
        step = torch.where(regular, (self.sw * sxl - self.sx * sl) / determinant, 0)
        offset = torch.where(regular, (sll * self.sx - sl * sxl) / determinant, self.sx / self.sw)
        if negative:
            usable = (offset <= 0) & (step >= 0)
            step, offset = torch.where(usable, step, alone.clamp(min=0)), torch.where(usable, offset, 0)
        return step, offset


def _search(
    fit: Fit, levels: Levels, minima: bool, negative: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best step and offset of every group found, [N] each."""
    high, low = fit.x.amax(0), fit.x.amin(0)
    best: tuple[torch.Tensor, torch.Tensor | None] | None = None
    lowest = torch.full_like(high, torch.inf)
    for step, offset in _tries(high, low, levels, minima, negative):
        sums = fit.sums(fit.levels(levels, step, offset))
        found = fit.best(sums, minima, negative)
        best, lowest = _better(best, found, lowest, fit.error(sums, *found))
    assert best is not None  # there are tries
    for _ in range(FITS):
        sums = fit.sums(fit.levels(levels, *best))
        found = fit.best(sums, minima, negative)
        best, lowest = _better(best, found, lowest, fit.error(sums, *found))
    return best


def _better(
    best: tuple[torch.Tensor, torch.Tensor | None] | None,
    found: tuple[torch.Tensor, torch.Tensor | None],
    lowest: torch.Tensor,
    error: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    if best is None:
        return found, error
    better = error < lowest
    step = torch.where(better, found[0], best[0])
    offset = None if found[1] is None or best[1] is None else torch.where(better, found[1], best[1])
    return (step, offset), torch.where(better, error, lowest)


def _tries(
    high: torch.Tensor, low: torch.Tensor, levels: Levels, minima: bool, negative: bool
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Steps and offsets that are tried for groups with these largest and smallest weights [N].

    They put the outermost weight a little inside or outside of the outermost level. Few levels lie far apart,
    so there it can be further outside.
    """
    count = len(levels)
    tries = TRIES if count <= 64 else 5
    if minima:
        if negative:
            low, high = low.clamp(max=0), high.clamp(min=0)
        top = levels.highest
        spans = torch.linspace(top - min(1.2, 0.3 * top), top + min(1.5, 0.4 * top), tries).tolist()
        return [((high - low) / span, low) for span in spans]
    outermost = torch.where(high > -low, high, low)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    unit = -levels.lowest / (count // 2)  # about the distance of levels
    for edge in (levels.lowest, levels.highest) if count <= 32 else (levels.lowest,):
        side = 1 if edge > 0 else -1
        inside, outside = min(2.5, 0.1 * count), min(1.5, 0.1 * count)
        for shift in torch.linspace(-inside, outside, tries).tolist():
            found.append((outermost / (edge + side * shift * unit), None))
    return found


def _plain(x: torch.Tensor, w: torch.Tensor, levels: Levels, minima: bool) -> Fields:
    """Blocks with one step."""
    fit = Fit(x, w)
    step, offset = _search(fit, levels, minima, negative=False)
    step, offset = half(step), None if offset is None else half(offset)
    codes = levels.codes_of(fit.levels(levels, step, offset))
    return Fields(codes.T.contiguous(), step, offset)


def _grouped(x: torch.Tensor, w: torch.Tensor, levels: Levels, groups: GroupScales, minima: bool) -> Fields:
    """Blocks whose groups have steps in few bits."""
    fit = Fit(x, w)
    step, offset = _search(fit, levels, minima, negative=True)
    count = groups.groups
    by_block = step.view(-1, count)
    if groups.lowest < 0:
        largest = by_block.gather(1, by_block.abs().argmax(1, keepdim=True))[:, 0]
        scale = half(largest / groups.lowest)
    else:
        scale = half(by_block.amax(1) / groups.highest)
    minimum = None if offset is None else half((-offset).view(-1, count).amax(1) / groups.highest)
    lower = max(groups.lowest, -groups.highest - 1)
    scales = torch.zeros_like(step)
    mins: torch.Tensor | None = None
    for turn in range(FITS):
        scales, mins, level = _group_scales(
            fit, levels, step, offset, scale, minimum, count, (lower, groups.highest)
        )
        if turn == FITS - 1:
            break
        scale, minimum = _block_scales(fit, level, scales, mins, scale, minimum, count)
        step = scales * scale.repeat_interleave(count)
        offset = None if mins is None or minimum is None else -mins * minimum.repeat_interleave(count)
    final = Fields(
        x.T.new_zeros((len(scale), 0), dtype=torch.uint8),
        scale,
        minimum,
        scales.view(-1, count).short(),
        None if mins is None else mins.view(-1, count).short(),
    )
    steps, offsets = final.grid()
    level = fit.levels(levels, steps.flatten(), None if offsets is None else offsets.flatten())
    final.codes = levels.codes_of(level).T.reshape(len(scale), -1).contiguous()
    return final


def _group_scales(
    fit: Fit,
    levels: Levels,
    step: torch.Tensor,
    offset: torch.Tensor | None,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    count: int,
    bounds: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Scales and minima of groups [N], whole numbers, near ``step`` and ``offset``, and the levels."""
    unit = scale.repeat_interleave(count)
    middle = (step * _inverse(unit)).round_()
    depth = None if minimum is None else minimum.repeat_interleave(count)
    lowest = torch.full_like(step, torch.inf)
    best, best_depth = middle, None if depth is None else torch.zeros_like(step)
    for shift in (0, -1, 1):
        scales = (middle + shift).clamp_(*bounds)
        tried = scales * unit
        level = fit.levels(levels, tried, offset)
        sums = fit.sums(level)
        depths = None
        if depth is not None:
            wanted = (tried * sums[0] - fit.sx) / fit.sw
            depths = (wanted * _inverse(depth)).round_().clamp_(0, bounds[1])
        error = fit.error(sums, tried, None if depths is None or depth is None else -depths * depth)
        better = error < lowest
        lowest = torch.where(better, error, lowest)
        best = torch.where(better, scales, best)
        if depths is not None and best_depth is not None:
            best_depth = torch.where(better, depths, best_depth)
    found = None if best_depth is None or depth is None else -best_depth * depth
    return best, best_depth, fit.levels(levels, best * unit, found)


def _block_scales(
    fit: Fit,
    level: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    scale: torch.Tensor,
    minimum: torch.Tensor | None,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and dmin of blocks by least squares, for given codes and scales of groups."""

    def of_block(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, count).sum(1)

    sl, sll, sxl = fit.sums(level)
    aa, ax = of_block(scales * scales * sll), of_block(scales * sxl)
    if mins is None or minimum is None:
        return half(torch.where(aa > 0, ax / aa, scale)), None
    bb, bx = of_block(mins * mins * fit.sw), -of_block(mins * fit.sx)
    ab = -of_block(scales * mins * sl)
    determinant = aa * bb - ab * ab
    regular = determinant > 1e-6 * aa * bb
    found = torch.where(regular, (bb * ax - ab * bx) / determinant, scale)
    depth = torch.where(regular, (aa * bx - ab * ax) / determinant, minimum)
    usable = (found > 0) & (depth >= 0)
    return half(torch.where(usable, found, scale)), half(torch.where(usable, depth, minimum))
