"""What loggers can show beyond scalars: one adapter a logger, for those that can show something."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pytorch_lightning import Trainer

from inq_lightning.frontends.lightning.base import is_a
from inq_lightning.report.plots import split_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# TensorBoard shows the first hyper-parameters of the table only, and those first that are marked to differ.
_FIRST = ("inq/bits", "inq/exponent", "inq/partition", "inq/portions", "lr", "learning_rate")

_COLUMNS = ".inq"  # how the names end of files that hold the columns of the table


@dataclass(frozen=True)
class TensorBoard:
    """Figures, histograms, a layout of the scalars, and runs to compare."""

    logger: Any

    def keep_first_hyperparameters(self) -> None:
        """Leave out Lightning's placeholder ``hp_metric``: TensorBoard keeps only the first set that a run writes."""
        self.logger._default_hp_metric = False

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a figure."""
        self.logger.experiment.add_figure(tag, figure, step)

    def histogram(self, tag: str, counts: Mapping[int | None, int], step: int) -> None:
        """Show numbers by exponent, one bucket for each exponent, half of it to either side; zeros (None) have none."""
        exponents = sorted(k for k in counts if k is not None)
        if not exponents:
            return
        every = range(exponents[0], exponents[-1] + 1)
        number = [counts.get(k, 0) for k in every]
        self.logger.experiment.add_histogram_raw(
            tag,
            min=every[0] - 0.5,
            max=every[-1] + 0.5,
            num=sum(number),
            sum=sum(k * n for k, n in zip(every, number, strict=True)),
            sum_squares=sum(k * k * n for k, n in zip(every, number, strict=True)),
            bucket_limits=[k + 0.5 for k in every],
            bucket_counts=number,
            global_step=step,
        )

    def group(self, metrics: Sequence[str]) -> None:
        """Write the layout of its custom scalars, see :func:`layout`."""
        self.logger.experiment.add_custom_scalars(layout(metrics))

    def compare(self, hparams: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """Write what its HPARAMS tab compares, in this order: hyper-parameters, and which scalars are the result."""
        with contextlib.suppress(ModuleNotFoundError):  # the logger writes through tensorboardX
            from torch.utils.tensorboard.summary import hparams as summarize

            texts = {name: str(value) if isinstance(value, bool) else value for name, value in hparams.items()}
            experiment, *session = summarize(texts, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
            plugin = experiment.value[0].metadata.plugin_data
            content = import_module("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData()
            content.ParseFromString(plugin.content)
            for info in content.experiment.hparam_infos:
                info.differs = info.name in _FIRST
            plugin.content = content.SerializeToString()
            for summary in (experiment, *session):
                self.logger.experiment.file_writer.add_summary(summary)
            self._write_first(experiment)

    def _write_first(self, experiment: Any) -> None:
        """Write the columns of the table where TensorBoard looks first: into the folder that holds the runs.

        It takes the columns from one run only, with ``--load_fast=false`` from the first by name that has any, and
        another run may have neither INQ's settings nor its metrics. The last run to end decides.
        """
        from torch.utils.tensorboard.writer import FileWriter

        folder, own = Path(self.logger.root_dir), Path(self.logger.log_dir)
        if folder == own or not folder.is_dir():  # the run itself, or a store that is no folder
            return
        before = list(folder.glob(f"events.*{_COLUMNS}"))
        writer = FileWriter(str(folder), filename_suffix=_COLUMNS)
        writer.add_summary(experiment)
        writer.close()
        for file in before:
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class WandB:
    """Figures."""

    logger: Any

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a figure."""
        self.logger.log_image(tag, [figure], step)


@dataclass(frozen=True)
class MLflow:
    """Figures, as files of the run."""

    logger: Any

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a figure."""
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{tag}/{step:08d}.png")


Adapter: TypeAlias = TensorBoard | WandB | MLflow
_ADAPTERS: dict[str, type[Adapter]] = {
    "TensorBoardLogger": TensorBoard,
    "WandbLogger": WandB,
    "MLFlowLogger": MLflow,
}


def adapters(trainer: Trainer) -> list[Adapter]:
    """An adapter for each of the Trainer's loggers that takes figures."""
    return [adapter(x) for x in trainer.loggers for name, adapter in _ADAPTERS.items() if is_a(x, name)]


def tensorboards(trainer: Trainer) -> list[TensorBoard]:
    """Those for TensorBoard."""
    return [adapter for adapter in adapters(trainer) if isinstance(adapter, TensorBoard)]


def layout(metrics: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's charts by category: INQ's scalars, and metrics by quantity.

    Args:
        metrics: Names of everything that is logged.
    """

    def chart(*names: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(name)}$" for name in names]]  # it takes names for regular expressions

    quantization = {
        "quantized fraction": chart("inq/quantized_fraction"),
        "phase": chart("inq/phase"),
        "signal-to-quantization-noise ratio (dB)": chart("inq/sqnr_db"),
    }
    if any(name.startswith("inq/quantized_fraction_per_layer/") for name in metrics):
        quantization["quantized fraction by layer"] = ["Multiline", ["^inq/quantized_fraction_per_layer/.+$"]]
    if rates := [name for name in metrics if name.startswith("lr-")]:
        quantization["learning rate"] = chart(*rates)
    quantities: dict[str, list[str]] = {}
    for name in metrics:
        if split := split_metric(name):
            quantities.setdefault(split[1], []).append(name)
    charts = {"INQ": quantization}
    if quantities:
        charts["metrics"] = {quantity: chart(*names) for quantity, names in sorted(quantities.items())}
    return charts
