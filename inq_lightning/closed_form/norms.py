"""Norms after a quantized layer: their statistics taken anew, their factors and constants fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inq_lightning.closed_form.solve import Moments


@dataclass(frozen=True)
class Norm:
    """One call of a norm.

    Attributes:
        input: What it normalizes.
        weight: Its factors, one a channel; None without.
        bias: Its constants; None without.
        mean: Running means; None where they are not kept.
        variance: Running variances.
        eps: What is added to the variance.
        channel: The dimension of the channels.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None = None
    variance: Tensor | None = None
    eps: float = 0.0
    channel: int = 1

    @property
    def tensors(self) -> list[Tensor]:
        """All that may change."""
        return [t for t in (self.weight, self.bias, self.mean, self.variance) if t is not None]


def _batch(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Norm:
    if training:
        return Norm(input, weight, bias)
    return Norm(input, weight, bias, running_mean, running_var, eps)


def _layer(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Norm | None:
    return Norm(input, weight, bias, channel=-1) if len(normalized_shape) == 1 else None


def _group(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Norm:
    return Norm(input, weight, bias)


def _instance(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Norm:
    return Norm(input, weight, bias)


def _rms(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: Any = None) -> Norm | None:  # noqa: A002
    return Norm(input, weight, None, channel=-1) if len(normalized_shape) == 1 else None


#: What tells of a call of each function which norm it is; None where it has more than one factor a channel.
NORMS: Mapping[Callable[..., Any], Callable[..., Norm | None]] = {
    functional.batch_norm: _batch,
    functional.layer_norm: _layer,
    functional.group_norm: _group,
    functional.instance_norm: _instance,
    functional.rms_norm: _rms,
}


class Channels:
    """Means, variances and the covariance of what a norm has and what is wanted, channel by channel; float64.

    Attributes:
        count: How many values a channel went in.
        means: Of both, (2, channels).
        spread: Sums of the products about the means: of the first with itself, the second, the two (3, channels).
    """

    def __init__(self) -> None:
        self.count = 0
        self.means = torch.zeros(2, 1, dtype=torch.float64)
        self.spread = torch.zeros(3, 1, dtype=torch.float64)

    @classmethod
    def of(cls, moments: Moments, before: Tensor, levels: Tensor, norm: Norm) -> Channels:
        """What goes into a batch norm and should come out of it, without another pass.

        Args:
            moments: Of the layer before it, with the weights ``before``.
            before: Weights, (groups, outputs, inputs).
            levels: What they have become.
            norm: The full-precision network's norm.
        """
        assert norm.mean is not None
        assert norm.variance is not None
        about, count = moments.about_means(), moments.count
        actual = moments.wanted - moments.e + ((levels - before) @ moments.x[..., None])[..., 0]
        own = (levels @ about.xx * levels).sum(2)
        both = (levels * (before @ about.xx + about.xe.mT)).sum(2)
        factor = (norm.variance.double() + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
        goal = (moments.wanted / count).flatten() - norm.mean
        seen = cls()
        seen.count = int(count[0])
        seen.means = torch.stack(
            [(actual / count).flatten(), goal * factor + (0.0 if norm.bias is None else norm.bias)]
        )
        seen.spread = torch.stack([own.flatten(), about.power.flatten() * factor.square(), both.flatten() * factor])
        return seen

    def add(self, actual: Tensor, wanted: Tensor, channel: int) -> None:
        """Add values of the same shape, float32 or float64."""
        both = torch.stack([t.movedim(channel, 0).flatten(1) for t in (actual, wanted)])
        count = both.shape[2]
        means = both.mean(2, keepdim=True)
        both = both - means
        means = means[..., 0].double()
        spread = torch.stack([(a * b).sum(1) for a, b in (both[[0, 0]], both[[1, 1]], both)]).double()
        # Sums about means that differ (Chan, Golub and LeVeque, 1979).
        total = self.count + count
        apart = means - self.means.to(means.device)
        between = torch.stack([apart[0] ** 2, apart[1] ** 2, apart[0] * apart[1]])
        self.spread = self.spread.to(means.device) + spread + between * (self.count * count / total)
        self.means = self.means.to(means.device) + apart * (count / total)
        self.count = total


def refit(norm: Norm, seen: Channels) -> None:
    """Change a norm so that its output is nearest to what is wanted, in place.

    Its factors are the geometric mean of two: the regression onto what is wanted, which makes the error smallest, and
    the ratio of the standard deviations, which keeps the size of what comes out. A channel that is constant keeps its
    factor.

    Args:
        norm: The norm.
        seen: What it normalizes where it keeps running statistics, else what comes out of it; and what should.
    """
    own, wanted, both = seen.spread
    mean, goal = seen.means
    alive = (own > 0) & (wanted > 0)
    regression = (both / own).clamp_min(0)
    factor = torch.where(alive, (regression * (wanted / own).sqrt()).sqrt(), 1.0)
    if norm.mean is not None and norm.variance is not None:
        variance = own / seen.count
        factor = torch.where(alive, factor * (variance + norm.eps).sqrt(), 1.0 if norm.weight is None else norm.weight)
        norm.mean.copy_(mean)
        norm.variance.copy_(variance)
        if norm.weight is not None:
            norm.weight.copy_(factor)
        if norm.bias is not None:
            norm.bias.copy_(goal)
        return
    if norm.bias is not None:
        norm.bias.copy_(goal - factor * (mean - norm.bias))
    if norm.weight is not None:
        norm.weight.mul_(factor)
