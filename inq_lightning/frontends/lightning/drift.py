"""Frozen weights that something other than an optimizer moves: found by name, put back, and said."""

from __future__ import annotations

from collections.abc import Mapping

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from inq_lightning.core import sharding
from inq_lightning.core.quantizer import Quantizer

_BETWEEN_STEPS = (
    "{weights} were changed between training steps by something other than an optimizer: code in a hook of the module "
    "or of a callback, such as a clamp or a norm constraint. From now on INQCallback puts them back before every "
    "batch, validation and checkpoint, so that they stay on their grid, where that code does not apply to them. Let it "
    "leave out the weights of INQCallback.frozen_mask(name), clamp to a power of two, or exclude these parameters"
)
_IN_FORWARD = (
    "{weights} were changed within a training step before the optimizer's turn: by the forward pass of a layer that "
    "clamps or renormalizes its own weight (a max-norm constraint), for instance. INQCallback puts them back after "
    "every step, and before every checkpoint, so that what is saved lies on its grid; but the network computes with "
    "other weights than those. Remove the constraint before you quantize, or exclude these parameters"
)
_SAVED = (
    "{weights} have other values in a checkpoint: the module or a callback has swapped them, for an evaluation for "
    "instance. The checkpoint says under 'inq' that they are not quantized. Swap back before checkpoints are saved, or "
    "leave out quantized parameters"
)
_AT_THE_END = (
    "{weights} were changed after the last epoch by something other than an optimizer: code in a hook such as "
    "on_train_epoch_end, on_train_end or on_fit_end of the module or of a callback. They have been put back to their "
    "values{saved}. Let that code leave out quantized parameters, or do its work before they are quantized"
)


class DriftWatch:
    """Looks for frozen weights that have moved, where a look costs little, and holds those that move again and again.

    A look compares all frozen weights with their values, which takes about as long as two optimizer steps. There is one
    at the beginning and one at the end of each epoch; one before each of the first two batches of an epoch, of a phase
    and after a validation, and one within the first of them, when it has been through its backward pass; likewise
    before and within the last batch of an epoch. Once weights have been found to move, all are put back before every
    batch and every validation too.

    Attributes:
        found: Names of the parameters of which frozen weights have moved.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.found: set[str] = set()
        self._quantizer = quantizer
        self._fitting = False
        self._batches = 0  # that are still looked at
        self._in_place = False  # whether an evaluation began with all frozen weights at their values
        self._said: set[str] = set()  # parameters that a checkpoint was said to hold otherwise

    def begin(self) -> None:
        """Training begins."""
        self._fitting = True
        self.expect()

    def expect(self) -> None:
        """Look at the next two batches: the weights, or what is frozen of them, may be others than before."""
        self._batches = 2

    def before_epoch(self, module: LightningModule) -> None:
        """Put back what has moved since the last epoch, and look at the first batches."""
        self.look(module)
        self.expect()

    def before_batch(self, module: LightningModule, last: bool) -> None:
        """Put back what has moved since the last step; ``last``: whether it is the epoch's last batch."""
        if self._batches or last:
            self._batches = max(self._batches - 1, 0)
            self.look(module)
        elif self.found:
            self._restore(module)

    def after_backward(self, module: LightningModule, last: bool) -> None:
        """Find weights that the forward pass moves."""
        if self._batches or last:
            self.look(module, _IN_FORWARD)

    def look(self, module: LightningModule, message: str = _BETWEEN_STEPS) -> None:
        """Put back what has moved, and say what has not been said."""
        sharding.reshard(module)
        moved = self._quantizer.moved()
        if moved:
            self._quantizer.restore()
        new = {name: count for name, count in moved.items() if name not in self.found}
        self.found |= new.keys()
        if new:
            rank_zero_warn(message.format(weights=self._quantizer.listing(new)))

    def before_evaluation(self, module: LightningModule) -> None:
        """Put back weights that are known to move.

        Others may have been swapped for the evaluation. After training they are the user's: see only whether they are
        in place.
        """
        if self._fitting and self.found:
            self._restore(module)
        self._in_place = bool(self.found) and (self._fitting or not self._quantizer.moved())

    def after_evaluation(self, module: LightningModule) -> None:
        """Put back what the forward pass has moved."""
        if self._in_place:
            self._restore(module)
        self.expect()

    def before_save(
        self, module: LightningModule, saved: Mapping[str, Tensor] | None, training: bool
    ) -> dict[str, int]:
        """How many frozen weights have other values in a ``state_dict`` that is about to be saved, by parameter.

        They are put back, in it too, where they have moved in training. In an evaluation they may have been swapped for
        a while, by code that counts on finding them again.
        """
        moved = self._quantizer.moved(saved)
        if moved and self._fitting and (training or self.found) and not self._quantizer.sharded:
            self.look(module)
            moved = self._quantizer.moved(saved)  # it holds the same memory, unless somebody has replaced it
        if moved.keys() - self._said:
            self._said |= moved.keys()
            rank_zero_warn(_SAVED.format(weights=self._quantizer.listing(moved)))
        return moved

    def finish(self, trainer: Trainer) -> None:
        """Put back what has moved since the last epoch.

        Raises:
            RuntimeError: There is something that has not been said before. A checkpoint has been written; the message
                names it and the parameters.
        """
        self._fitting = False
        weights = self._quantizer.weights.items()  # each process for itself: Lightning has let go of sharded ones
        moved = {name: count for name, weight in weights if (count := weight.drifted()) and name not in self.found}
        self._quantizer.restore()
        if trainer.strategy.reduce_boolean_decision(bool(moved), all=False):
            what = self._quantizer.listing(moved) if moved else "frozen weights of another process"
            raise RuntimeError(_AT_THE_END.format(weights=what, saved=leave_checkpoint(trainer)))

    def interrupt(self) -> None:
        """Training ends before its time, perhaps between an update and its step hook: leave whole weights."""
        if self._fitting:
            self._quantizer.restore()
        self._fitting = False

    def _restore(self, module: LightningModule) -> None:
        sharding.reshard(module)
        self._quantizer.restore()


def leave_checkpoint(trainer: Trainer) -> str:
    """Save a checkpoint beside those of ModelCheckpoint, or else in the Trainer's folder; returns what to say of it."""
    if getattr(trainer, "fast_dev_run", False):
        return ""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    path = f"{folder}/inq-end-step={trainer.global_step}.ckpt"  # the folder may be a URL
    try:
        trainer.save_checkpoint(path)
    except Exception as error:  # whatever it is, it must not hide what there is to say
        return f", but the finished run could not be saved in {path} ({type(error).__name__}: {error})"
    return f", and the finished run is saved in {path}"
