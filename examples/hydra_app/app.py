"""A Hydra application of your own that composes the groups `inq` and `inq/schedule`.

python app.py inq.bits=4 inq/schedule=alexnet inq.schedule.epochs_per_phase=1
"""

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import Trainer

import inq_lightning.recipes.config  # noqa: F401  registers the types behind the groups
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN


@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg: DictConfig) -> None:
    callback = instantiate(cfg.inq)
    trainer = Trainer(max_epochs=cfg.epochs, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(SmallCNN(), num_classes=10, lr=cfg.lr), DigitsDataModule())
    print(f"bits {callback.options.bits}, quantized {callback.quantized_fraction:.0%}")


if __name__ == "__main__":
    main()
