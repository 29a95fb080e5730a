"""Attention and recurrent layers, taken apart into the products they are made of.

Each function here computes what PyTorch's does and calls ``linear(x, weight, bias, group)`` for every product on the
way; what that returns counts only where the output depends on it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional


class LinearLike(Protocol):
    """Multiplies rows by a weight, or by one of several that are stacked in it."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, group: int | None = None) -> Tensor:  # noqa: D102
        ...


_ATTENTION = inspect.signature(functional.multi_head_attention_forward)


def attention(linear: LinearLike, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """:func:`torch.nn.functional.multi_head_attention_forward`, with the last projection as a product of its own."""
    call = _ATTENTION.bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    inputs = given["query"], given["key"], given["value"]
    if given["use_separate_proj_weight"]:
        weights = given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"]
        for x, weight in zip(inputs, weights, strict=True):
            linear(x, weight, None)  # its part of the bias is no parameter of its own
    else:
        for group, x in enumerate(inputs):
            linear(x, given["in_proj_weight"], given["in_proj_bias"], group)
    weight, bias = given["out_proj_weight"], given["out_proj_bias"]
    identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    given.update(out_proj_weight=identity, out_proj_bias=None)
    mixed, *rest = function(*call.args, **call.kwargs)
    return linear(mixed, weight, bias), *rest


def recurrent(linear: LinearLike, function: Callable[..., Any], *args: Any) -> Any:
    """:func:`torch.lstm`, :func:`torch.gru` and the plain ones; not of packed sequences, nor with projections.

    The products with the hidden state see the states of the network as it is, without what their own rounding will
    make of them.
    """
    result = function(*args)
    if len(args) != 9 or not isinstance(args[2], Sequence):
        return result
    x, state, weights, biases, layers, _, _, both, batch_first = args
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    each = 4 if biases else 2
    if any(len(weight.shape) == 2 and weight.shape[1] != states[0].shape[-1] for weight in weights[1::each]):
        return result
    directions = 2 if both else 1
    if len(weights) != each * layers * directions:
        return result
    time = 1 if batch_first else 0
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            own = weights[k * each : (k + 1) * each]
            start = [s[k : k + 1] for s in states]
            steps = x.flip(time) if direction else x
            hidden = function(
                steps, tuple(start) if len(start) > 1 else start[0], own, biases, 1, 0.0, False, False, batch_first
            )[0]
            first = start[0].transpose(0, 1) if batch_first else start[0]
            before = torch.cat([first, hidden.narrow(time, 0, hidden.shape[time] - 1)], time)
            linear(steps, own[0], own[2] if biases else None)
            linear(before, own[1], own[3] if biases else None)
            outputs.append(hidden.flip(time) if direction else hidden)
        x = torch.cat(outputs, -1)
    return result


def cell(linear: LinearLike, function: Callable[..., Any], *args: Any) -> Any:
    """:func:`torch.lstm_cell`, :func:`torch.gru_cell` and the plain ones."""
    x, state, ih, hh, *biases = args
    hidden = state[0] if isinstance(state, (tuple, list)) else state
    bias_ih, bias_hh = biases or (None, None)
    linear(x, ih, bias_ih)
    linear(hidden, hh, bias_hh)
    return function(*args)


#: What takes each function apart.
COMPOSITES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    functional.multi_head_attention_forward: attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), recurrent),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), cell),
}
