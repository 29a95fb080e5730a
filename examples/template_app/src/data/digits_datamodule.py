"""The 8x8 digits that scikit-learn ships."""

import torch
from lightning import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitsDataModule(LightningDataModule):
    """1797 images: 1200 to train on, 297 to validate, 300 to test."""

    def __init__(self, batch_size: int = 128, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def setup(self, stage: str | None = None) -> None:
        """Load and split, the same way every time."""
        x, y = load_digits(return_X_y=True)
        images = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
        self.splits = random_split(images, (1200, 297, 300), torch.Generator().manual_seed(42))

    def loader(self, split: int, shuffle: bool = False) -> DataLoader:
        """Batches of one of the splits."""
        options = {"batch_size": self.hparams.batch_size, "num_workers": self.hparams.num_workers}
        return DataLoader(self.splits[split], shuffle=shuffle, **options)

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return self.loader(0, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self.loader(1)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return self.loader(2)
