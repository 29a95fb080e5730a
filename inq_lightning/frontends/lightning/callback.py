"""The Lightning callback: Lightning's hooks onto the engine, nothing else."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from inq_lightning.core.options import Options, takes_options
from inq_lightning.core.plan import Plan
from inq_lightning.core.quantizer import Quantizer
from inq_lightning.core.schedule import Length
from inq_lightning.core.selection import Selection
from inq_lightning.frontends.lightning import clock, guards, rates, record
from inq_lightning.frontends.lightning.base import Callback
from inq_lightning.frontends.lightning.drift import DriftWatch
from inq_lightning.frontends.lightning.stopping import EarlyStoppingHold, forget_best
from inq_lightning.frontends.standing import Standing


class INQCallback(Standing, Callback):
    """Turns the weights of the module that the Trainer fits into powers of two, phase by phase.

    At the beginning of each phase the largest free weights of every layer are rounded to the layer's grid and frozen
    for good; training goes on for the others, until all are frozen (Zhou et al., ICLR 2017, algorithm 1). The module
    keeps its parameters, their names and its forward. :class:`~inq_lightning.frontends.standing.Standing` tells how far
    it is.

    Its arguments are those of :class:`~inq_lightning.Options`, by the same names.

    Attributes:
        options: The arguments.
        quantizer: The engine that does the work.

    Raises:
        ValueError: An argument is none of the allowed values; the message names it.
    """

    @takes_options(Options)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.options = Options(*args, **kwargs)
        self._stopping = EarlyStoppingHold()
        self._start_with(Quantizer(self.options))

    def _start_with(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self._drift = DriftWatch(quantizer)
        self._hooked = False  # whether every optimizer takes a step hook
        self._bypassed = False  # whether weights may move after the last step hook
        self._finished: Quantizer | None = None  # the run before, until another one trains
        self._prepared = False  # whether activations are in place

    # ---- what users ask ----------------------------------------------------------------------------------------------

    def select(self, module: nn.Module) -> Selection:
        """The parameters of ``module`` that would be quantized, and at how many bits; and what would not, and why.

        Raises:
            ValueError: See :func:`~inq_lightning.select_parameters`.
        """
        return self.quantizer.select(module)

    def plan(self, module: nn.Module, trainer_epochs: int | None = None) -> Plan:
        """What training ``module`` with this callback will do: layers, phases, weights and bytes; nothing changes.

        Args:
            module: The module that would be trained.
            trainer_epochs: How many epochs the Trainer runs; left out, a schedule without starts stays without them.

        Raises:
            ValueError: The schedule does not fit into ``trainer_epochs``, or see :meth:`select`.
        """
        in_epochs = trainer_epochs is not None and self.options.phases.unit == "epoch"
        return self.quantizer.plan(module, Length(epochs=trainer_epochs or 0) if in_epochs else None)

    # ---- Lightning's hooks -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, refuse what would undo the quantization, and have activations rounded."""
        if stage == "fit":
            guards.check_setup(trainer, self)
            guards.show_rates_last(trainer)
            self._release()
            finished = self.quantizer if self.layers else self._finished
            self._start_with(Quantizer(self.options))
            self._finished = finished
            record.RecordingIO.insert(trainer)
        self._prepared = any(True for _ in pl_module.parameters())  # otherwise configure_model makes them
        if self._prepared:
            self.quantizer.prepare(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember learning rates and schedulers as they were configured, before a checkpoint changes them."""
        if not self._prepared:
            self.quantizer.prepare(pl_module)
        self.quantizer.configure(trainer.optimizers, rates.schedulers(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Select the weights, take up a checkpoint's state, and refuse a run that cannot reach portion 1."""
        self._begin(trainer, pl_module)
        if not self.coverage.overlooked:  # otherwise the engine has said it in a warning
            rank_zero_info(str(self.coverage))
        rates.fit(trainer, self.quantizer)
        guards.check_averaging(trainer, self.quantizer.timetable, self.quantizer.origin)
        if not self.quantizer.complete:
            self._stopping.hold(trainer)
        self._finished = None
        self._drift.begin()
        self._hooked = self.quantizer.hold()
        overridden = type(pl_module).optimizer_step.__qualname__ != "LightningModule.optimizer_step"
        self._bypassed = overridden or not pl_module.automatic_optimization or not self._hooked

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise the quantized portion to where the schedule says, and log it."""
        self._drift.before_epoch(pl_module)
        self.quantizer.attach(pl_module)
        self._advance(trainer, pl_module, 0)
        if self.quantizer.timetable.unit == "epoch":
            self._log_state(pl_module, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise the portion if its step has come, or if a resumed run has missed the epoch's start."""
        batch_idx = trainer.fit_loop.batch_idx  # with training_step(dataloader_iter) the argument is the last batch's
        self._drift.before_batch(pl_module, trainer.is_last_batch)
        if batch_idx == 0:  # a finetuning callback further down the list has had its turn now
            self.quantizer.attach(pl_module)
        self._advance(trainer, pl_module, batch_idx)
        if self.quantizer.timetable.unit == "step":
            self._log_state(pl_module, on_step=True, on_epoch=False)
        elif batch_idx == 0:  # the progress bar shows an epoch's value only at its end
            pl_module.log(
                "inq/quantized_fraction",
                self.quantized_fraction,
                prog_bar=True,
                logger=False,
                on_step=True,
                batch_size=1,
            )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero the gradients of frozen weights, so that they count neither in clipping nor in momentum."""
        self.quantizer.mask_gradients()
        if self._hooked:
            self._drift.after_backward(pl_module, trainer.is_last_batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Restore frozen weights where no step hook has done so: after what may move weights without one."""
        if not self.quantizer.held() or self._bypassed:
            self.quantizer.restore()
        self.quantizer.check_calibrated()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find frozen weights that something else has moved, before a checkpoint of the epoch is written."""
        self._drift.look(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate with frozen weights at their values, where something is known to move them."""
        self._drift.before_evaluation(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back frozen weights of layers that move them in their forward pass, before a checkpoint is written."""
        self._drift.after_evaluation(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that every selected weight is on its grid, and say what is left to do.

        Raises:
            RuntimeError: Something has moved frozen weights since the last epoch. They have been put back, and a
                checkpoint has been written.
        """
        if not self.layers:
            self._trained_nothing(trainer, pl_module)
        self._release()
        self._drift.finish(trainer)
        if self.layers and self.quantized_fraction < 1:
            reason = f"; it {clock.STOPPED}" if trainer.should_stop else ""
            rank_zero_warn(
                f"training ended with {self.quantized_fraction:.1%} of the selected weights quantized{reason}; resume "
                "it from a checkpoint to finish the schedule"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave whole weights for a checkpoint; Lightning calls no other hook after an exception or Ctrl-C."""
        self._drift.interrupt()
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers."""
        self._release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say in the checkpoint, under ``inq``, how much of its network is quantized; see :meth:`write_record`."""
        self.write_record(trainer, checkpoint)

    def write_record(self, trainer: Trainer, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint, under ``inq``, how much of the network in its ``state_dict`` is quantized.

        See :func:`inq_lightning.frontends.lightning.record.of`.
        """
        if self.layers:
            moved = self._drift.before_save(trainer.lightning_module, checkpoint.get("state_dict"), trainer.training)
            checkpoint["inq"] = record.of(self.quantizer, moved)

    @property
    def state_key(self) -> str:
        """The same in subclasses, so that they take up each other's checkpoints."""
        return "INQCallback"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values and one packed mask for each parameter (1 bit a weight)."""
        return self.quantizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts; only then are the weights known to be in place."""
        self.quantizer.load_state_dict(state_dict)

    # ---- the steps of a run ------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumes = self.quantizer.loaded
        self.quantizer.attach(pl_module)
        self.quantizer.begin(pl_module, clock.length(trainer), lambda unit: clock.position(trainer, unit))
        if trainer.global_step and not resumes:
            rank_zero_info(
                "The checkpoint holds no state of INQCallback: quantization begins on its weights, at "
                f"{self.quantizer.timetable.unit} {self.quantizer.origin}."
            )

    def _advance(self, trainer: Trainer, pl_module: LightningModule, batch: int) -> None:
        if self.quantizer.advance(pl_module, clock.position(trainer, self.quantizer.timetable.unit)):
            self._drift.expect()
            if self.quantizer.complete:
                self._stopping.release()
                forget_best(trainer)
        rates.follow(trainer, self.quantizer, batch)

    def _release(self) -> None:
        self.quantizer.release()
        self._stopping.release()

    def _trained_nothing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the state that there is: a checkpoint's, or the one of the run before."""
        if self.quantizer.loaded:
            self._begin(trainer, pl_module)
        elif self._finished is not None and self._finished.describes(pl_module):
            self._start_with(self._finished)
        else:
            reason = clock.why_nothing_ran(trainer)
            rank_zero_warn(f"nothing was trained, so INQCallback has quantized nothing: the Trainer {reason}")

    def _log_state(self, pl_module: LightningModule, **when: Any) -> None:
        for name, value in self.quantizer.metrics().items():
            bar = when["on_step"] and name == "inq/quantized_fraction"
            pl_module.log(name, value, prog_bar=bar, batch_size=1, **when)
