"""The Lightning callback: Lightning's hooks onto schedule, selection and frozen weights."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from inq_lightning.core import sharding
from inq_lightning.core import state as saved_state
from inq_lightning.core.frozen import FrozenWeight, Rounding
from inq_lightning.core.partition import Partition, check_partition
from inq_lightning.core.plan import Plan
from inq_lightning.core.restart import LearningRateRestart
from inq_lightning.core.schedule import Schedule, default_preset
from inq_lightning.core.selection import Selected, check_patterns, select_parameters
from inq_lightning.frontends.lightning import clock, guards
from inq_lightning.grid import Exponent, Underflow, check_bits, check_exponent, check_underflow


class LayerInfo(NamedTuple):
    """Where one selected parameter stands.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        bits: Code length of one weight.
        n1: Exponent of the largest level; None while nothing but zeros is frozen.
        n2: Exponent of the smallest level; None likewise.
        numel: Number of weights.
        frozen: Number of frozen weights.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    n1: int | None
    n2: int | None
    numel: int
    frozen: int


if TYPE_CHECKING or "lightning.pytorch" not in sys.modules:
    _Callback = Callback
else:  # LightningCLI of the unified package takes only subclasses of its own Callback

    class _Callback(Callback, sys.modules["lightning.pytorch"].Callback):
        """A callback of both packages."""


class INQCallback(_Callback):
    """Turns the weights of the module that the Trainer fits into powers of two, phase by phase.

    At the beginning of each phase the largest free weights of every layer are rounded to the layer's grid and frozen
    for good; training goes on for the others, until all are frozen (Zhou et al., ICLR 2017, algorithm 1). The module
    keeps its parameters, their names and its forward.

    Args:
        bits: Code length of one weight, 2 to 8: 2^(bits-2) magnitudes, their signs and zero.
        schedule: When the quantized portion rises, and to what: a :class:`~inq_lightning.core.schedule.Schedule`, a
            mapping epoch → portion such as ``{0: 0.5, 4: 0.75, 8: 0.875, 12: 1.0}``, or the name of a preset. Left out:
            the paper's portions for ``bits``, spread evenly over the epochs. Epochs count from where INQ began.
        partition: Which free weights freeze first: ``"magnitude"`` (the largest) or ``"random"``.
        underflow: What becomes of weights below the smallest level: ``"nearest"`` or ``"truncate"``, see
            :class:`~inq_lightning.grid.PowerOfTwoGrid`.
        exponent: How each layer's grid is fitted when its first weights freeze: ``"max"``, by the largest weight (the
            paper's equation 2), or ``"mse"``, by the least squared error, which 2 and 3 bits need; see
            :meth:`~inq_lightning.grid.PowerOfTwoGrid.from_weights`.
        include: Quantize only parameters that match one of these patterns, see
            :func:`~inq_lightning.core.selection.select_parameters`.
        exclude: Leave out parameters that match one of these patterns.
        layer_bits: Bit widths for what matches a pattern, for instance ``{"net.conv1": 8, "net.fc": 8}``.
        embeddings: Whether to quantize embedding tables too.
        keep_zeros: Freeze the weights that are exactly zero when INQ begins, at zero, for pruned networks (the paper's
            section 3.5); portions then count the others. Weights under :mod:`torch.nn.utils.prune` are quantized in
            place, as ``weight_orig``.
        restart_lr: Put learning rates and their schedulers back to where they began, at each phase.
        reset_optimizer: Forget the optimizers' state (momentum, second moments) at each phase.
        log_per_layer: Log each layer's quantized fraction too.
        seed: Seed of the random partition.

    Raises:
        ValueError: An argument is none of the allowed values; the message names it.
    """

    def __init__(
        self,
        bits: int = 5,
        schedule: Schedule | Mapping[int, float] | str | None = None,
        *,
        partition: Partition = "magnitude",
        underflow: Underflow = "nearest",
        exponent: Exponent = "max",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        layer_bits: Mapping[str, int] | None = None,
        embeddings: bool = False,
        keep_zeros: bool = False,
        restart_lr: bool = True,
        reset_optimizer: bool = False,
        log_per_layer: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_bits(bits)
        check_patterns("include", include)
        check_patterns("exclude", exclude)
        check_patterns("layer_bits", layer_bits)
        _check_flags(
            embeddings=embeddings,
            keep_zeros=keep_zeros,
            restart_lr=restart_lr,
            reset_optimizer=reset_optimizer,
            log_per_layer=log_per_layer,
        )
        check_partition(partition)
        check_underflow(underflow)
        check_exponent(exponent)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 31:
            raise ValueError(f"seed must be a whole number from 0 to {(1 << 31) - 1}, got {seed!r}")
        self.bits = bits
        self.schedule = _as_schedule(schedule, bits)
        self.partition: Partition = partition
        self.underflow: Underflow = underflow
        self.exponent: Exponent = exponent
        self.include = include
        self.exclude = exclude or ()
        self.layer_bits = layer_bits
        self.embeddings = embeddings
        self.keep_zeros = keep_zeros
        self.restart_lr = restart_lr
        self.reset_optimizer = reset_optimizer
        self.log_per_layer = log_per_layer
        self.seed = seed
        self._reset()

    def _reset(self) -> None:
        self._layers: dict[str, FrozenWeight] = {}
        self._timetable = self.schedule  # with starts, once the length of the run is known
        self._origin = 0  # epoch or step at which INQ began
        self._phase = 0
        self._loaded: dict[str, Any] | None = None
        self._restart: LearningRateRestart | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._restored = False  # by a step hook, since the last batch ended
        self._bypassed = False  # whether weights may move after the last step hook
        self._sqnr: float | None = None  # dB, of the group frozen last

    # ---- what users ask ----------------------------------------------------------------------------------------------

    @property
    def quantized_fraction(self) -> float:
        """Share of the selected weights that are frozen, all layers together: 0 to 1."""
        total = sum(layer.numel for layer in self._layers.values())
        return sum(layer.frozen for layer in self._layers.values()) / total if total else 0.0

    @property
    def phase(self) -> int:
        """How many portions have begun: 0 before the first one."""
        return self._phase

    @property
    def layers(self) -> list[LayerInfo]:
        """One record for each selected parameter, in the module's order; empty before training starts."""
        return [
            LayerInfo(
                name=layer.name,
                shape=tuple(layer.parameter.shape),
                bits=layer.bits,
                n1=layer.grid.n1 if layer.grid else None,
                n2=layer.grid.n2 if layer.grid else None,
                numel=layer.numel,
                frozen=layer.frozen,
            )
            for layer in self._layers.values()
        ]

    def select(self, module: nn.Module) -> list[Selected]:
        """The parameters of ``module`` that would be quantized, and at how many bits.

        Raises:
            ValueError: See :func:`~inq_lightning.core.selection.select_parameters`.
        """
        return select_parameters(
            module,
            self.bits,
            include=self.include,
            exclude=self.exclude,
            layer_bits=self.layer_bits,
            embeddings=self.embeddings,
            pruned=self.keep_zeros,
        )

    def plan(self, module: nn.Module, trainer_epochs: int | None = None) -> Plan:
        """What training ``module`` with this callback will do: layers, phases, weights and bytes; nothing changes.

        Args:
            module: The module that would be trained.
            trainer_epochs: How many epochs the Trainer runs; left out, a schedule without starts stays without them.

        Raises:
            ValueError: The schedule does not fit into ``trainer_epochs``, or see :meth:`select`.
        """
        schedule = self.schedule
        if trainer_epochs is not None and schedule.unit == "epoch":
            schedule = schedule.spread(trainer_epochs)
            schedule.check_fits(trainer_epochs)
        return Plan.of(module, self.select(module), schedule, self.keep_zeros)

    def frozen_mask(self, name: str) -> Tensor:
        """Which weights of a parameter are frozen.

        Args:
            name: The parameter's name, as :attr:`layers` lists it.

        Returns:
            bool tensor in the parameter's shape, True where frozen. For a sharded parameter it is a collective call.

        Raises:
            KeyError: No selected parameter has this name.
        """
        if name not in self._layers:
            near = difflib.get_close_matches(name, self._layers, n=3, cutoff=0.3)
            raise KeyError(
                f"{name!r} is not a quantized parameter" + (f"; near names: {', '.join(near)}" if near else "")
            )
        layer = self._layers[name]
        return sharding.full(layer.mask, layer.parameter)

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, and refuse what would undo the quantization."""
        if stage == "fit":
            guards.check_setup(trainer, self)
            self._release()
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember learning rates and schedulers as they were configured, before a checkpoint changes them."""
        guards.check_optimizers(trainer)
        if self.restart_lr:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            self._restart = LearningRateRestart(trainer.optimizers, schedulers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the weights, take up a checkpoint's state, and refuse a run that cannot reach portion 1."""
        self._adopt(pl_module)
        self._begin(trainer, pl_module)
        guards.order_callbacks(trainer, self._timetable, self._origin)
        for optimizer in trainer.optimizers:
            try:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
            except AttributeError:
                # A wrapper that never initialized its base class; on_train_batch_end restores after it.
                continue
        overridden = type(pl_module).optimizer_step.__qualname__ != "LightningModule.optimizer_step"
        self._bypassed = (
            overridden or not pl_module.automatic_optimization or len(self._handles) < len(trainer.optimizers)
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise the quantized portion to where the schedule says, and log it."""
        self._adopt(pl_module)
        self._catch_up(trainer, pl_module)
        if self._timetable.unit == "epoch":
            self._log_state(pl_module, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise the portion if its step has come, or if a resumed run has missed the epoch's start."""
        if batch_idx == 0:  # a finetuning callback further down the list has had its turn now
            self._adopt(pl_module)
        self._catch_up(trainer, pl_module)
        if self._timetable.unit == "step":
            self._log_state(pl_module, on_step=True, on_epoch=False)
        elif batch_idx == 0:  # the progress bar shows an epoch's value only at its end
            pl_module.log("inq/quantized_fraction", self.quantized_fraction, prog_bar=True, logger=False, on_step=True)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero the gradients of frozen weights, so that they count neither in clipping nor in momentum."""
        for layer in self._layers.values():
            layer.mask_gradient()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore frozen weights where no step hook has done so: after what may move weights without one."""
        if self._bypassed or not self._restored:
            self._restore()
        self._restored = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify that every selected weight is on its grid.

        Raises:
            RuntimeError: Something has moved frozen weights behind the callback's back.
        """
        self._release()
        if self._loaded and not self._layers:  # the checkpoint of a completed run: there was nothing left to train
            self._adopt(pl_module)
            self._begin(trainer, pl_module)
        for layer in self._layers.values():
            drifted = layer.drifted()
            if drifted:
                raise RuntimeError(
                    f"{layer.name}: {drifted} of {layer.frozen} frozen weights are not at their values any more; "
                    "something other than an optimizer has changed them after the last training step: another "
                    "callback, or code in a hook of the module"
                )
        if self._layers and self.quantized_fraction < 1:
            rank_zero_warn(
                f"training ended with {self.quantized_fraction:.1%} of the selected weights quantized; resume it from "
                "a checkpoint to finish the schedule"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave whole weights for a checkpoint; Lightning calls no other hook after an exception or Ctrl-C."""
        self._restore()  # the interruption may lie between an update and its step hook
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint, under ``inq``, whether its network is fully quantized."""
        fraction = self.quantized_fraction
        checkpoint["inq"] = {"quantized_fraction": fraction, "fully_quantized": fraction == 1.0}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers and one packed mask for each parameter (1 bit a weight)."""
        if self._loaded is not None or not self._layers:
            return self._loaded or {}  # written before training started, by a tuner or after a refusal
        return {
            "version": saved_state.VERSION,
            "phase": self._phase,
            "origin": self._origin,
            "quantized_fraction": self.quantized_fraction,
            "schedule": {
                "portions": list(self._timetable.portions),
                "starts": list(self._timetable.starts or ()),
                "unit": self._timetable.unit,
            },
            "layers": {name: layer.state_dict() for name, layer in self._layers.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts; only then are the weights known to be in place."""
        self._loaded = state_dict or None

    # ---- the steps of a run ------------------------------------------------------------------------------------------

    def _adopt(self, pl_module: LightningModule) -> None:
        """Take in all selected weights, those included that a finetuning callback has just made trainable."""
        sharding.reshard(pl_module)
        for name, parameter, bits, pruning_mask in self.select(pl_module):
            if name in self._layers:
                continue
            layer = self._layers[name] = FrozenWeight(name, parameter, bits, self.underflow, self.exponent)
            if self._loaded is None:
                if self.keep_zeros:
                    layer.keep_zeros(pruning_mask)
                if self._phase:
                    self._freeze(layer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the schedule to the run, then go on from a checkpoint's state or begin where the run stands."""
        state = self._loaded
        if state is None:
            self._timetable = clock.fit_schedule(self.schedule, trainer, clock.position(trainer, self.schedule.unit))
            self._origin = clock.position(trainer, self._timetable.unit)
            if trainer.global_step:
                rank_zero_info(
                    f"The checkpoint holds no state of INQCallback: quantization begins on its weights, at "
                    f"{self._timetable.unit} {self._origin}."
                )
            return
        saved = saved_state.check(state)
        if self.schedule.starts is None and self.schedule.portions == saved.portions:
            self._timetable = saved  # it was spread over the run that began
        everything = pl_module.named_parameters(remove_duplicate=False)
        parameters = {name.replace("_orig_mod.", ""): parameter for name, parameter in everything}
        for name, layer_state in state["layers"].items():  # a finetuning callback has not made it trainable again yet
            if name not in self._layers and name in parameters and not parameters[name].requires_grad:
                self._layers[name] = FrozenWeight(
                    name, parameters[name], layer_state["bits"], self.underflow, self.exponent
                )
        saved_state.check_fits(state, self._timetable, self._layers)
        clock.check_length(self._timetable, trainer, state["origin"])
        saved_state.load(state, self._layers)
        self._phase, self._origin, self._loaded = state["phase"], state["origin"], None

    def _catch_up(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the phase that the schedule asks for, unless it has begun."""
        phase = self._timetable.phase_at(clock.position(trainer, self._timetable.unit) - self._origin)
        if phase <= self._phase:
            return
        sharding.reshard(pl_module)
        for layer in self._layers.values():
            layer.check()  # all of them, so that an error leaves none frozen ahead of the others
        if phase == len(self._timetable.portions):
            guards.forget_best(trainer)
        self._phase = phase
        roundings = [self._freeze(layer) for layer in self._layers.values()]
        if self._restart is not None:
            self._restart()
        if self.reset_optimizer:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        signal, noise = (sum(sums) for sums in zip(*roundings, strict=True))
        if signal and noise:  # otherwise rounding has changed nothing, which no logger can draw
            self._sqnr = 10 * math.log10(signal / noise)

    def _freeze(self, layer: FrozenWeight) -> Rounding:
        return layer.freeze(self._timetable.portions[self._phase - 1], self.partition, self.seed)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()
        self._restored = True

    def _restore(self) -> None:
        for layer in self._layers.values():
            layer.restore()

    def _log_state(self, pl_module: LightningModule, **when: Any) -> None:
        values = {"quantized_fraction": self.quantized_fraction, "phase": float(self._phase)}
        if self._sqnr is not None:
            values["sqnr_db"] = self._sqnr
        if self.log_per_layer:
            values |= {f"quantized_fraction/{name}": layer.frozen / layer.numel for name, layer in self._layers.items()}
        for name, value in values.items():
            bar = when["on_step"] and name == "quantized_fraction"
            pl_module.log(f"inq/{name}", value, prog_bar=bar, batch_size=1, **when)

    def _release(self) -> None:
        """Remove the step hooks, and let go of optimizers and schedulers: not every one can be pickled."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._restart = None


def _as_schedule(schedule: Schedule | Mapping[int, float] | str | None, bits: int) -> Schedule:
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Mapping):
        return Schedule.from_mapping(schedule)
    if schedule is not None and not isinstance(schedule, str):
        raise ValueError(
            f"schedule must be a Schedule, a mapping epoch → portion or the name of a preset, got {schedule!r}"
        )
    return Schedule.from_preset(default_preset(bits) if schedule is None else schedule)


def _check_flags(**flags: object) -> None:
    for argument, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{argument} must be True or False, got {flag!r}")
