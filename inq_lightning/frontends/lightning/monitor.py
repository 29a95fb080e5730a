"""What TensorBoard and other loggers show of a quantization beyond the scalars that INQCallback logs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.model_helpers import is_overridden

from inq_lightning.core import sharding
from inq_lightning.core.layer import named_weights
from inq_lightning.core.size import size_of
from inq_lightning.frontends.lightning.base import Callback
from inq_lightning.frontends.lightning.callback import INQCallback
from inq_lightning.frontends.lightning.find import find_inq
from inq_lightning.frontends.lightning.loggers import adapters, tensorboards
from inq_lightning.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class INQMonitor(Callback):
    """Shows loggers how the quantization goes; put it beside an :class:`~inq_lightning.INQCallback`.

    At the beginning of each phase, and at the end as far as something has changed, each logger gets what it can take:

    - figures (TensorBoard, W&B, MLflow): weights over exponents by layer, frozen and free apart; a heat map of layers
      and exponents; metrics against the quantized fraction. They need matplotlib. TensorBoard shows ten images of each
      kind, the 2-bit presets' ten phases; for more, start it with ``--samples_per_plugin images=100``.
    - histograms (TensorBoard): the exponents of each layer's weights, frozen and free apart; zeros have none.
    - a layout (TensorBoard's custom scalars) that groups INQ's scalars, and metrics by quantity.
    - hyper-parameters: INQCallback's arguments, as ``inq/bits`` and so on, beside the module's own. TensorBoard's
      HPARAMS tab shows them with the metrics, so that the runs of a sweep can be compared; Lightning's placeholder
      ``hp_metric`` is left out, as TensorBoard keeps only the first set that a run writes. Where runs have no monitor,
      ``tensorboard --load_fast=false`` has these columns all the same.
    - ``inq/bytes``: size of all parameters with the quantized ones at their bits, at the end.

    Metrics are those whose names begin with ``train``, ``val`` or ``test``. An evaluation before ``fit`` is taken for
    the full-precision network's. Training itself is the same, bit for bit, with and without this callback.

    Raises:
        ValueError: The Trainer has no INQCallback; raised when it starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._history: list[dict[str, Any]] = []  # step, fraction, metrics
        self._before: dict[str, float] = {}  # metrics of evaluations before fit
        self._shown = 0  # the phase that figures show
        self._final = False  # whether they show weights that will not move any more
        self._grouped = False  # whether the layout is written
        self._drawing = True  # until matplotlib turns out to be missing
        self._step = 0  # of loggers: batches, however many optimizers step in one

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make sure that there is something to monitor, and forget an earlier run."""
        _inq(trainer)
        for board in tensorboards(trainer):
            board.keep_first_hyperparameters()
        if stage == "fit":
            self._history, self._before = [_point(0, 0.0, self._before)] if self._before else [], {}
            self._shown, self._final, self._grouped, self._drawing, self._step = 0, False, False, True, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add INQCallback's arguments to the hyper-parameters."""
        for logger in trainer.loggers:
            logger.log_hyperparams(_settings(_inq(trainer)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the step of a checkpoint."""
        self._step = trainer.fit_loop.epoch_loop._batches_that_stepped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a phase that has just begun."""
        loop = trainer.fit_loop.epoch_loop
        self._step = loop._batches_that_stepped + (not loop._should_accumulate())  # Lightning counts it later
        phase = _inq(trainer).phase
        if phase != self._shown:
            self._shown = phase
            self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics; those of a validation by itself are shown at once."""
        if not trainer.sanity_checking:
            self._evaluated(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics and show them."""
        self._evaluated(trainer, "test")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the training metrics."""
        self._record(trainer, _metrics(trainer, "train"))
        self._group(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the final state, its size and the hyper-parameters."""
        inq = _inq(trainer)
        self._group(trainer, pl_module)
        self._show(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        size = float(size_of(pl_module, {layer.name: layer.bits for layer in inq.layers}).bytes)
        for logger in trainer.loggers:
            logger.log_metrics({"inq/bytes": size}, self._step)
            logger.save()
        for board in tensorboards(trainer):
            board.compare(
                _settings(inq) | _flat(pl_module.hparams),
                [*sorted(self._names(pl_module), key=_finality), "inq/bytes", "inq/quantized_fraction"],
            )

    def state_dict(self) -> dict[str, Any]:
        """The metrics so far, as plain numbers."""
        return {"history": copy.deepcopy(self._history)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the metrics of the interrupted run."""
        self._history = copy.deepcopy(state_dict["history"])

    # ---- metrics against the fraction --------------------------------------------------------------------------------

    def _evaluated(self, trainer: Trainer, stage: str) -> None:
        metrics = _metrics(trainer, stage)
        if trainer.state.fn == "fit" or self._history:
            self._record(trainer, metrics)
        else:
            self._before |= metrics
        if trainer.state.fn != "fit" and self._history and metrics:
            self._draw(trainer, "inq/metrics", self._metrics_figure, self._step + 1)  # beside the last of fit

    def _record(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        fraction = _inq(trainer).quantized_fraction
        last = self._history[-1] if self._history else None
        if last and (last["step"], last["fraction"]) == (self._step, fraction):
            last["metrics"] |= metrics
        elif metrics:
            self._history.append(_point(self._step, fraction, metrics))

    def _metrics_figure(self) -> Figure:
        points = [(point["fraction"], point["metrics"]) for point in self._history]
        return plots.metrics_against_fraction(points, "line: end of each phase; dots: every evaluation")

    # ---- what loggers get --------------------------------------------------------------------------------------------

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give every logger the state of the weights, and the metrics so far."""
        if not adapters(trainer):
            return
        inq = _inq(trainer)
        final = inq.quantized_fraction == 1
        if not (final and self._final):
            self._show_weights(trainer, pl_module, inq)
        self._final = final
        if self._history:
            self._draw(trainer, "inq/metrics", self._metrics_figure)

    def _show_weights(self, trainer: Trainer, pl_module: LightningModule, inq: INQCallback) -> None:
        """Where they lie on the exponent axis; a collective call for sharded parameters."""
        layers = _exponents(pl_module, inq)
        if not layers or not trainer.is_global_zero:
            return
        title = f"phase {inq.phase} of {len(inq.options.phases.portions)}, {inq.quantized_fraction:.1%} frozen"
        for board in tensorboards(trainer):
            for name, layer in layers.items():
                board.histogram(f"inq_exponents/{name}/frozen", layer.frozen, self._step)
                board.histogram(f"inq_exponents/{name}/free", layer.free, self._step)
        self._draw(trainer, "inq/exponents", lambda: plots.exponent_histogram(layers, title))
        self._draw(trainer, "inq/heatmap", lambda: plots.exponent_heatmap(layers, title))

    def _draw(self, trainer: Trainer, tag: str, figure: Callable[[], Figure], step: int | None = None) -> None:
        """Give a figure to the loggers that take one."""
        takers = adapters(trainer)
        if not self._drawing or not takers or not trainer.is_global_zero:
            return
        try:
            drawn = figure()
        except ImportError as error:
            self._drawing = False
            rank_zero_warn(f"INQMonitor logs no figures: {error}")
            return
        for taker in takers:
            taker.figure(tag, drawn, self._step if step is None else step)

    def _group(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write TensorBoard's layout of scalars, once the names of the metrics are known."""
        if self._grouped or not trainer.is_global_zero:
            return
        self._grouped = True
        logged = set(trainer.callback_metrics)
        for board in tensorboards(trainer):
            board.group([*trainer.callback_metrics, *sorted(self._names(pl_module) - logged)])

    def _names(self, pl_module: LightningModule) -> set[str]:
        """Metrics so far, and those of a test, which comes after fit: TensorBoard counts only what is named first."""
        names = {name for point in self._history for name in point["metrics"]}
        if is_overridden("test_step", pl_module):
            names |= {re.sub("^val(id(ation)?)?", "test", name) for name in names if _is_of(name, "val")}
        return names


def _inq(trainer: Trainer) -> INQCallback:
    inq = find_inq(trainer)
    if inq is None:
        raise ValueError(
            "INQMonitor shows what INQCallback does, and the Trainer has none: Trainer(callbacks=[INQCallback(), "
            "INQMonitor()])"
        )
    return inq


def _point(step: int, fraction: float, metrics: dict[str, float]) -> dict[str, Any]:
    return {"step": step, "fraction": fraction, "metrics": metrics}


def _is_of(name: str, stage: str) -> bool:
    split = plots.split_metric(name)
    return split is not None and split[0] == stage


def _finality(name: str) -> tuple[int, str]:
    """Metrics of a test stand first, then those of validations."""
    split = plots.split_metric(name)
    return ["test", "val", "train"].index(split[0]) if split else 3, name


def _metrics(trainer: Trainer, stage: str) -> dict[str, float]:
    """The metrics of one stage; of those that Lightning has twice, by step and by epoch, the latter.

    All processes have to ask: computing a metric may be a collective call.
    """
    metrics = {name: value for name, value in trainer.callback_metrics.items() if _is_of(name, stage)}
    twice = {f"{name}{suffix}" for name in metrics for suffix in ("_step", "_epoch")}
    return {name: float(value) for name, value in metrics.items() if name not in twice}


def _exponents(pl_module: LightningModule, inq: INQCallback) -> dict[str, plots.Exponents]:
    """Count all quantized layers' weights; for sharded parameters it is a collective call."""
    sharding.reshard(pl_module)
    parameters = dict(named_weights(pl_module))
    counted = {}
    for layer in inq.layers:
        parameter = parameters[layer.name]
        weight = sharding.full(sharding.local(parameter), parameter)
        counted[layer.name] = plots.count_exponents(weight, inq.frozen_mask(layer.name), layer.grid)
    return counted


def _settings(inq: INQCallback) -> dict[str, Any]:
    """INQCallback's arguments as hyper-parameters."""
    return {f"inq/{name}": value for name, value in _flat(inq.options.as_dict() | asdict(inq.options.phases)).items()}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """What can be compared: plain values, collections of them as text; nothing where there is nothing."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, (bool, int, float, str)):
            flat[name] = value
        elif isinstance(value, Mapping) and value:
            flat[name] = ", ".join(f"{key}: {item}" for key, item in value.items())
        elif isinstance(value, (list, tuple)) and value:
            flat[name] = ", ".join(map(str, value))
    return flat
