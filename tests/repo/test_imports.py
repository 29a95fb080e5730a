"""What importing the package costs and what it depends on."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import inq_lightning

ROOT = Path(__file__).parents[2]


def run(code: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_core_needs_neither_lightning_nor_distributed_tensors() -> None:
    run(
        "import sys\n"
        "from inq_lightning import FrozenWeight, Options, PowerOfTwoGrid, Quantizer, Schedule, select_parameters\n"
        "import torch; layer = FrozenWeight('w', torch.nn.Parameter(torch.randn(9))); layer.freeze(0.5)\n"
        "heavy = {'pytorch_lightning', 'torch.distributed.tensor', 'torch.distributed.fsdp', 'hydra'}\n"
        "assert not heavy & sys.modules.keys()"
    )


def test_the_package_itself_imports_nothing_before_a_name_is_used() -> None:
    run("import sys, inq_lightning; inq_lightning.__version__; dir(inq_lightning); assert 'torch' not in sys.modules")


def test_dir_shows_every_public_name_and_each_can_be_imported() -> None:
    names = [name for name in dir(inq_lightning) if not name.startswith("__")]
    assert {*inq_lightning.__all__, "INQTrainerCallback"} == set(names)
    for name in names:
        if name != "INQTrainerCallback" or find_spec("transformers"):
            assert getattr(inq_lightning, name) is not None


def test_a_star_imports_all_that_needs_no_extra() -> None:
    extras = ("transformers", "onnx", "onnxruntime", "torchao", "hydra")
    run(
        f"import sys; sys.modules.update(dict.fromkeys({extras}))\n"
        "from inq_lightning import *\n"
        "import inq_lightning\n"
        "assert set(inq_lightning.__all__) <= set(globals())\n"
        "try: inq_lightning.INQTrainerCallback\n"
        "except ImportError as error: assert 'huggingface' in str(error)\n"
        "else: raise AssertionError"
    )


@pytest.mark.parametrize(
    "first",
    [
        "import inq_lightning.frontends.lightning.callback",
        pytest.param("import lightning.pytorch", marks=pytest.mark.slow),  # the order of the script in test_packages.py
    ],
)
def test_the_callback_is_one_of_both_packages_whatever_was_imported_first(first: str) -> None:
    run(
        f"{first}\n"
        "import lightning.pytorch, pytorch_lightning\n"
        "from inq_lightning import INQCallback, INQMonitor\n"
        "for ours in (INQCallback, INQMonitor):\n"
        "    assert issubclass(ours, lightning.pytorch.Callback)\n"
        "    assert issubclass(ours, pytorch_lightning.Callback)"
    )
