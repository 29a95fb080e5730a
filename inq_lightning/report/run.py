"""What a run did to a network, as JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inq_lightning._common import atomic
from inq_lightning.core.coverage import Coverage
from inq_lightning.core.layer import Layer, plain_name
from inq_lightning.core.size import size_of


@dataclass(frozen=True)
class Report:
    """Before and after of one quantization.

    Attributes:
        before: Test metrics of the full-precision network.
        after: Test metrics of the quantized network.
        quantized_fraction: Share of the selected weights that are frozen.
        bits: Code lengths in use, ascending.
        levels_used: The largest number of different values in any quantized tensor.
        levels_allowed: How many its grid has.
        bytes_before: Size of all parameters as they are in memory.
        bytes_after: The same with every quantized parameter at its bits a weight.
        bits_per_weight: ``bytes_after`` as bits, over all parameters' weights.
        seconds: Wall time of pre-training and quantization, tests included.
        coverage: How much of the network's matrices that is, and why the others are not quantized; None where nobody
            has said it.
        integer: Of the network in whole numbers: its test ``metrics``, and what its ``summary`` says; None without one.
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
    coverage: Coverage | None = None
    integer: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        layers: Iterable[Layer],
        before: Mapping[str, float],
        after: Mapping[str, float],
        seconds: float,
        coverage: Coverage | None = None,
        integer: Mapping[str, Any] | None = None,
    ) -> Report:
        """Gather what the module and the records of its layers tell.

        Args:
            module: The module that was trained.
            layers: `INQCallback.layers` of the callback that quantized it.
            before: Test metrics of the full-precision network.
            after: Test metrics of the quantized network.
            seconds: Wall time.
            coverage: `INQCallback.coverage`.
            integer: Metrics and summary of the network in whole numbers.
        """
        layers = list(layers)
        widths = {layer.name: layer.bits for layer in layers}
        allowed_in = {layer.name: 1 if layer.grid is None else len(layer.grid.codes) for layer in layers}
        levels = [
            (torch.unique(parameter.detach()).numel(), allowed_in[name])
            for listed, parameter in module.named_parameters()
            if (name := plain_name(listed)) in widths
        ]
        used, allowed = max(levels, default=(0, 0))
        size = size_of(module, widths)
        return cls(
            before=dict(before),
            after=dict(after),
            quantized_fraction=sum(x.frozen for x in layers) / max(1, sum(x.numel for x in layers)),
            bits=sorted(set(widths.values())),
            levels_used=used,
            levels_allowed=allowed,
            bytes_before=size_of(module).bytes,
            bytes_after=size.bytes,
            bits_per_weight=size.bits / size.weights,
            seconds=seconds,
            coverage=coverage,
            integer=None if integer is None else dict(integer),
        )

    def as_dict(self) -> dict[str, Any]:
        """The report's fields for JSON, which has no nan and no infinity: a metric without a finite value is None."""
        values = asdict(self) | {"before": finite(self.before), "after": finite(self.after)}
        if self.integer is not None:
            values["integer"] = self.integer | {"metrics": finite(self.integer["metrics"])}
        return values

    def write(self, path: Path) -> None:
        """Write the report as JSON; ``path`` appears only once it is complete."""
        with atomic(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n")


def print_json(**fields: Any) -> None:
    """Print the fields as one line of JSON, at once."""
    print(json.dumps(fields, allow_nan=False), flush=True)


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics for JSON, which has no nan and no infinity: None in their place."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
