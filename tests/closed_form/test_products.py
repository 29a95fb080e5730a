"""Weights, inputs and outputs as matrices whose product is what the function computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inq_lightning.closed_form.products import Product
from inq_lightning.closed_form.watch import Watch


class Record(Watch):
    """Keeps all products."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.products: list[tuple[str, Product, Tensor]] = []

    def on_product(self, name: str, product: Product, output: Tensor) -> None:
        self.products.append((name, product, output))


def convolutions() -> Iterator[nn.Module]:
    for dims, normal, transposed in (
        (1, nn.Conv1d, nn.ConvTranspose1d),
        (2, nn.Conv2d, nn.ConvTranspose2d),
        (3, nn.Conv3d, nn.ConvTranspose3d),
    ):
        kernel: Any = (3, 2, 1)[:dims]
        for groups, stride, padding, dilation in itertools.product((1, 2, 4), (1, 2), (0, 1, "same"), (1, 2)):
            if padding != "same":
                yield normal(4, 8, kernel, stride, padding, dilation, groups)
            elif stride == 1:
                yield normal(4, 8, kernel, stride, padding, dilation, groups, padding_mode="circular")
        for groups, stride, padding, extra in itertools.product((1, 2, 4), (1, 3), (0, 1), (0, 1)):
            yield transposed(4, 8, 3, stride, padding, extra, groups, dilation=2)


def check(record: Record) -> None:
    for _, product, output in record.products:
        layout = product.layout
        matrix = layout.matrix(product.weight)
        assert torch.equal(layout.weight(matrix, product.weight.shape), product.weight)
        bias = 0.0 if product.bias is None else product.bias.reshape(matrix.shape[0], 1, -1)
        group = slice(None) if product.group is None else slice(product.group, product.group + 1)
        bias = bias[group] if isinstance(bias, Tensor) else bias
        for x, y in layout.rows(product.input, output):
            torch.testing.assert_close(x @ matrix[group].mT + bias, y)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_every_convolution_is_a_product_of_its_matrices() -> None:
    torch.manual_seed(0)
    for layer in convolutions():
        layer.double()
        size = (7, 6, 5)[: layer.weight.dim() - 2]  # type: ignore[union-attr, operator]
        for shape in ((2, 4, *size), (4, *size)):
            record = Record(layer)
            with record:
                layer(torch.randn(shape, dtype=torch.float64))
            assert len(record.products) == 1
            check(record)


@torch.no_grad()
def test_linear_layers_are_seen_however_they_are_written() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)
            self.w = nn.Parameter(torch.randn(5, 5))
            self.b = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.addmm(self.b, self.layer(x).flatten(0, 1), self.w)
            return torch.matmul((x @ self.w).mm(self.w), self.w)

    model = Own().double()
    record = Record(model)
    with record:
        model(torch.randn(2, 3, 5, dtype=torch.float64))
    assert [name for name, _, _ in record.products] == ["layer.weight", "w", "w", "w", "w"]
    check(record)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}, {"add_bias_kv": True}])
def test_attention_is_taken_apart_without_changing_it(sizes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes).double().eval()
    q = torch.randn(2, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 6, sizes.get(size, 8), dtype=torch.float64) for size in ("kdim", "vdim"))
    mask = torch.tensor([[False] * 5 + [True]] * 2)
    for options in ({}, {"key_padding_mask": mask}, {"need_weights": False}):
        expected = attention(q, k, v, **options)
        record = Record(attention)
        with record:
            found = attention(q, k, v, **options)
        torch.testing.assert_close(found, expected)
        assert len(record.products) == 4
        check(record)


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
)
def test_recurrent_layers_are_taken_apart_without_changing_them(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    torch.manual_seed(2)
    layer = kind(3, 4, **options).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    record = Record(layer)
    with record:
        found = layer(x)
    torch.testing.assert_close(found, layer(x), rtol=0, atol=0)
    assert {name for name, _, _ in record.products} == {n for n, _ in layer.named_parameters() if "weight" in n}
    check(record)


@torch.no_grad()
def test_what_a_recurrent_layer_multiplies_is_what_goes_in_and_its_previous_state() -> None:
    torch.manual_seed(3)
    layer = nn.LSTM(3, 4, bidirectional=True).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    outputs, _ = layer(x)
    record = Record(layer)
    with record:
        layer(x)
    inputs = {name: product.input for name, product, _ in record.products}
    zero = torch.zeros(1, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(inputs["weight_hh_l0"], torch.cat([zero, outputs[:-1, :, :4]]))
    torch.testing.assert_close(inputs["weight_hh_l0_reverse"], torch.cat([zero, outputs[1:, :, 4:].flip(0)]))


@torch.no_grad()
def test_recurrent_layers_that_cannot_be_taken_apart_compute_as_before() -> None:
    layer = nn.LSTM(3, 4, proj_size=2)
    x = torch.randn(5, 2, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    for model, given in ((layer, x), (nn.LSTM(3, 4), packed)):
        record = Record(model)
        with record:
            model(given)
        assert not record.products
