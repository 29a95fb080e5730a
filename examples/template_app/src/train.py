"""Train and test what the config describes."""

import hydra
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from utils.instantiators import instantiate_callbacks


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg: DictConfig) -> float | None:
    """Run the experiment; the test accuracy is what a sweep would maximize."""
    seed_everything(cfg.seed, workers=True)
    datamodule: LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: LightningModule = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_callbacks(cfg.get("callbacks"))
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks)
    if cfg.train:
        trainer.fit(model=model, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
    if cfg.test:
        ckpt_path = trainer.checkpoint_callback.best_model_path or None
        trainer.test(model=model, datamodule=datamodule, ckpt_path=ckpt_path)
    return float(trainer.callback_metrics["test/acc"]) if cfg.test else None


if __name__ == "__main__":
    main()
