"""INQ in a LightningCLI application, configured in YAML or on the command line; first a training, then INQ.

Run ``python main.py fit --config train.yaml``, then ``python main.py fit --config config.yaml``, to which for instance
``--trainer.callbacks.bits=4`` may be added.
"""

import torch
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from inq_lightning import INQCallback
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule


class CLI(LightningCLI):
    """Begins with the weights of a checkpoint; ``--ckpt_path`` would resume its run instead."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The key ``weights``."""
        parser.add_argument("--weights", type=str | None, default=None, help="Checkpoint to begin with.")

    def before_fit(self) -> None:
        """Load them."""
        if self.config.fit.weights:
            self.model.load_state_dict(torch.load(self.config.fit.weights)["state_dict"])


if __name__ == "__main__":
    cli = CLI(Classifier, DigitsDataModule, seed_everything_default=0, save_config_kwargs={"overwrite": True})
    for callback in cli.trainer.callbacks:
        if isinstance(callback, INQCallback):
            print(f"bits {callback.options.bits}, quantized {callback.quantized_fraction:.0%}")
    (metrics,) = cli.trainer.test(cli.model, cli.datamodule)
    print(f"accuracy {metrics['test/acc']:.4f}")
