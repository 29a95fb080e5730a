"""What other programs do with the files: the decoder of the specification, ONNX Runtime in node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from torch import Tensor, nn

from inq_lightning import Levels, PowerOfTwoGrid, export_onnx, save_packed

FAMILIES: list[tuple[int, Any]] = [
    *((bits, "paper") for bits in range(2, 9)),
    *((bits, "full") for bits in range(2, 8)),
    *((bits, "dense") for bits in range(2, 8)),
    (4, Levels(zero=True, exponents=(0, 1, 5))),
    (3, Levels(zero=False, exponents=(0, 1, 2, 3))),
]


def code(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def network(bits: int, family: Any) -> nn.Sequential:
    torch.manual_seed(bits)
    net = nn.Sequential(nn.Linear(8, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 4)).eval()
    grid = PowerOfTwoGrid(-1, bits, family=family)
    for layer in (net[0], net[3]):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        weight.data = grid.decode(grid.encode(grid.quantize(weight.data)))
    return net


def test_the_decoder_of_the_specification_is_of_forty_lines_and_reads_every_grid(tmp_path: Path) -> None:
    decoder, _ = code("reference/packed-file.md", "python")
    functions = decoder[decoder.index("def read") :]
    assert len([line for line in functions.splitlines() if line]) <= 40
    names: dict[str, Any] = {}
    exec(compile(decoder, "packed-file.md", "exec"), names)
    for bits, family in FAMILIES:
        net = network(bits, family)
        save_packed(net, tmp_path / "net.safetensors")
        read = names["read"](tmp_path / "net.safetensors")
        assert read.keys() == net.state_dict().keys()
        for name, tensor in net.state_dict().items():
            assert np.array_equal(read[name], tensor.numpy()), (bits, family, name)


@pytest.mark.slow
def test_node_computes_what_torch_does(tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs node and npm")
    install = [npm, "install", "--no-audit", "--no-fund", "onnxruntime-web"]
    if subprocess.run(install, cwd=tmp_path, capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("npm cannot install onnxruntime-web here")
    (script,) = code("how-to/deploy.md", "js")
    (tmp_path / "run.mjs").write_text(script)
    for bits in range(2, 9):
        net = network(bits, {2: "dense", 3: "dense", 4: "full"}.get(bits, "paper"))
        export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8))
        done = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
        torch.testing.assert_close(logits, net(torch.full((1, 8), 0.5))[0].detach(), rtol=1e-4, atol=1e-5)
