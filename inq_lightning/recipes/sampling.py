"""Which images make up a batch, in which order, and how they are augmented.

Every training batch, its order and its augmentation alike, is a function of (seed, epoch, batch index) alone: not of
global random state, of worker processes, or of how often the loader was read. A run resumed from a checkpoint, even
one taken within an epoch, therefore sees exactly the batches that the uninterrupted run would have seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

SPLIT, ORDER, AUGMENTATION = range(3)  # what a seed is for


class BatchKey(NamedTuple):
    """What a sampler asks of a dataset: which images, and the seed of their augmentation."""

    indices: Tensor
    seed: int


class EpochBatchSampler(DistributedSampler[BatchKey]):
    """Yields the batches of one epoch, in an order given by (seed, epoch).

    Lightning calls `set_epoch` before each epoch, and leaves a DistributedSampler as it is when it trains on several
    devices: each then takes every `num_replicas`-th image, a few images twice so that all take equally many.

    Args:
        size: Number of images.
        batch_size: Images per batch and device; the last batch may have fewer.
        seed: Seed of order and augmentation.
        shuffle: Whether to shuffle; otherwise the images come in order.
        num_replicas: Number of devices.
        rank: Index of this device.
        batches_done: Returns how many batches of the epoch to leave out, because a resumed run has trained on them.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        num_replicas: int = 1,
        rank: int = 0,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(range(size), num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[BatchKey]:
        if self.shuffle:
            order = torch.randperm(self.size, generator=generator_of(derive(self.seed, ORDER, self.epoch)))
        else:
            order = torch.arange(self.size)
        order = order.repeat(-(-self.total_size // self.size))[self.rank : self.total_size : self.num_replicas]
        batches = torch.split(order, self.batch_size)
        for batch in range(self.batches_done(), len(batches)):
            yield BatchKey(batches[batch], derive(self.seed, AUGMENTATION, self.epoch, batch, self.rank))

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)


class LazyDataLoader(DataLoader[tuple[Tensor, Tensor]]):
    """Opens its iterator, and its workers, at the first batch rather than at `iter`.

    Lightning calls `iter` before it restores a checkpoint's epoch; workers would fetch batches of the wrong epoch.

    torchdata's StatefulDataLoader, which saves where it stands instead, resumes the order but not the augmentation, and
    only with as many workers as before; here there is nothing to save, and both come back with any number of them.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state, which tells Lightning that resuming within an epoch works.

        The position needs no state of its own: it is in the Trainer's progress.
        """
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing; see `state_dict`."""


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, augmented and normalized a whole batch at a time.

    Args:
        images: uint8, (N, channels, height, width).
        labels: int64, (N,).
        mean: Per-channel mean that is subtracted, in pixel units, float32 (channels,).
        std: Per-channel standard deviation that divides, in pixel units, float32 (channels,).
        augment: Whether to crop randomly, after padding by an eighth of the size, and to flip horizontally.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, augment: bool) -> None:
        self.images = images
        self.labels = labels
        self.mean = mean[:, None, None]
        self.std = std[:, None, None]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ArrayDataset:
        """The same images on another device, where batches are then made: the same ones, bit for bit."""
        moved = copy.copy(self)
        for name in ("images", "labels", "mean", "std"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        indices = key.indices.to(self.images.device)
        images = self.images[indices]
        if self.augment:
            images = crop_and_flip(images, images.shape[-1] // 8, generator_of(key.seed))
        return (images.float() - self.mean) / self.std, self.labels[indices]


class FolderDataset(Dataset[tuple[Tensor, Tensor]]):
    """Some images of a torchvision ImageFolder, fetched a whole batch at a time.

    Args:
        folder: The ImageFolder, without a transform.
        indices: Which of its images, int64 (N,).
        transform: Maps a PIL image to a float tensor (channels, height, width); draws from torch's global generator.
    """

    def __init__(self, folder: Any, indices: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.folder = folder
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        # torchvision's transforms draw from the global generator; the fork gives it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key.seed)
            samples = [self.folder[index] for index in self.indices[key.indices].tolist()]
            images = torch.stack([self.transform(image) for image, _ in samples])
        return images, torch.tensor([label for _, label in samples])


def crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pads images with zeros, crops each at a random place to its old size, and flips half of them horizontally.

    Args:
        images: Any dtype, (N, channels, height, width).
        padding: Pixels added on each side.
        generator: Source of the randomness.

    Returns:
        New images of the same shape and dtype.
    """
    count, channels, height, width = images.shape
    padded = nn.functional.pad(images, (padding, padding, padding, padding))
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows = offsets[0] + torch.arange(height)
    columns = offsets[1] + torch.arange(width)
    columns = torch.where(flipped, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def derive(seed: int, purpose: int, epoch: int = 0, batch: int = 0, rank: int = 0) -> int:
    """Returns a seed of 64 bits; SeedSequence keeps neighboring seeds, epochs and batches independent."""
    state = np.random.SeedSequence((purpose, seed, epoch, batch, rank)).generate_state(1, np.uint64)
    return int(state[0])


def generator_of(seed: int) -> torch.Generator:
    """A random generator of its own."""
    return torch.Generator().manual_seed(seed)
