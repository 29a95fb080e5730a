"""INQ in a LightningCLI application, configured in YAML or on the command line.

Run ``python main.py fit --config config.yaml --trainer.callbacks.bits=4``.
"""

from pytorch_lightning.cli import LightningCLI

from inq_lightning import INQCallback
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule

if __name__ == "__main__":
    cli = LightningCLI(Classifier, DigitsDataModule, seed_everything_default=0)
    for callback in cli.trainer.callbacks:
        if isinstance(callback, INQCallback):
            print(f"bits {callback.options.bits}, quantized {callback.quantized_fraction:.0%}")
