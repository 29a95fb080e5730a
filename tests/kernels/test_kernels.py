from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same_bits
from torch import Tensor

from inq_lightning import PowerOfTwoGrid
from inq_lightning.kernels import KERNELS, ReferenceKernel, kernel_for
from inq_lightning.kernels.reference import _CHUNK

SHAPES = [(), (1,), (7,), (3, 5), (4, 3, 3, 3), (0, 4), (2, _CHUNK // 2 + 3)]


def frozen_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values as FrozenWeight keeps them: +0.0 is free, -0.0 frozen at zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    values = PowerOfTwoGrid(0, 4).quantize(w).to(dtype)
    values = torch.where(values == 0, -0.0, values)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, values, torch.zeros_like(values))


def anything(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Ordinary numbers, with every special one among them."""
    generator = torch.Generator().manual_seed(seed + 1)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-30])
    pick = torch.randint(0, 2 * len(special), shape, generator=generator)
    plain = torch.randn(shape, generator=generator)
    return torch.where(pick < len(special), special[pick % len(special)], plain).to(dtype)


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=12, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    stored=st.sampled_from([torch.bfloat16, torch.float64]),
    seed=st.integers(0, 999),
)
def test_every_kernel_does_what_the_reference_does_bit_for_bit(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, stored: torch.dtype, seed: int
) -> None:
    if stored.itemsize > dtype.itemsize:  # a grid that needs them wide has weights that are
        stored = torch.bfloat16
    values = frozen_values(shape, stored, seed)
    kernel, reference = KERNELS[device](values), ReferenceKernel(values)
    gradients = [anything(shape, dtype, seed) for _ in range(2)]
    kernel.mask_gradient(gradients[0])
    reference.mask_gradient(gradients[1])
    assert same_bits(gradients[0].nan_to_num(7.0), gradients[1].nan_to_num(7.0))
    free = values.view(torch.int16 if stored is torch.bfloat16 else torch.int64) == 0
    assert not gradients[0][~free].any()

    weights = [torch.where(free, anything(shape, dtype, seed).nan_to_num(), torch.ones((), dtype=dtype)) for _ in "ab"]
    kernel.restore(weights[0])
    reference.restore(weights[1])
    assert same_bits(weights[0], weights[1])
    assert torch.equal(weights[0][~free].double(), values[~free].double())
    assert not torch.signbit(weights[0][weights[0] == 0]).any()


def test_values_get_the_kernel_of_their_device_and_the_reference_elsewhere() -> None:
    assert type(kernel_for(torch.zeros(3, dtype=torch.bfloat16))) is KERNELS["cpu"]
    assert type(kernel_for(torch.zeros(3, dtype=torch.bfloat16, device="meta"))) is ReferenceKernel
