"""The mathematics of one layer: the levels with which its outputs come nearest to those that are wanted.

All matrices have a leading dimension of groups, for grouped convolutions: one for everything else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of the inputs' second moments
SWEEPS = 10  # of coordinate descent, at most
_BLOCK = 128  # columns whose effect on the others is added up before it is passed on
_SCALES = 8  # candidates an octave for the scale of an output
_OCTAVES = 3  # to either side of the scale at which a row's mean square is that of the levels

Round = Callable[[Tensor], Tensor]


class Moments:
    """Sums over a layer's inputs x, the outputs that are wanted of it, and what it misses of them: e = wanted - actual.

    Attributes:
        count: How many rows went in.
        xx: Sums of x xᵀ, (groups, inputs, inputs).
        xe: Sums of x eᵀ, (groups, inputs, outputs).
        x: Sums of x, (groups, inputs).
        e: Sums of e, (groups, outputs).
        ee: Sums of e², (groups, outputs).
        wanted: Sums of what is wanted, (groups, outputs).
        power: Sums of its squares, (groups, outputs).
    """

    def __init__(self, groups: int, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = zeros(1)
        self.xx, self.xe, self.x = zeros(inputs, inputs), zeros(inputs, outputs), zeros(inputs)
        self.e, self.ee, self.wanted, self.power = (zeros(outputs) for _ in range(4))

    def add(self, x: Tensor, actual: Tensor, wanted: Tensor, groups: slice = slice(None)) -> None:
        """Add rows of inputs (groups, rows, inputs) and outputs (groups, rows, outputs) in float32 or float64."""
        e = wanted - actual
        self.count[groups] += x.shape[1]
        for total, part in (
            (self.xx, x.mT @ x),
            (self.xe, x.mT @ e),
            (self.x, x.sum(1)),
            (self.e, e.sum(1)),
            (self.ee, e.square().sum(1)),
            (self.wanted, wanted.sum(1)),
            (self.power, wanted.square().sum(1)),
        ):
            total[groups] += part

    def about_means(self) -> Moments:
        """The same with x, e and what is wanted less their means, as if a constant were added to each output."""
        about = copy.copy(self)
        x, count = self.x[..., None], self.count[..., None].clamp_min(1)
        about.xx = self.xx - x @ x.mT / count
        about.xe = self.xe - x @ self.e[:, None] / count
        about.ee = self.ee - self.e.square() / count[:, 0]
        about.power = self.power - self.wanted.square() / count[:, 0]
        return about

    def mean_error(self, change: Tensor) -> Tensor:
        """Mean of e, (groups, outputs), once the weights (groups, outputs, inputs) have changed by so much."""
        return (self.e - (change @ self.x[..., None])[..., 0]) / self.count.clamp_min(1)

    def snr_db(self, change: Tensor) -> float:
        """What is wanted over what is missed, in dB, once the weights have changed by so much."""
        missed = self.ee - 2 * (change.mT * self.xe).sum(1) + (change @ self.xx * change).sum(2)
        noise, signal = float(missed.sum()), float(self.power.sum())
        return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf


def damped(xx: Tensor) -> Tensor:
    """Second moments with 1% of their mean added to the diagonal; with 1 where all inputs are zero."""
    amount = DAMPING * xx.diagonal(dim1=1, dim2=2).mean(1)
    amount = torch.where(amount > 0, amount, 1.0)
    return xx + torch.diag_embed(amount[:, None].expand(xx.shape[:2]))


def target(weight: Tensor, xx: Tensor, xe: Tensor) -> Tensor:
    """Before any rounding, the weights (groups, outputs, inputs) that bring the outputs nearest to what is wanted.

    Ridge regression toward the weights that are there: with wanted = x_f · w, (X'X + dI)^-1 (X'X_f + dI) w.
    """
    return weight + torch.cholesky_solve(xe, torch.linalg.cholesky(damped(xx))).mT


def approach(goal: Tensor, xx: Tensor, levels: Tensor, rescale: bool = False) -> tuple[Tensor, Tensor]:
    """Put weights on levels so that the outputs change little.

    Never farther from the goal than each weight's nearest level.

    Args:
        goal: The weights, (groups, outputs, inputs).
        xx: The inputs' second moments, :func:`damped`.
        levels: The levels, ascending.
        rescale: Whether what follows makes up for any positive factor of an output, as a batch norm does; then each
            output's weights are put on the levels at the scale that suits them best.

    Returns:
        The weights on the levels, and each output's factor that brings them nearest to the goal, (groups, outputs).
    """
    between = (levels[1:] + levels[:-1]) / 2

    def nearest(w: Tensor) -> Tensor:
        return levels[torch.bucketize(w.contiguous(), between)]

    order = xx.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    goal = goal.gather(2, order[:, None].expand_as(goal))
    xx = xx.gather(1, order[..., None].expand_as(xx)).gather(2, order[:, None].expand_as(xx))
    scale = fit_scales(goal, nearest) if rescale else torch.ones_like(goal[..., 0])
    scaled = goal * scale[..., None]
    best = nearest(scaled)
    improved = gptq(scaled, xx, nearest)
    best = torch.where((error(improved, scaled, xx) < error(best, scaled, xx))[..., None], improved, best)
    for _ in range(SWEEPS):
        if rescale:
            scaled = goal / best_scale(best, goal, xx)[..., None]
        improved = descend(best, scaled, xx, nearest)
        if torch.equal(improved, best):
            break
        best = improved
    factor = best_scale(best, goal, xx) if rescale else torch.ones_like(scale)
    return torch.empty_like(best).scatter_(2, order[:, None].expand_as(best), best), factor


def error(levels: Tensor, goal: Tensor, xx: Tensor) -> Tensor:
    """Squared error of each output, (groups, outputs)."""
    difference = levels - goal
    return (difference @ xx * difference).sum(2)


def fit_scales(goal: Tensor, round_: Round) -> Tensor:
    """For each row the factor with which rounding changes its direction least, (groups, outputs)."""
    size = goal.square().mean(2).sqrt()
    base = torch.where(size > 0, round_(goal).square().mean().sqrt() / size, 1.0)
    best = torch.full_like(base, -1.0)
    scales = base.clone()
    for k in range(-_SCALES * _OCTAVES, _SCALES * _OCTAVES + 1):
        candidate = base * 2.0 ** (k / _SCALES)
        levels = round_(goal * candidate[..., None])
        cosine = (levels * goal).sum(2) / levels.square().sum(2).sqrt().clamp_min(1e-300)
        better = cosine > best
        best, scales = torch.where(better, cosine, best), torch.where(better, candidate, scales)
    return scales


def gptq(goal: Tensor, xx: Tensor, round_: Round) -> Tensor:
    """Round column after column, each one's error pushed onto those to come (Frantar et al., ICLR 2023)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(xx))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rest = goal.mT.clone(memory_format=torch.contiguous_format)  # a column's weights lie side by side
    levels = torch.empty_like(rest)
    for start in range(0, rest.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        part, own = rest[:, block], factor[:, block, block]
        errors = torch.empty_like(part)
        for j in range(part.shape[1]):
            levels[:, start + j] = round_(part[:, j])
            torch.sub(part[:, j], levels[:, start + j], out=errors[:, j]).div_(own[:, j, j, None])
            part[:, j + 1 :].addcmul_(own[:, j, j + 1 :, None], errors[:, j, None], value=-1)
        rest[:, start + _BLOCK :] -= factor[:, block, start + _BLOCK :].mT @ errors
    return levels.mT


def descend(levels: Tensor, goal: Tensor, xx: Tensor, round_: Round) -> Tensor:
    """One sweep of coordinate descent: each weight takes the level that is best given all others."""
    levels = levels.mT.clone(memory_format=torch.contiguous_format)
    slope = xx @ (levels - goal.mT)
    for start in range(0, levels.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        before = levels[:, block].clone()
        part, own = slope[:, block], xx[:, block, block]
        for j in range(part.shape[1]):
            old = levels[:, start + j]
            new = round_(old - part[:, j] / own[:, j, j, None])
            part.addcmul_(own[:, :, j, None], (new - old)[:, None])
            levels[:, start + j] = new
        slope[:, start + _BLOCK :] += xx[:, start + _BLOCK :, block] @ (levels[:, block] - before)
    return levels.mT


def best_scale(levels: Tensor, goal: Tensor, xx: Tensor) -> Tensor:
    """The factor with which each row of levels comes nearest to the goal, (groups, outputs); 1 where none helps."""
    moved = levels @ xx
    scale = (moved * goal).sum(2) / (moved * levels).sum(2).clamp_min(1e-300)
    return torch.where(scale > 0, scale, 1.0)
