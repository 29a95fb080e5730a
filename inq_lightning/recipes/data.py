"""Image data for `inq-train`, with training, validation and test parts that never overlap.

Batches are pairs of images, float32 of shape (batch, channels, image_size, image_size) with about zero mean and unit
variance, and labels, int64 of shape (batch,). Which images they hold and how these are augmented follows from seed,
epoch and index alone, see :mod:`inq_lightning.recipes.sampling`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from inq_lightning._common import import_extra, one_of
from inq_lightning.recipes.sampling import (
    SPLIT,
    ArrayDataset,
    EpochBatchSampler,
    FolderDataset,
    LazyDataLoader,
    derive,
    generator_of,
)
from inq_lightning.recipes.structured import configures

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Source = Literal["mnist", "cifar10", "imagefolder"]
_Parts = dict[str, tuple[Tensor, Tensor]]


class ImageDataModule(LightningDataModule):
    """What the data modules here share: loaders, and checks of the data against what the config says of it.

    A subclass implements `load`. Trains on several devices without a wrapper by Lightning; see EpochBatchSampler.

    Args:
        num_classes: Number of classes; labels are 0 to `num_classes - 1`.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        batch_size: Images per batch and device.
        seed: Seed of the training order and augmentation, at least 0.
        num_workers: Worker processes that load batches; 0 loads in the main process.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self, num_classes: int, in_channels: int, image_size: int, batch_size: int, seed: int, num_workers: int
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 2),
            ("in_channels", in_channels, 1),
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.image_size = image_size
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.datasets: dict[str, Dataset[tuple[Tensor, Tensor]]] = {}
        self._on_device: dict[str, Dataset[tuple[Tensor, Tensor]]] = {}

    def load(self) -> dict[str, Dataset[tuple[Tensor, Tensor]]]:
        """Returns the datasets `train`, `val` and `test`, indexed by BatchKey."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Loads the data, once.

        Raises:
            ValueError: The data are not what the arguments say.
        """
        if not self.datasets:
            self.datasets = self.load()

    def train_dataloader(self) -> LazyDataLoader:
        """Returns the training batches, shuffled anew each epoch.

        Raises:
            ValueError: The Trainer has `overfit_batches`.
        """
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit:
            raise ValueError(
                f"{type(self).__name__} chooses whole batches itself, so it has no overfit_batches "
                f"(got {overfit}); use limit_train_batches"
            )
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> LazyDataLoader:
        """Returns the validation batches, in order."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> LazyDataLoader:
        """Returns the test batches, in order."""
        return self._loader("test", shuffle=False)

    def _loader(self, part: str, shuffle: bool) -> LazyDataLoader:
        dataset = self._placed(part)
        sampler = EpochBatchSampler(
            len(dataset),  # type: ignore[arg-type]
            self.batch_size,
            self.seed,
            shuffle,
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            batches_done=self._batches_done if shuffle else lambda: 0,
        )
        return LazyDataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available() and dataset is self.datasets[part],
            # Otherwise each pass would draw its workers' seed from the global generator.
            generator=generator_of(self.seed),
        )

    def _placed(self, part: str) -> Dataset[tuple[Tensor, Tensor]]:
        """A dataset on the GPU that trains, where it is small enough; making its batches here would hold the GPU up."""
        dataset = self.datasets[part]
        device = None if self.trainer is None else self.trainer.strategy.root_device
        if device is None or device.type != "cuda" or self.num_workers or not isinstance(dataset, ArrayDataset):
            return dataset
        if part not in self._on_device:
            fits = dataset.images.nbytes < torch.cuda.mem_get_info(device)[0] / 8
            self._on_device[part] = dataset.to(device) if fits else dataset
        return self._on_device[part]

    def _batches_done(self) -> int:
        if self.trainer is None or not self.trainer.training or not self.trainer.fit_loop.restarting:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _images(self, source: str, key: str, images: Any) -> Tensor:
        """Returns images, an array (N, size, size[, channels]), as a tensor (N, channels, size, size)."""
        if images.dtype != np.uint8:
            raise ValueError(f"{source}: {key} must be uint8 pixels from 0 to 255; it is {images.dtype}")
        if images.ndim not in (3, 4) or len(images) == 0:
            raise ValueError(
                f"{source}: {key} must have the shape (N, size, size, channels) or (N, size, size), with N above 0; "
                f"it has {images.shape}"
            )
        pixels = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2).contiguous()
        found, wanted = tuple(pixels.shape[1:]), (self.in_channels, self.image_size, self.image_size)
        if found != wanted:
            raise ValueError(
                f"{source}: {key} has images of {found[0]} channels and {found[1]}x{found[2]} pixels; "
                f"in_channels={self.in_channels} and image_size={self.image_size} ask for {wanted[0]} channels and "
                f"{wanted[1]}x{wanted[2]}. Set data.in_channels and data.image_size to what the images have"
            )
        return pixels

    def _labels(self, source: str, key: str, labels: Any, count: int) -> Tensor:
        """Returns labels, an array (N,) or (N, 1), as a tensor (N,)."""
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{source}: {key} must be integers; it is {labels.dtype}")
        if labels.shape not in ((count,), (count, 1)):
            raise ValueError(
                f"{source}: {key} must have one label for each of {count} images, shape ({count},) or ({count}, 1); "
                f"it has {labels.shape}"
            )
        least, most = labels.min(), labels.max()
        if least < 0 or most >= self.num_classes:
            raise ValueError(
                f"{source}: {key} has labels from {least} to {most}; num_classes={self.num_classes} allows 0 to "
                f"{self.num_classes - 1}. Set data.num_classes to the number of classes, and count them from 0"
            )
        return torch.from_numpy(labels.astype(np.int64).reshape(-1))


class DigitsDataModule(ImageDataModule):
    """The 1797 real 8x8 handwritten digits that scikit-learn ships (UCI optical recognition of handwritten digits).

    Stratified 60% training, 15% validation and 25% test images; the split does not depend on `seed`, so accuracies
    compare across seeds. No augmentation.

    Args:
        batch_size: Images per batch and device.
        seed: Seed of the training order.
        num_workers: Worker processes that load batches.
        num_classes: Must be 10.
        in_channels: Must be 1.
        image_size: Must be 8.

    Raises:
        ImportError: scikit-learn is missing or broken (when the data load).
        ValueError: An argument is out of its range (also when the data load).
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 8,
    ) -> None:
        super().__init__(num_classes, in_channels, image_size, batch_size, seed, num_workers)

    def load(self) -> dict[str, Dataset[tuple[Tensor, Tensor]]]:
        """Returns the three parts, normalized by the training part."""
        datasets = import_extra("sklearn.datasets", "train")
        selection = import_extra("sklearn.model_selection", "train")
        digits = datasets.load_digits()
        images = self._images("scikit-learn's digits", "images", digits.images.astype(np.uint8))
        labels = self._labels("scikit-learn's digits", "target", digits.target, len(images))
        rest, test = selection.train_test_split(
            np.arange(len(labels)), test_size=0.25, random_state=0, stratify=digits.target
        )
        train, val = selection.train_test_split(rest, test_size=0.2, random_state=0, stratify=digits.target[rest])
        return _array_datasets(
            {part: (images[index], labels[index]) for part, index in (("train", train), ("val", val), ("test", test))},
            augment=False,
        )


@configures(DigitsDataModule)
class DigitsConfig:
    """Arguments of :class:`DigitsDataModule`."""


class NpzDataModule(ImageDataModule):
    """Images from a numpy archive in the form that Keras uses.

    The archive has `x_train` and `x_test`, uint8 of shape (N, size, size, channels) or (N, size, size), and `y_train`
    and `y_test`, integers of shape (N,) or (N, 1). Validation images are a random part of `x_train`; `x_test` is only
    ever tested on. Mean and variance are the training part's, per channel. The arrays stay in memory as uint8.

    Args:
        path: The `.npz` file.
        num_classes: Number of classes; labels are 0 to `num_classes - 1`.
        in_channels: Channels of the images, 1 for those without a channel axis.
        image_size: Height and width of the images, in pixels.
        augment: Whether training images are padded by an eighth of their size, cropped at random and flipped.
        val_fraction: Part of the training images that is held out for validation, chosen by `seed`.
        batch_size: Images per batch and device.
        seed: Seed of the split, the training order and the augmentation.
        num_workers: Worker processes that load batches.

    Raises:
        FileNotFoundError: There is no such file (when the data load).
        ValueError: An argument is out of its range, or (when the data load) the archive is not as described above.
    """

    def __init__(
        self,
        path: str,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        augment: bool = True,
        val_fraction: float = 0.1,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(num_classes, in_channels, image_size, batch_size, seed, num_workers)
        self.path = path
        self.augment = augment
        self.val_fraction = _checked_fraction(val_fraction)

    def load(self) -> dict[str, Dataset[tuple[Tensor, Tensor]]]:
        """Returns the three parts, normalized by the training part."""
        arrays = self._read()
        parts = {}
        for part in ("train", "test"):
            images = self._images(self.path, f"x_{part}", arrays[f"x_{part}"])
            parts[part] = images, self._labels(self.path, f"y_{part}", arrays[f"y_{part}"], len(images))
        return _array_datasets(_hold_out(parts, self.path, self.val_fraction, self.seed), self.augment)

    def _read(self) -> dict[str, Any]:
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"there is no archive {self.path!r}; give data.path the .npz file of your images")
        keys = ("x_train", "y_train", "x_test", "y_test")
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                missing = [key for key in keys if key not in archive]
                found = list(archive)
                arrays = {} if missing else {key: archive[key] for key in keys}
        # A single array has no context manager, which is an AttributeError or TypeError by version of Python.
        except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path}: not a .npz archive of plain arrays ({error}); write one with "
                "numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
            ) from error
        if missing:
            raise ValueError(
                f"{self.path}: no {', '.join(missing)}; it has {', '.join(found)}, and needs all of {keys}"
            )
        return arrays


@configures(NpzDataModule)
class NpzConfig:
    """Arguments of :class:`NpzDataModule`."""


class TorchvisionDataModule(ImageDataModule):
    """MNIST, CIFAR-10, or folders of images, read by torchvision.

    `mnist` and `cifar10` are downloaded if `root` lacks them, and are held in memory; CIFAR-10 is padded, cropped and
    flipped in training, MNIST is not augmented. `imagefolder` reads `root/train/<class>/*` and, as test images,
    `root/val/<class>/*`, with ImageNet's habits: a random resized crop and a flip in training, otherwise the center
    after a resize, and ImageNet's mean and variance. Validation images are a random part of the training images.

    Args:
        dataset: `mnist`, `cifar10` or `imagefolder`.
        root: Folder of the data.
        num_classes: Number of classes; must be that of the data.
        in_channels: Channels of the images; 1 for `mnist`, otherwise 3.
        image_size: Height and width of the images, in pixels: 28 for `mnist`, 32 for `cifar10`, free for
            `imagefolder`.
        val_fraction: Part of the training images that is held out for validation, chosen by `seed`.
        batch_size: Images per batch and device.
        seed: Seed of the split, the training order and the augmentation.
        num_workers: Worker processes that load batches.

    Raises:
        ImportError: torchvision is missing or broken (when the data load).
        FileNotFoundError: `imagefolder` lacks `root/train` or `root/val` (when the data load).
        ValueError: An argument is out of its range, or the data are not what the arguments say (when the data load).
    """

    def __init__(
        self,
        dataset: Source,
        root: str,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        val_fraction: float = 0.1,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(num_classes, in_channels, image_size, batch_size, seed, num_workers)
        one_of("dataset", dataset, Source)
        if dataset == "imagefolder" and in_channels != 3:
            raise ValueError(f"imagefolder reads images as RGB, so in_channels must be 3; got {in_channels}")
        self.dataset = dataset
        self.root = root
        self.val_fraction = _checked_fraction(val_fraction)

    def prepare_data(self) -> None:
        """Downloads `mnist` or `cifar10` into `root` if it is not there."""
        if self.dataset != "imagefolder":
            for train in (True, False):
                self._source(train, download=True)

    def load(self) -> dict[str, Dataset[tuple[Tensor, Tensor]]]:
        """Returns the three parts, normalized by the training part, or for `imagefolder` by ImageNet."""
        if self.dataset == "imagefolder":
            return self._load_folders()
        parts = {}
        for part in ("train", "test"):
            source = self._source(part == "train", download=False)
            where = f"{self.dataset} in {self.root}"
            images = self._images(where, f"{part} images", np.asarray(source.data))
            parts[part] = images, self._labels(where, f"{part} labels", np.asarray(source.targets), len(images))
        return _array_datasets(
            _hold_out(parts, self.dataset, self.val_fraction, self.seed), augment=self.dataset == "cifar10"
        )

    def _source(self, train: bool, download: bool) -> Any:
        datasets = import_extra("torchvision.datasets", "vision")
        source = datasets.MNIST if self.dataset == "mnist" else datasets.CIFAR10
        return source(self.root, train=train, download=download)

    def _load_folders(self) -> dict[str, Dataset[tuple[Tensor, Tensor]]]:
        datasets = import_extra("torchvision.datasets", "vision")
        transforms = import_extra("torchvision.transforms", "vision")
        folders = {}
        for part in ("train", "val"):
            path = Path(self.root) / part
            if not path.is_dir():
                raise FileNotFoundError(
                    f"there is no folder {str(path)!r}; imagefolder needs {self.root}/train/<class>/ for training and "
                    f"validation, and {self.root}/val/<class>/ for the test"
                )
            folders[part] = datasets.ImageFolder(str(path))
            if len(folders[part].classes) != self.num_classes:
                raise ValueError(
                    f"{path} has {len(folders[part].classes)} folders of classes; num_classes is {self.num_classes}"
                )
        if folders["train"].classes != folders["val"].classes:
            different = sorted(set(folders["train"].classes) ^ set(folders["val"].classes))
            raise ValueError(
                f"{self.root}/train and {self.root}/val must have the same classes; only one has {different[:5]}"
            )
        normalize = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        augment = transforms.Compose(
            [transforms.RandomResizedCrop(self.image_size), transforms.RandomHorizontalFlip(), *normalize]
        )
        center = transforms.Compose(
            [transforms.Resize(self.image_size * 256 // 224), transforms.CenterCrop(self.image_size), *normalize]
        )
        train, val = _split(len(folders["train"]), self.root, self.val_fraction, self.seed)
        return {
            "train": FolderDataset(folders["train"], train, augment),
            "val": FolderDataset(folders["train"], val, center),
            "test": FolderDataset(folders["val"], torch.arange(len(folders["val"])), center),
        }


@configures(TorchvisionDataModule)
class TorchvisionConfig:
    """Arguments of :class:`TorchvisionDataModule`."""


def _checked_fraction(val_fraction: float) -> float:
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must be above 0 and below 1; got {val_fraction}")
    return val_fraction


def _split(count: int, source: str, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the indices, in order, that stay for training and those held out for validation."""
    held_out = round(count * val_fraction)
    if not 0 < held_out < count:
        raise ValueError(
            f"{source}: val_fraction={val_fraction} of {count} training images leaves {held_out} for validation and "
            f"{count - held_out} for training; both need some"
        )
    order = torch.randperm(count, generator=generator_of(derive(seed, SPLIT)))
    return order[held_out:].sort().values, order[:held_out].sort().values


def _hold_out(parts: _Parts, source: str, val_fraction: float, seed: int) -> _Parts:
    """Splits the part `train` into `train` and `val`."""
    images, labels = parts["train"]
    train, val = _split(len(labels), source, val_fraction, seed)
    return {"train": (images[train], labels[train]), "val": (images[val], labels[val]), "test": parts["test"]}


def _array_datasets(parts: _Parts, augment: bool) -> dict[str, Dataset[tuple[Tensor, Tensor]]]:
    """Normalizes all parts by the part `train`, and augments only that."""
    mean, std = _pixel_statistics(parts["train"][0])
    return {
        part: ArrayDataset(images, labels, mean, std, augment and part == "train")
        for part, (images, labels) in parts.items()
    }


def _pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each channel of uint8 images, in pixel units."""
    # A histogram is exact, and needs no copy of the images in floating point.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(dim=1, keepdim=True)
    values = torch.arange(256.0, dtype=torch.float64)
    mean = shares @ values
    std = ((values - mean[:, None]).square() * shares).sum(dim=1).sqrt()
    # Below one grey level the channel is practically constant, and dividing would only blow up noise.
    return mean.float(), std.clamp_min(1.0).float()
