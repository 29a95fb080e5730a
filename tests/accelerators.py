"""Networks whose weights fit the number formats of accelerators."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from inq_lightning import PowerOfTwoGrid
from inq_lightning.formats.accelerator import NUMBER_FORMATS


def on_grid(shape: tuple[int, ...], grid: PowerOfTwoGrid, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    m = 0 if grid.n1 is None else grid.magnitudes
    codes = torch.randint(-m, m + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return grid.decode(codes, dtype)


def quantize(model: nn.Module, bits: int) -> nn.Module:
    """Round every weight matrix and kernel of a network."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(PowerOfTwoGrid.from_weights(p, bits).quantize(p))
    return model.eval()


@st.composite
def grids_and_dtypes(draw: st.DrawFn) -> tuple[str, PowerOfTwoGrid, torch.dtype]:
    target = draw(st.sampled_from(sorted(NUMBER_FORMATS)))
    bits = draw(st.integers(2, NUMBER_FORMATS[target].max_bits))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    lowest, highest = {torch.float16: (-24, 15), torch.bfloat16: (-133, 127)}.get(dtype, (-149, 127))
    magnitudes = 1 << bits - 2
    # Where the scale fits: E8M0 or a normal float32, see scale_exponent.
    below = {"mxfp4": -127 + 2, "mxfp6": -127 + 4, "fp8": -126 + 8, "int8": -126 + magnitudes - 1}[target]
    n1 = draw(st.none() | st.integers(max(below, lowest + magnitudes - 1), highest))
    return target, PowerOfTwoGrid(n1, bits), dtype
