from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import emulator, shift
from benchmarks.emulator import RV32E, RV32EC, RV32I, RV32IM
from inq_lightning import lower, quantize
from inq_lightning.core.activations import calibrate_activations, quantize_activations
from inq_lightning.integer.c import export_c, write
from inq_lightning.integer.network import IntegerNetwork
from inq_lightning.integer.operations import (
    Average,
    Concat,
    Max,
    Operation,
    Pad,
    Product,
    Reshape,
    Scale,
    Slice,
    Sum,
)
from inq_lightning.integer.scaling import Scaling
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN

LAYOUTS = ("packed", "lists")
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Wcast-align", "-g"]
SANITIZED = [*STRICT, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc on Linux")
riscv = pytest.mark.skipif(bool(emulator.missing()), reason=f"needs apt-get install {emulator.PACKAGES}")


def integers(
    net: nn.Module, images: Tensor, bits: int, activation_bits: int = 8, terms: int | None = None
) -> IntegerNetwork:
    """The network in whole numbers, without training."""
    net.train()
    with torch.no_grad():
        for _ in range(20):  # so that running statistics fit
            net(images)
    model = quantize(net.eval(), [images], bits=bits).model.eval()
    quantize_activations(model, activation_bits)
    calibrate_activations(model, [images])
    return lower(model, images, terms=terms)


def check(network: IntegerNetwork, folder: Path, images: Tensor) -> None:
    """Both layouts, as C on this computer, give every logit of the definition."""
    for layout in LAYOUTS:
        export_c(network, folder / layout, layout, images)
        command = ["gcc", *SANITIZED, "inq_test.c", "inq_network.c", "-o", "inq_test"]
        subprocess.run(command, cwd=folder / layout, check=True)
        done = subprocess.run([folder / layout / "inq_test"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), f"{layout}: {done.stdout}{done.stderr}"
        count = len(images) * network.operations[-1].elements
        assert done.stdout == f"0 of {count} logits differ\n"


@pytest.fixture(scope="module")
def digits() -> tuple[IntegerNetwork, Tensor]:
    """SmallCNN with 4-bit weights and 8-bit activations, and all test images."""
    torch.manual_seed(0)
    data = DigitsDataModule(seed=0)
    data.setup()
    images = torch.cat([batch[0] for batch in data.val_dataloader()])
    net = SmallCNN()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for x, y in (batch for _ in range(4) for batch in data.train_dataloader()):
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return integers(net, images, 4, terms=3), torch.cat([batch[0] for batch in data.test_dataloader()])


def test_every_logit_of_all_test_images_is_that_of_the_network(
    digits: tuple[IntegerNetwork, Tensor], tmp_path: Path
) -> None:
    network, images = digits
    assert len(images) > 400
    check(network, tmp_path, images)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_every_width_of_weights_and_activations(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    images = torch.randn(64, 2, 5, 7)
    net = nn.Sequential(
        nn.Conv2d(2, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3)
    )
    check(integers(net, images, bits, activation_bits=bits), tmp_path, images)


class Both(nn.Module):
    """Values behind one another."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)


class Everything(nn.Module):
    """Each operation that an integer network has, in shapes that leave remainders."""

    def __init__(self) -> None:
        super().__init__()
        self.pointwise = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(8), nn.ReLU6())
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.grouped = nn.Sequential(nn.Conv2d(8, 12, (2, 3), (2, 1), (1, 0), groups=4, bias=False), nn.ReLU())
        self.average = nn.AvgPool2d(2, 1, 1)
        self.uneven = nn.Sequential(nn.Conv2d(12, 6, 2, padding="same"), nn.ReLU())
        self.both = Both()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.pointwise(x)
        b = self.relu(a + self.depthwise(a))
        c = self.grouped(self.pool(functional.pad(b, (1, 0, 0, 1))))
        d = self.uneven(self.average(c))
        return self.linear(self.mean(self.both(d[:, :, 1:, :4], c[:, ::2])).flatten(1))


def test_every_operation(tmp_path: Path) -> None:
    torch.manual_seed(1)
    images = torch.randn(32, 3, 9, 11)
    network = integers(Everything(), images, 4)
    kinds = {type(operation) for operation in network.operations}
    assert kinds >= {Product, Sum, Average, Max, Pad, Slice, Concat}
    check(network, tmp_path, images)


# ---- networks that training does not make ----------------------------------------------------------------------------


def plain(channels: int, right: int = 0, low: int = -(1 << 31), high: int = (1 << 31) - 1) -> Scaling:
    ones = torch.ones(1, channels, dtype=torch.int32)
    return Scaling(ones, 0 * ones, 0 * ones[0], right + 0 * ones[0], low, high)


def product(source: int, weight: Tensor, shape: tuple[int, ...], name: str = "layer", **options: Any) -> Product:
    scaling = options.pop("scaling", plain(len(weight)))
    peak = 1 << 30
    limits = {"low": max(scaling.low, -peak), "high": min(scaling.high, peak), "peak": peak}
    return Product(
        name=name, sources=(source,), shape=shape, exponent=0, weight=weight, unit=0, bits=5, scaling=scaling,
        sums=peak, **limits, **options,
    )  # fmt: skip


def powers(*shape: int, most: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(0, most + 1, shape, generator=generator)
    signs = torch.randint(-1, 2, shape, generator=generator)
    return (signs << exponents).to(torch.int32)


def network_of(shape: tuple[int, ...], low: int, high: int, *operations: Operation) -> IntegerNetwork:
    return IntegerNetwork(shape, 0, low, high, operations)


def extremes(network: IntegerNetwork, count: int = 6) -> Tensor:
    """Steps at random, all largest, all least."""
    generator = torch.Generator().manual_seed(0)
    low, high = network.input_low, network.input_high
    images = torch.randint(low, high + 1, (count, *network.shape), generator=generator)
    images[0], images[1] = low, high
    return images


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127)])
def test_more_equal_weights_than_sixteen_bits_hold(low: int, high: int, tmp_path: Path) -> None:
    ones = torch.ones(2, 70, 3, 3, dtype=torch.int32)
    ones[1] *= -1
    network = network_of((70, 3, 4), low, high, product(0, ones, (2, 1, 2)), product(0, ones * 8, (2, 1, 2)))
    check(network, tmp_path, extremes(network))


def test_values_of_more_than_eight_bits_go_through_every_kind_of_layer(tmp_path: Path) -> None:
    wide = {"name": "wide", "exponent": 0, "low": -1 << 15, "high": 1 << 15, "peak": 1 << 15}
    scale = Scale(sources=(0,), shape=(3, 5, 5), scaling=plain(3, 0, -1 << 15, 1 << 15), sums=128, **wide)
    join = Concat(sources=(1, 0), shape=(6, 5, 5), lefts=(8, 3), axis=1, **wide)
    convolution = product(2, powers(4, 6, 3, 3), (4, 5, 5), padding=(1, 1, 1, 1), scaling=plain(4, 3))
    pool = Max(sources=(3,), shape=(4, 2, 2), kernel=(2, 2), stride=(2, 2), **wide | {"low": -1 << 30, "high": 1 << 30})
    flat = Reshape(sources=(4,), shape=(16,), **wide | {"low": -1 << 30, "high": 1 << 30})
    linear = product(5, powers(3, 16, most=1), (3,), scaling=plain(3, 4))
    network = network_of((3, 5, 5), -128, 127, scale, join, convolution, pool, flat, linear)
    check(network, tmp_path, extremes(network))


def test_half_is_rounded_to_even_on_both_sides_of_zero(tmp_path: Path) -> None:
    scaling = Scaling(
        torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([[0], [0]], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32),
    )  # fmt: skip
    op = Scale(name="s", sources=(0,), shape=(256,), exponent=0, low=-32, high=32, peak=130, scaling=scaling, sums=128)
    network = network_of((256,), -128, 127, op)
    check(network, tmp_path, torch.arange(-128, 128)[None])


def test_what_layers_are_called_does_no_harm(tmp_path: Path) -> None:
    names = ["a */ int x; /*", "ende\\", "größe ??/", "", "int"]
    layers = [product(k, powers(4, 4, seed=k), (4,), name, scaling=plain(4, 9, 0, 255)) for k, name in enumerate(names)]
    network = network_of((4,), 0, 255, *layers)
    check(network, tmp_path, extremes(network))


def test_sizes_beyond_the_tables_are_refused_by_name(tmp_path: Path) -> None:
    many = network_of((70_000,), 0, 255, product(0, powers(1, 70_000), (1,), "head"))
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match=r"head: .*at most 65535"):
            export_c(many, tmp_path / "many", layout)
    deep = network_of((9000, 2, 2), 0, 255, product(0, powers(1, 9000, 1, 1), (1, 2, 2), "deep"))
    with pytest.raises(ValueError, match=r"deep: .*list tells.*layout='packed'"):
        export_c(deep, tmp_path / "deep", "lists")
    check_one = export_c(deep, tmp_path / "deep", "packed")
    assert check_one.buffer_bytes >= 9000
    positive = product(0, powers(1, 4), (1,), "above", scaling=plain(1, 0, 3, 9))
    with pytest.raises(ValueError, match=r"above: .*leave out 0"):
        export_c(network_of((4,), 0, 255, positive), tmp_path / "above")
    five = Slice(name="five", sources=(0,), shape=(1,) * 5, exponent=0, low=0, high=9, peak=9, slices=((0, 1, 1),) * 5)
    with pytest.raises(ValueError, match="five: 5 dimensions"):
        export_c(network_of((2,) * 5, 0, 9, five), tmp_path / "five")
    with pytest.raises(ValueError, match="layout must be one of packed, lists, got 'fast'"):
        export_c(deep, tmp_path / "deep", "fast")  # type: ignore[arg-type]
    for images in (torch.zeros(0, 4), torch.zeros(1, 5), torch.tensor([[0, 0, 0, 256]])):
        with pytest.raises(ValueError, match=r"images must be|inputs must be"):
            export_c(network_of((4,), 0, 255, product(0, powers(1, 4), (1,))), tmp_path / "images", images=images)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]  # nothing is left of what was refused


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    network = network_of((4,), 0, 255, product(0, powers(2, 4), (2,)))
    made = export_c(network, tmp_path / "firmware", "lists")
    assert made.folder == tmp_path / "firmware"
    (made.folder / "stale.c").write_text("")
    export_c(network, tmp_path / "firmware", "packed")
    assert not (made.folder / "stale.c").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="mine"):
        export_c(network, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_makefile_tests_what_was_written(tmp_path: Path) -> None:
    network = network_of((4,), -128, 127, product(0, powers(2, 4), (2,)))
    export_c(network, tmp_path / "net")
    done = subprocess.run(["make", "-C", str(tmp_path / "net"), "test"], capture_output=True, text=True, check=True)
    assert "0 of 8 logits differ" in done.stdout
    subprocess.run(["make", "-C", str(tmp_path / "net")], capture_output=True, check=True)


# ---- a processor without a multiplier --------------------------------------------------------------------------------


def multiplications(program: Path) -> Iterator[str]:
    """Instructions that multiply or divide, and routines that do it in software."""
    listing = emulator.run(["riscv64-unknown-elf-objdump", "-d", str(program)])
    yield from re.findall(r"\t((?:mul|div|rem)\w*)\t", listing)
    yield from re.findall(r"__(?:mul|div|mod|udiv|umod)\w+", emulator.run(["riscv64-unknown-elf-nm", str(program)]))


@riscv
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_processor_without_a_multiplier_predicts_all_test_images(
    layout: Any, digits: tuple[IntegerNetwork, Tensor], tmp_path: Path
) -> None:
    network, images = digits
    export_c(network, tmp_path / "net", layout, images)
    for level in ("-Os", "-O2", "-O3"):
        program = emulator.build(tmp_path / "net", RV32I, level)
        assert list(multiplications(program)) == []
        if level != "-O2":
            assert emulator.emulate(program).returncode == 0, level


@riscv
@pytest.mark.parametrize("machine", [RV32E, RV32EC], ids=lambda machine: machine.march)
def test_half_the_registers_are_enough(
    machine: emulator.Machine, digits: tuple[IntegerNetwork, Tensor], tmp_path: Path
) -> None:
    network, images = digits
    for layout in LAYOUTS:
        export_c(network, tmp_path / layout, layout, images[:30])
        program = emulator.build(tmp_path / layout, machine, "-Os")
        assert list(multiplications(program)) == []
        assert emulator.emulate(program, machine).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("arm-none-eabi-gcc") and shutil.which("qemu-system-arm")),
    reason="needs apt-get install gcc-arm-none-eabi qemu-system-arm",
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", ["-Os", "-O3"])
def test_a_cortex_m0_predicts_all_test_images(
    layout: Any, level: str, digits: tuple[IntegerNetwork, Tensor], tmp_path: Path
) -> None:
    network, images = digits
    folder = export_c(network, tmp_path / "net", layout, images).folder
    sources = [str(folder / "inq_network.c"), str(emulator.SOURCES / "cortex.c")]
    flags = [
        "-mcpu=cortex-m0.small-multiply",
        "-mthumb",
        level,
        "-Wl,--section-start=.vectors=0,-Ttext=0x100,-Tdata=0x20000000",
        f"-I{folder}",
    ]
    emulator.run(["arm-none-eabi-gcc", *emulator.FLAGS, *flags, *sources, "-o", str(folder / "m0.elf")])
    listing = emulator.run(["arm-none-eabi-objdump", "-d", str(folder / "m0.elf")])
    assert not re.search(r"\t(mul|[su]div)|__aeabi", listing)
    command = ["qemu-system-arm", "-M", "microbit", "-nographic", "-semihosting", "-kernel", str(folder / "m0.elf")]
    assert subprocess.run(command, timeout=300, stdin=subprocess.DEVNULL).returncode == 0


@riscv
def test_the_emulated_processor_refuses_a_multiplication(tmp_path: Path) -> None:
    network = network_of((4,), 0, 255, product(0, powers(2, 4), (2,)))
    export_c(network, tmp_path / "net")
    source = tmp_path / "net" / "inq_network.c"
    code = source.read_text()
    source.write_text(code.replace("logits)\n{\n", "logits)\n{\n    logits[0] = image[0] * image[1];\n"))
    program = emulator.build(tmp_path / "net", RV32IM)
    assert "mul" in list(multiplications(program))
    assert emulator.emulate(program, RV32I).returncode != 0  # an illegal instruction
    assert emulator.emulate(program, RV32IM).returncode == 0


@riscv
def test_instructions_flash_and_ram_are_what_was_promised(
    digits: tuple[IntegerNetwork, Tensor], tmp_path: Path
) -> None:
    network, images = digits
    made = {layout: export_c(network, tmp_path / layout, layout, images[:3]) for layout in LAYOUTS}
    assert emulator.instructions(tmp_path / "lists", RV32I, "-O3") < 500_000
    assert emulator.instructions(tmp_path / "packed", RV32I, "-O3") < 700_000
    program = emulator.build(tmp_path / "packed", RV32I, "-Os")
    assert emulator.flash(tmp_path / "packed", RV32I, "-Os") <= 16 << 10
    assert made["packed"].buffer_bytes + emulator.stack(program) <= 2 << 10


@riscv
def test_lists_take_fewer_instructions_than_a_hardware_multiplier(
    digits: tuple[IntegerNetwork, Tensor], tmp_path: Path
) -> None:
    network, images = digits
    export_c(network, tmp_path / "lists", "lists", images[:3])
    weights = [op.weight.float() for op in network.operations if isinstance(op, Product)]
    program = shift.Int8Program(shift.rounded(network, weights))
    write(program, tmp_path / "int8", images[:3], emulator.SOURCES / "int8.h")
    multiplied = emulator.instructions(tmp_path / "int8", RV32IM, "-O3")
    assert emulator.instructions(tmp_path / "lists", RV32I, "-O3") < 0.75 * multiplied
