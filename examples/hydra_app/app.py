"""A Hydra application of your own that composes the groups `inq` and `inq/schedule`.

python app.py inq.bits=4 inq/schedule=alexnet inq.schedule.epochs_per_phase=1
"""

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import Trainer, seed_everything

import inq_lightning.recipes.config  # noqa: F401  registers the types behind the groups
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN


@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg: DictConfig) -> None:
    seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False}
    digits, model = DigitsDataModule(), Classifier(SmallCNN(), num_classes=10, lr=cfg.trained.lr)
    trainer = Trainer(max_epochs=cfg.trained.epochs, **quiet)
    trainer.fit(model, digits)  # or the network that you have
    (before,) = trainer.test(model, digits)

    callback = instantiate(cfg.inq)
    model.lr = cfg.lr
    trainer = Trainer(max_epochs=cfg.epochs, callbacks=[callback], **quiet)
    trainer.fit(model, digits)
    (after,) = trainer.test(model, digits)
    print(f"bits {callback.options.bits}, quantized {callback.quantized_fraction:.0%}")
    print(f"accuracy {before['test/acc']:.4f} before, {after['test/acc']:.4f} after")


if __name__ == "__main__":
    main()
