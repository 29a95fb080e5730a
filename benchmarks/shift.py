"""A network in C on a RISC-V, by shifts and in int8: ``python -m benchmarks.shift [--json PATH]``.

Instructions of one prediction are counted by QEMU; flash is code and tables, RAM the static buffer and the stack of a
prediction. All are built by the same compiler, from the same kernels but for the products:

- `lists`, `packed`: both layouts of `export_c`, on RV32I, which has no multiplier;
- `int8, software`: weights of 8 bits on RV32I, a multiplication as shifts and additions for four pixels at once;
- `int8, routine`: the same, multiplied by the compiler's routine;
- `int8, hardware`: the same on RV32IM, which has a multiplier.

Each must predict the logits of its network. Weights of 8 bits are those of the network in floating point, rounded
uniformly; they go through the scaling of the shifts' network, so their logits mean nothing, but cost what others cost.
Instructions are not cycles: a multiplier may take several.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from benchmarks import emulator
from benchmarks.emulator import RV32I, RV32IM, Machine
from inq_lightning import IntegerNetwork, lower, quantize
from inq_lightning.core.activations import calibrate_activations, quantize_activations
from inq_lightning.integer.c import Program, write
from inq_lightning.integer.operations import Product
from inq_lightning.integer.weights import Table, rows_of
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import ResNetCIFAR, SmallCNN

LEVELS = ("-Os", "-O2", "-O3")
KERNELS = emulator.SOURCES.parents[1] / "inq_lightning" / "integer" / "firmware"
Row = dict[str, Any]


class Int8Program(Program):
    """The same with a byte for each weight."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__(network, "packed")

    @override
    def encode(self, op: Product) -> Table:
        self.code_bytes = self.row_code_bytes = 1
        rows = rows_of(op)
        return Table(rows.flatten().tolist(), (rows.shape[1],), [], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--bits", type=int, default=4, help="code length of a weight")
    options = parser.parse_args()
    if emulator.missing():
        parser.error(f"the tools are missing: apt-get install {emulator.missing()}")
    rows: list[Row] = []
    print("| network | kernel | processor | level | instructions | flash | RAM |")
    print("|---|---|---|---|---:|---:|---:|")
    torch.set_num_threads(1)
    for name, (model, calibration, images) in networks().items():
        for row in measure(model, calibration, images, options.bits):
            rows.append({"network": name, "bits": options.bits} | row)
            line = "| {network} | {kernel} | {processor} | {level} | {instructions:,} | {flash:,} | {ram:,} |"
            print(line.format(**rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Each in floating point, inputs to calibrate it by, and inputs to predict; the last two are not trained."""
    torch.manual_seed(0)
    data = DigitsDataModule(seed=0)
    data.setup()
    digits, test = (
        torch.cat([batch[0] for batch in loader()]) for loader in (data.val_dataloader, data.test_dataloader)
    )
    larger = nn.functional.interpolate(digits, (16, 16), mode="bilinear").flatten(1)
    sizes = (256, 64, 64, 64)
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    photos = torch.randn(64, 3, 32, 32)
    return {
        "SmallCNN, 8×8": (trained(SmallCNN(), data), digits, test[:4]),
        "256-64-64-64-10": (nn.Sequential(*hidden, nn.Linear(64, 10)), larger, larger[:4]),
        "ResNet-20, 32×32": (ResNetCIFAR(20), photos, photos[:1]),
    }


def trained(model: nn.Module, data: DigitsDataModule) -> nn.Module:
    """A few epochs, so that scalings are what they are in a network of use."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    images, labels = (torch.cat(part) for part in zip(*data.train_dataloader(), strict=True))
    for _ in range(12):
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model


def measure(model: nn.Module, calibration: Tensor, images: Tensor, bits: int) -> Iterator[Row]:
    """All kernels of one network, at each level of optimization."""
    model.train()
    with torch.no_grad():
        for _ in range(20):  # so that running statistics fit
            model(calibration)
    floats = [m.weight.detach().clone() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model = quantize(model.eval(), [calibration], bits=bits).model.eval()
    quantize_activations(model, 8)
    calibrate_activations(model, [calibration])
    network = lower(model, calibration)
    bytes_ = rounded(network, floats)
    kinds: list[tuple[str, Program, Path, Machine, tuple[str, ...]]] = [
        ("lists", Program(network, "lists"), KERNELS / "lists.h", RV32I, ()),
        ("packed", Program(network, "packed"), KERNELS / "packed.h", RV32I, ()),
    ]
    for kernel, machine, more in (
        ("int8, software", RV32I, ("-DINQ_SOFTWARE",)),
        ("int8, routine", RV32I, ("-lgcc",)),
        ("int8, hardware", RV32IM, ()),
    ):
        kinds.append((kernel, Int8Program(bytes_), emulator.SOURCES / "int8.h", machine, more))
    with TemporaryDirectory() as place:
        for i, (kernel, program, weights, machine, more) in enumerate(kinds):
            folder = Path(place) / str(i)
            write(program, folder, images, weights)
            for level in LEVELS:
                built = emulator.build(folder, machine, level, *more)
                yield {
                    "kernel": kernel,
                    "processor": machine.march.upper(),
                    "level": level,
                    "instructions": emulator.instructions(folder, machine, level, *more),
                    "flash": emulator.flash(folder, machine, level, *more),
                    "ram": program.buffer_bytes + emulator.stack(built, machine),
                }


def rounded(network: IntegerNetwork, weights: list[Tensor]) -> IntegerNetwork:
    """The network with weights of 8 bits, in the order of its products."""
    rest = iter(weights)
    operations = []
    for operation in network.operations:
        if isinstance(operation, Product):
            weight = next(w for w in rest if w.shape == operation.weight.shape)
            steps = (weight * (127 / weight.abs().max())).round().to(torch.int32)
            operation = replace(operation, weight=steps)
        operations.append(operation)
    return replace(network, operations=tuple(operations))


if __name__ == "__main__":
    main()
