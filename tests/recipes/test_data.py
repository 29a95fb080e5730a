from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from omegaconf.errors import MissingMandatoryValue
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support import ROOT

from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.config import register_training
from inq_lightning.recipes.data import DigitsDataModule, ImageDataModule, NpzDataModule, TorchvisionDataModule
from inq_lightning.recipes.models import SmallCNN
from inq_lightning.recipes.sampling import EpochBatchSampler, crop_and_flip

register_training()

CONF = ROOT / "conf"


def write_npz(path: Path, **changes: Any) -> str:
    """Writes a good archive of 100 + 40 RGB 16x16 images in 10 classes, with changes; None leaves a key out."""
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (100, 16, 16, 3), dtype=np.uint8),
        "y_train": np.arange(100) % 10,
        "x_test": random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8),
        "y_test": np.arange(40) % 10,
    } | changes
    np.savez(path / "images.npz", **{key: array for key, array in arrays.items() if array is not None})
    return str(path / "images.npz")


def npz(path: str, **options: Any) -> NpzDataModule:
    data = NpzDataModule(path, 10, **({"image_size": 16, "batch_size": 16} | options))
    data.setup()
    return data


def epoch_of(data: ImageDataModule, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def images_of(loader: Any) -> torch.Tensor:
    return torch.cat([images for images, _ in loader])


def test_digits_are_split_once_and_for_all_and_stratified() -> None:
    data, other = DigitsDataModule(seed=0), DigitsDataModule(seed=1)
    data.setup()
    other.setup()
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    labels = [torch.cat([label for _, label in loader]) for loader in loaders]
    assert [len(label) for label in labels] == [1077, 270, 450]
    for label in labels:
        assert (label.bincount() / len(label)).allclose(torch.full((10,), 0.1), atol=0.01)
    train = images_of(data.train_dataloader())
    assert train.shape == (1077, 1, 8, 8)
    assert train.mean().item() == pytest.approx(0, abs=1e-4)
    assert train.std().item() == pytest.approx(1, abs=1e-3)
    assert torch.equal(images_of(data.test_dataloader()), images_of(other.test_dataloader()))
    assert torch.equal(images_of(data.val_dataloader()), images_of(other.val_dataloader()))


def test_digits_reject_a_config_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"digits: images has images of 1 channels and 8x8.*image_size=28"):
        DigitsDataModule(image_size=28).setup()
    with pytest.raises(ValueError, match=r"digits: target has labels from 0 to 9; num_classes=5"):
        DigitsDataModule(num_classes=5).setup()


@pytest.mark.parametrize("name", ["num_classes", "batch_size", "seed", "num_workers", "in_channels", "image_size"])
def test_arguments_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least \d; got -1"):
        DigitsDataModule(**{name: -1})


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_val_fraction_out_of_range_is_named(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction.*got {fraction}"):
        NpzDataModule("images.npz", val_fraction=fraction)


def test_npz_holds_validation_images_out_of_training_and_keeps_test_images(tmp_path: Path) -> None:
    images = np.repeat(np.arange(100, dtype=np.uint8), 16 * 16 * 3).reshape(100, 16, 16, 3)
    test_images = np.full((40, 16, 16, 3), 200, dtype=np.uint8)
    data = npz(write_npz(tmp_path, x_train=images, x_test=test_images), augment=False, val_fraction=0.2)
    dataset: Any = data.datasets["train"]

    def pixels(loader: Any) -> list[int]:
        raw = images_of(loader) * dataset.std + dataset.mean
        return raw[:, 0, 0, 0].round().int().tolist()

    train, val = pixels(data.train_dataloader()), pixels(data.val_dataloader())
    assert len(val) == 20
    assert sorted(train + val) == list(range(100))
    assert pixels(data.test_dataloader()) == [200] * 40
    for loader, order in ((data.train_dataloader(), train), (data.val_dataloader(), val)):
        assert torch.cat([label for _, label in loader]).tolist() == [pixel % 10 for pixel in order]
    assert pixels(npz(data.path, augment=False, val_fraction=0.2).val_dataloader()) == val
    assert pixels(npz(data.path, augment=False, val_fraction=0.2, seed=1).val_dataloader()) != val


def test_npz_normalizes_each_channel_by_the_training_part(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, [50, 150, 250], (100, 16, 16, 3)).astype(np.uint8)
    data = npz(write_npz(tmp_path, x_train=images), augment=False)
    train = images_of(data.train_dataloader())
    assert train.dtype == torch.float32
    assert train.mean((0, 2, 3)).allclose(torch.zeros(3), atol=1e-5)
    assert train.std((0, 2, 3)).allclose(torch.ones(3), atol=1e-3)


def test_npz_takes_images_without_channel_axis_and_labels_in_a_column(tmp_path: Path) -> None:
    path = write_npz(
        tmp_path,
        x_train=np.zeros((100, 16, 16), dtype=np.uint8),
        x_test=np.zeros((40, 16, 16), dtype=np.uint8),
        y_train=(np.arange(100) % 10)[:, None].astype(np.uint8),
    )
    images, labels = next(iter(npz(path, in_channels=1).train_dataloader()))
    assert images.shape == (16, 1, 16, 16)
    assert labels.shape == (16,)
    assert labels.dtype == torch.int64
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"x_test": None, "y_test": None}, {}, r"no x_test, y_test; it has x_train, y_train, and needs all of"),
        ({"x_train": np.zeros((100, 16, 16, 3))}, {}, r"x_train must be uint8.*it is float64"),
        ({"x_test": np.zeros((40, 768), np.uint8)}, {}, r"x_test must have the shape.*\(40, 768\)"),
        ({"x_test": np.zeros((0, 16, 16, 3), np.uint8)}, {}, r"x_test must have the shape.*N above 0.*\(0, 16"),
        ({"x_train": np.zeros((100, 16, 18, 3), np.uint8)}, {}, r"x_train has images of 3 channels and 16x18"),
        ({}, {"image_size": 32}, r"x_train has .*16x16 pixels; in_channels=3 and image_size=32 ask for.*Set data\."),
        ({}, {"in_channels": 1}, r"x_train has images of 3 channels.*ask for 1 channels"),
        ({"y_train": np.zeros(100)}, {}, r"y_train must be integers; it is float64"),
        ({"y_test": np.arange(39) % 10}, {}, r"y_test must have one label for each of 40 images.*\(39,\)"),
        ({"y_test": np.eye(40, 10, dtype=int)}, {}, r"y_test must have one label for each.*\(40, 10\)"),
        ({"y_train": np.arange(100) % 11}, {}, r"y_train has labels from 0 to 10; num_classes=10 allows 0 to 9"),
        ({"y_test": np.arange(40) % 10 - 1}, {}, r"y_test has labels from -1 to 8"),
        ({"y_test": np.array([None] * 40)}, {}, r"not a \.npz archive of plain arrays"),
        ({}, {"val_fraction": 0.001}, r"val_fraction=0.001 of 100 training images leaves 0 for validation"),
    ],
)
def test_a_bad_archive_is_named_with_its_key(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        npz(path, **options)
    assert str(error.value).startswith(path)


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no archive .*absent\.npz.*data\.path"):
        npz(str(tmp_path / "absent.npz"))


@pytest.mark.parametrize("content", ["text", "empty", "array", "truncated"])
def test_a_file_that_is_no_archive_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    if content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "truncated":
        path.write_bytes(Path(write_npz(tmp_path)).read_bytes()[:1000])
    else:
        path.write_text("hello" if content == "text" else "")
    with pytest.raises(ValueError, match=r"images\.npz: not a \.npz archive"):
        npz(str(path))


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    data = npz(write_npz(tmp_path))
    first = epoch_of(data, 0)
    third = epoch_of(data, 2)
    torch.manual_seed(123)
    for _ in data.train_dataloader():
        torch.rand(1)
    assert same(epoch_of(data, 2), third)
    assert same(epoch_of(npz(data.path), 2), third)
    assert same(epoch_of(npz(data.path, num_workers=1), 2), third)
    assert not same(first, third)
    assert not same(epoch_of(npz(data.path, seed=1), 2), third)


def test_augmentation_differs_between_epochs_even_for_the_same_image(tmp_path: Path) -> None:
    # With one training image the order cannot change, so what changes is the augmentation.
    path = write_npz(
        tmp_path,
        x_train=np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (2, 1, 1, 3)),
        y_train=np.zeros(2, dtype=int),
    )
    data = npz(path, val_fraction=0.5)
    assert len({epoch_of(data, epoch)[0][0].numpy().tobytes() for epoch in range(8)}) > 4


def test_reading_batches_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    data = npz(write_npz(tmp_path))
    before = torch.get_rng_state()
    epoch_of(data, 1)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_each_crop_is_a_window_of_the_padded_image_or_its_mirror_image() -> None:
    images = torch.randint(1, 256, (200, 3, 8, 6), dtype=torch.uint8)
    crops = crop_and_flip(images, 2, torch.Generator().manual_seed(0))
    assert crops.shape == images.shape
    assert crops.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, crop in zip(padded, crops, strict=True):
        windows = {
            (y, x, flip): image[:, y : y + 8, x : x + 6].flip(2) if flip else image[:, y : y + 8, x : x + 6]
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
        }
        (found,) = [key for key, window in windows.items() if torch.equal(window, crop)]
        seen.add(found)
    assert len(seen) > 40


def test_devices_share_an_epoch_evenly() -> None:
    samplers = [EpochBatchSampler(10, 2, 0, True, num_replicas=3, rank=rank) for rank in range(3)]
    indices = [torch.cat([key.indices for key in sampler]) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [2, 2, 2]
    assert [len(index) for index in indices] == [4, 4, 4]
    assert set(torch.cat(indices).tolist()) == set(range(10))
    assert len({key.seed for sampler in samplers for key in sampler}) == 6


def test_overfit_batches_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(overfit_batches=1, max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"no overfit_batches.*limit_train_batches"):
        trainer.fit(Classifier(SmallCNN(3, 10, 16), 10), npz(write_npz(tmp_path)))


class BatchRecorder(Callback):
    """Keeps every training batch by its number of step."""

    def __init__(self) -> None:
        self.batches: dict[int, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches[trainer.global_step] = batch[0]


def run(path: str, folder: Path, workers: int, resume: Path | None = None, **options: Any) -> tuple[Any, Classifier]:
    torch.manual_seed(0)
    recorder = BatchRecorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=3,
        callbacks=[recorder, ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)],
    )
    classifier = Classifier(SmallCNN(3, 10, 16), 10)
    trainer.fit(classifier, npz(path, num_workers=workers), ckpt_path=resume)
    return recorder.batches, classifier


# 90 training images in batches of 16 make 6 steps an epoch; validation runs after every third step.
@pytest.mark.parametrize(
    ("step", "workers", "options"),
    [
        (2, 0, {"every_n_train_steps": 1}),
        (3, 0, {"every_n_train_steps": 1}),
        (6, 0, {"every_n_train_steps": 1}),
        (8, 0, {"every_n_train_steps": 1}),
        (8, 1, {"every_n_train_steps": 1}),
        (3, 0, {"monitor": "val/loss"}),
        (6, 0, {"monitor": "val/loss"}),
        (9, 0, {"monitor": "val/loss"}),
        (6, 0, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
        (12, 1, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
    ],
)
def test_a_resumed_run_sees_the_same_batches_and_ends_bit_identical(
    step: int, workers: int, options: dict[str, Any], tmp_path: Path
) -> None:
    path = write_npz(tmp_path)
    batches, whole = run(path, tmp_path / "whole", workers=0, **options)
    checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
    resumed_batches, resumed = run(path, tmp_path / "resumed", workers, checkpoint, **options)
    assert list(batches) == list(range(18))
    assert list(resumed_batches) == list(range(step, 18))
    assert all(torch.equal(batch, batches[index]) for index, batch in resumed_batches.items())
    weights = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_torchvision_data_check_their_arguments() -> None:
    sizes = {"num_classes": 10, "in_channels": 1, "image_size": 28}
    with pytest.raises(ValueError, match="mnist, cifar10, imagefolder, got 'svhn'"):
        TorchvisionDataModule("svhn", "data", **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_channels must be 3; got 1"):
        TorchvisionDataModule("imagefolder", "data", **sizes)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "imagefolder"])
def test_missing_torchvision_names_the_extra(dataset: Any, tmp_path: Path) -> None:
    data = TorchvisionDataModule(dataset, str(tmp_path), num_classes=10, in_channels=3, image_size=32)
    with pytest.raises(ImportError, match=r"torchvision.*not installed.*the extra vision, pip install"):
        data.setup()


def write_folders(root: Path, classes: dict[str, list[str]]) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for part, names in classes.items():
        for name in names:
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(10):
                Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.png")


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_imagefolder_splits_and_augments_by_seed_and_epoch(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": ["a", "b"], "val": ["a", "b"]})
    data = TorchvisionDataModule(
        "imagefolder", str(tmp_path), num_classes=2, in_channels=3, image_size=16, val_fraction=0.2, batch_size=4
    )
    data.setup()
    train = epoch_of(data, 1)
    assert [len(labels) for _, labels in train] == [4, 4, 4, 4]
    assert train[0][0].shape == (4, 3, 16, 16)
    before = torch.get_rng_state()
    assert same(epoch_of(data, 1), train)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(epoch_of(data, 2), train)
    assert len(images_of(data.val_dataloader())) == 4
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() == [0] * 10 + [1] * 10


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_bad_image_folders_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": ["a", "b"]})

    def setup(num_classes: int) -> None:
        TorchvisionDataModule(
            "imagefolder", str(tmp_path), num_classes=num_classes, in_channels=3, image_size=16
        ).setup()

    with pytest.raises(ValueError, match=r"train has 2 folders of classes; num_classes is 10"):
        setup(10)
    with pytest.raises(FileNotFoundError, match=r"no folder .*val"):
        setup(2)
    write_folders(tmp_path, {"val": ["a", "c"]})
    with pytest.raises(ValueError, match=r"must have the same classes; only one has \['b', 'c'\]"):
        setup(2)


def load_config(data: str, model: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        return hydra.compose("train", [f"data={data}", f"model={model}", *overrides])


@pytest.mark.parametrize("model", ["small_cnn", "lenet5", "resnet20", "resnet32", "resnet44", "resnet56"])
@pytest.mark.parametrize("data", ["npz", "mnist", "cifar10"])
def test_every_model_config_fits_every_data_config(model: str, data: str) -> None:
    config = load_config(data, model, "seed=3", *(["data.path=images.npz"] if data == "npz" else []))
    module = hydra.utils.instantiate(config.data)
    classifier = hydra.utils.instantiate(config.model)
    assert isinstance(classifier, Classifier)
    assert module.seed == 3
    images = torch.randn(2, module.in_channels, module.image_size, module.image_size)
    assert classifier(images).shape == (2, module.num_classes)


def test_the_demo_configs_run() -> None:
    config = load_config("digits", "small_cnn")
    data = hydra.utils.instantiate(config.data)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert hydra.utils.instantiate(config.model)(images).shape == (64, 10)


def test_configs_ask_for_what_only_the_user_knows() -> None:
    for data, key in (("npz", "path"), ("imagefolder", "root")):
        with pytest.raises(MissingMandatoryValue, match=key):
            load_config(data, "small_cnn").data[key]
    with pytest.raises(MissingMandatoryValue, match="_target_"):
        load_config("digits", "custom").model["_target_"]


def test_the_imagefolder_config_is_imagenet() -> None:
    data = hydra.utils.instantiate(load_config("imagefolder", "resnet20", "data.root=images").data)
    assert (data.num_classes, data.in_channels, data.image_size) == (1000, 3, 224)


@pytest.mark.parametrize(("model", "package"), [("torchvision", "torchvision"), ("timm", "timm")])
def test_configs_of_the_vision_extra_build_or_name_it(model: str, package: str) -> None:
    config = load_config("cifar10", model)
    if find_spec(package) is None:
        with pytest.raises(hydra.errors.InstantiationException, match=r"the extra vision, pip install"):
            hydra.utils.instantiate(config.model)
    else:
        assert hydra.utils.instantiate(config.model)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
