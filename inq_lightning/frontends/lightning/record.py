"""The record of what its weights are that every checkpoint has under ``inq``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning import Trainer

from inq_lightning.core.quantizer import Quantizer
from inq_lightning.frontends.lightning.base import callbacks_named


def of(quantizer: Quantizer, moved: Mapping[str, int]) -> dict[str, Any]:
    """What a checkpoint says of its weights.

    Args:
        quantizer: The engine, which knows what is frozen.
        moved: How many frozen weights of which parameters have other values in the checkpoint; they do not count.

    Returns:
        ``quantized_fraction``, a share of the selected weights; ``network_fraction``, one of all weights in matrices;
        ``fully_quantized``, whether that is all of them; ``left_out``, what else there is and why; and, where there is
        something, ``moved``.
    """
    coverage, weights = quantizer.coverage, quantizer.weights.values()
    fraction = (sum(weight.frozen for weight in weights) - sum(moved.values())) / sum(w.numel for w in weights)
    said = {
        "quantized_fraction": fraction,
        "network_fraction": fraction * coverage.share,
        "fully_quantized": fraction * coverage.share == 1.0,
        "left_out": {one.name: one.reason for one in coverage.left_out},
    }
    return said | ({"moved": dict(moved)} if moved else {})


class RecordingIO(CheckpointIO):
    """Has the record written last of all, when a file is, so that it is true of the weights in the file.

    Lightning asks no callback about checkpoints of weights only; of others it asks the module last, whose
    ``on_save_checkpoint`` may put in other weights.

    Args:
        io: What writes and reads the files.
        trainer: Whose INQCallback is asked.
    """

    def __init__(self, io: CheckpointIO, trainer: Trainer) -> None:
        self._io = io
        self._trainer = trainer

    @classmethod
    def insert(cls, trainer: Trainer) -> None:
        """Let the Trainer write its files through one of these."""
        if not isinstance(trainer.strategy.checkpoint_io, cls):
            trainer.strategy.checkpoint_io = cls(trainer.strategy.checkpoint_io, trainer)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the file, with the record in it; only the first process comes here."""
        for callback in callbacks_named(self._trainer, "INQCallback"):
            if "state_dict" in checkpoint and not callback.quantizer.sharded:
                callback.write_record(self._trainer, checkpoint)
        self._io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file."""
        return self._io.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        self._io.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let go of what writing takes."""
        self._io.teardown()
