"""What a run did to a network, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.markup import escape
from rich.table import Table
from torch import nn

from inq_lightning.frontends.lightning.callback import INQCallback
from inq_lightning.frontends.lightning.find import find_inq
from inq_lightning.frontends.lightning.monitor import size_of


@dataclass(frozen=True)
class Report:
    """Before and after of one quantization.

    Attributes:
        before: Test metrics of the full-precision network.
        after: Test metrics of the quantized network.
        quantized_fraction: Share of the selected weights that are frozen.
        bits: Code lengths in use, ascending.
        levels_used: The largest number of different values in any quantized tensor.
        levels_allowed: How many its bit width allows.
        bytes_before: Size of all parameters as they are in memory.
        bytes_after: The same with every quantized parameter at its bits a weight.
        bits_per_weight: ``bytes_after`` as bits, over all parameters' weights.
        seconds: Wall time of pre-training and quantization, tests included.
    """

    before: dict[str, float]
    after: dict[str, float]
    quantized_fraction: float
    bits: list[int]
    levels_used: int
    levels_allowed: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float

    @classmethod
    def of(
        cls,
        module: nn.Module,
        callback: INQCallback,
        before: Mapping[str, float],
        after: Mapping[str, float],
        seconds: float,
    ) -> Report:
        """Gather what the module and its callback tell.

        Args:
            module: The module that was trained.
            callback: The callback that quantized it.
            before: Test metrics of the full-precision network.
            after: Test metrics of the quantized network.
            seconds: Wall time.
        """
        widths = {layer.name: layer.bits for layer in callback.layers}
        size = size_of(module, callback.layers)
        bytes_before, levels = 0, []
        for name, parameter in module.named_parameters():
            name = name.replace("_orig_mod.", "")
            bytes_before += parameter.numel() * parameter.element_size()
            if name in widths:
                levels.append((int(torch.unique(parameter.detach()).numel()), (1 << (widths[name] - 1)) + 1))
        used, allowed = max(levels, default=(0, 0))
        return cls(
            before=dict(before),
            after=dict(after),
            quantized_fraction=callback.quantized_fraction,
            bits=sorted(set(widths.values())),
            levels_used=used,
            levels_allowed=allowed,
            bytes_before=bytes_before,
            bytes_after=(int(size.bits) + 7) // 8,
            bits_per_weight=float(size.compute()),
            seconds=seconds,
        )

    def table(self) -> Table:
        """The report as a table for a terminal."""
        table = Table(title="Incremental Network Quantization")
        table.add_column("")
        table.add_column("full precision", justify="right")
        table.add_column("quantized", justify="right")
        for metric in self.before | self.after:
            table.add_row(escape(metric), _number(self.before.get(metric)), _number(self.after.get(metric)))
        table.add_row("quantized fraction", "0", f"{self.quantized_fraction:.6g}")
        table.add_row("bits of a quantized weight", "", _list(self.bits))
        table.add_row("levels in use", "", f"{self.levels_used} of {self.levels_allowed}")
        table.add_row("size of all parameters", _bytes(self.bytes_before), _bytes(self.bytes_after))
        table.add_row("bits a parameter", "", f"{self.bits_per_weight:.2f}")
        table.add_row("time", "", f"{self.seconds:.1f} s")
        return table

    def as_dict(self) -> dict[str, Any]:
        """The report's fields for JSON, which has no nan and no infinity: a metric without a finite value is None."""
        return asdict(self) | {"before": _finite(self.before), "after": _finite(self.after)}

    def write(self, path: Path) -> None:
        """Write the report as JSON; ``path`` appears only once it is complete."""
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class JSONLines(Callback):
    """Prints a line of JSON for each epoch: where the quantization stands, and all metrics.

    ::

        {"event": "epoch", "stage": "quantize", "epoch": 0, "step": 24, "phase": 1, "quantized_fraction": 0.5,
         "metrics": {"train/loss": 0.03, "val/acc": 0.98}}

    Args:
        stage: What is going on, as ``"stage"`` of each line.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        inq = find_inq(trainer)
        if trainer.is_global_zero:
            print_json(
                event="epoch",
                stage=self.stage,
                epoch=trainer.current_epoch,
                step=trainer.global_step,
                phase=inq.phase if inq else 0,
                quantized_fraction=inq.quantized_fraction if inq else 0.0,
                metrics=_finite(metrics),
            )


def print_json(**fields: Any) -> None:
    """Print the fields as one line of JSON, at once."""
    print(json.dumps(fields, allow_nan=False), flush=True)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _bytes(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"
