from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule, LightningModule, Trainer

import inq_lightning.conf
from inq_lightning import PRESETS, INQCallback, Levels
from inq_lightning.core.schedule import Schedule, default_preset
from inq_lightning.recipes.classifier import Classifier, ClassifierConfig
from inq_lightning.recipes.config import (
    INQConfig,
    ScheduleConfig,
    TrainConfig,
    TrainerConfig,
    build_schedule,
    register_training,
)
from inq_lightning.recipes.data import (
    DigitsConfig,
    DigitsDataModule,
    NpzConfig,
    NpzDataModule,
    TorchvisionConfig,
    TorchvisionDataModule,
)

register_training()

CONF = Path(next(iter(inq_lightning.conf.__path__)))
GROUPS = ("callbacks", "data", "experiment", "inq", "inq/schedule", "logger", "model", "pretrain", "trainer")
PLACES = {"npz": ["data.path=images.npz"], "imagefolder": ["data.root=images"]}
NEEDS = {
    ("data", "npz"): PLACES["npz"],
    ("data", "imagefolder"): PLACES["imagefolder"],
    **{
        ("experiment", f"cifar10_resnet20{suffix}"): PLACES["npz"]
        for suffix in ("", "_5bit", "_4bit", "_3bit", "_2bit", "_w5a8", "_w4a8", "_w4a4", "_w3a8", "_w2a8")
    },
    **{("experiment", f"imagenet_resnet{depth}_5bit"): PLACES["imagefolder"] for depth in (18, 50)},
    ("data", "custom"): [
        "data._target_=torch.nn.Identity",
        *("+data.num_classes=10", "+data.in_channels=1", "+data.image_size=8"),
    ],
    ("model", "custom"): ["model._target_=torch.nn.Identity"],
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def configure(*overrides: str) -> DictConfig:
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        return compose("train", overrides=["output_dir=.", *overrides])


def plain(cfg: DictConfig) -> dict[str, Any]:
    """All interpolations resolved; an error where a value is missing."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def test_the_list_of_groups_here_is_complete() -> None:
    assert {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} == {".", *GROUPS}


@pytest.mark.parametrize(("group", "option"), [(group, option) for group in GROUPS for option in options(group)])
def test_every_file_composes_without_a_missing_value(group: str, option: str) -> None:
    cfg = plain(configure(f"{group}={option}", *NEEDS.get((group, option), [])))
    assert cfg.keys() == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("small_cnn", "digits"),
        ("small_cnn", "mnist"),
        ("small_cnn", "cifar10"),
        ("small_cnn", "npz"),
        ("lenet5", "mnist"),
        ("lenet5", "cifar10"),
        ("resnet20", "digits"),
        ("resnet20", "mnist"),
        ("resnet20", "cifar10"),
        ("resnet20", "npz"),
        ("resnet32", "cifar10"),
        ("resnet44", "cifar10"),
        ("resnet56", "cifar10"),
    ],
)
def test_a_model_fits_the_data_that_it_is_composed_with(model: str, data: str) -> None:
    cfg = configure(f"model={model}", f"data={data}", *PLACES.get(data, []))
    module, datamodule = instantiate(cfg.model), instantiate(cfg.data)
    assert isinstance(module, LightningModule)
    assert isinstance(datamodule, LightningDataModule)
    images = torch.zeros(2, datamodule.in_channels, datamodule.image_size, datamodule.image_size)
    assert module.eval()(images).shape == (2, datamodule.num_classes)


@pytest.mark.parametrize("model", ["timm", "torchvision"])
def test_networks_of_other_packages_take_the_number_of_classes_from_the_data(model: str) -> None:
    cfg = plain(configure(f"model={model}", "data=imagefolder", "data.root=images", "data.num_classes=37"))
    assert cfg["model"]["num_classes"] == cfg["model"]["net"]["num_classes"] == 37


@pytest.mark.parametrize("trainer", ["default", "cpu"])
def test_a_trainer_is_built_from_its_config(trainer: str) -> None:
    cfg = configure(f"trainer={trainer}", "trainer.max_epochs=3", "trainer.accelerator=cpu")
    built = instantiate(cfg.trainer, logger=False, enable_checkpointing=False)
    assert isinstance(built, Trainer)
    assert built.max_epochs == 3
    assert built.precision == cfg.trainer.precision


def test_other_arguments_of_the_trainer_can_be_added() -> None:
    cfg = configure("+trainer.inference_mode=false", "trainer.accelerator=cpu")
    assert instantiate(cfg.trainer, logger=False, enable_checkpointing=False).test_loop.inference_mode is False


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
def test_the_presets_of_the_bit_widths_share_baseline_and_data_and_low_ones_get_what_they_need(bits: int) -> None:
    cfg = plain(configure(f"experiment=cifar10_resnet20_{bits}bit", "data.path=images.npz"))
    assert cfg["inq"]["bits"] == bits
    assert cfg["inq"]["exponent"] == "auto"
    assert cfg["model"]["distillation"] > 0
    shared = plain(configure("experiment=cifar10_resnet20", "data.path=images.npz"))
    assert all(cfg[key] == shared[key] for key in ("data", "pretrain"))
    assert all(cfg["model"][key] == shared["model"][key] for key in ("net", "weight_decay"))


@pytest.mark.parametrize(("depth", "batch_size"), [(18, 80), (50, 32)])
def test_the_imagenet_presets_follow_the_papers_protocol(depth: int, batch_size: int) -> None:
    cfg = configure(f"experiment=imagenet_resnet{depth}_5bit", "data.root=imagenet")
    assert (cfg.model.net.name, cfg.model.net.weights) == (f"resnet{depth}", "IMAGENET1K_V1")
    assert (cfg.data.batch_size, cfg.model.momentum, cfg.model.weight_decay) == (batch_size, 0.9, 5e-4)
    assert cfg.pretrain.max_epochs == 0
    schedule = instantiate(cfg.inq).options.phases
    assert (schedule.portions, schedule.starts) == ((0.5, 0.75, 0.875, 1.0), (0, 2, 4, 6))


def test_the_experiment_sets_what_it_promises() -> None:
    cfg = configure("experiment=cifar10_resnet20_5bit", "data.path=images.npz", "inq.bits=4")
    assert cfg.model.net.depth == 20
    assert cfg.model.channels_last is True
    assert cfg.pretrain.max_epochs == 60
    assert cfg.trainer.precision == "bf16-mixed"
    assert cfg.inq.bits == 4


def test_the_seed_reaches_the_data() -> None:
    for data in set(options("data")) - {"custom"}:
        assert plain(configure(f"data={data}", "seed=7", *PLACES.get(data, [])))["data"]["seed"] == 7


# ---- schedules -------------------------------------------------------------------------------------------------------


def test_every_preset_is_an_option_of_the_schedule() -> None:
    assert set(options("inq/schedule")) == {"default", *PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_its_portions_whatever_the_bits(preset: str) -> None:
    callback = instantiate(configure(f"inq/schedule={preset}", "inq.bits=3").inq)
    assert callback.options.phases == Schedule(PRESETS[preset])
    assert callback.options.bits == 3


@pytest.mark.parametrize("bits", range(2, 9))
def test_without_a_preset_the_bits_decide(bits: int) -> None:
    assert instantiate(configure(f"inq.bits={bits}").inq).options.phases == Schedule(PRESETS[default_preset(bits)])


def test_portions_go_before_the_preset_and_phases_have_a_length() -> None:
    overrides = ["inq/schedule=alexnet", "inq.schedule.portions=[0.4,1.0]", "inq.schedule.epochs_per_phase=3"]
    assert instantiate(configure(*overrides).inq).options.phases == Schedule((0.4, 1.0), (0, 3))


def test_starts_and_unit_reach_the_schedule() -> None:
    overrides = ["inq.schedule.portions=[0.4,1]", "inq.schedule.starts=[2,9]", "inq.schedule.unit=step"]
    assert instantiate(configure(*overrides).inq).options.phases == Schedule((0.4, 1.0), (2, 9), "step")


def test_layers_are_chosen_from_the_command_line() -> None:
    overrides = ["inq.include=['net.*']", "inq.exclude=['*.linear']", "inq.layer_bits={net.conv1:8,*.fc:3}"]
    options = instantiate(configure(*overrides).inq).options
    assert (options.include, options.exclude) == (["net.*"], ["*.linear"])
    assert options.layer_bits == {"net.conv1": 8, "*.fc": 3}
    as_hydra_asks_of_others = configure("+inq.layer_bits={conv:8}")
    assert instantiate(as_hydra_asks_of_others.inq).options.layer_bits == {"conv": 8}
    with pytest.raises(ConfigCompositionException, match=r"inq\.layer_bits"):
        configure("inq.layer_bits={net.conv1:many}")


def test_levels_are_chosen_from_the_command_line() -> None:
    for value, expected in (
        ("dense", "dense"),
        ("{zero: false, exponents: [0, 2]}", Levels(zero=False, exponents=(0, 2))),
    ):
        assert instantiate(configure("inq.bits=2", f"inq.levels={value}").inq).options.levels == expected
        for plus in ("", "+"):
            overrides = [f"{plus}inq.layer_levels={{net.fc: {value}}}"]
            assert instantiate(configure(*overrides).inq).options.layer_levels == {"net.fc": expected}
    with pytest.raises(InstantiationException, match="levels: must be one of 'auto', 'paper', 'full', 'dense'"):
        instantiate(configure("inq.levels=finest").inq)


def test_another_application_can_use_the_groups(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text(
        "defaults:\n  - inq: default\n  - _self_\nhydra:\n  searchpath: ['pkg://inq_lightning.conf']\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("app", overrides=["inq/schedule=vgg16", "inq.bits=4"])
    callback = instantiate(cfg.inq)
    assert isinstance(callback, INQCallback)
    assert callback.options.bits == 4
    assert callback.options.phases == Schedule(PRESETS["vgg16"])


# ---- structured configs and what they configure ----------------------------------------------------------------------


def parameters(target: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults, MISSING where there is none; nothing and an empty collection are the same."""
    return {
        name: MISSING if p.default is inspect.Parameter.empty else _default(p.default)
        for name, p in inspect.signature(target).parameters.items()
    }


def fields(config: type) -> dict[str, Any]:
    """The same of a structured config."""
    return {name: _default(value) for name, value in vars(config()).items() if name not in ("_target_", "_convert_")}


def _default(value: Any) -> Any:
    return None if isinstance(value, (tuple, list, dict, DictConfig)) and not value else value


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (ScheduleConfig, build_schedule),
        (ClassifierConfig, Classifier),
        (DigitsConfig, DigitsDataModule),
        (NpzConfig, NpzDataModule),
        (TorchvisionConfig, TorchvisionDataModule),
    ],
)
def test_a_config_has_the_parameters_and_defaults_of_what_it_builds(config: type, target: Callable[..., Any]) -> None:
    assert fields(config) == parameters(target)
    assert config()._target_ == f"{target.__module__}.{target.__qualname__}"


def test_the_callbacks_config_has_its_parameters_and_defaults() -> None:
    ours, its = fields(INQConfig), parameters(INQCallback)
    assert ours.pop("schedule") == ScheduleConfig()
    assert its.pop("schedule") is None
    assert ours == its
    assert INQConfig()._target_ == "inq_lightning.INQCallback"


@pytest.mark.parametrize(
    "override",
    ["inq.include=net", "inq.exclude={net:1}", "inq.layer_bits=[8]", "inq.schedule.starts=[soon]", "data.augment=2.5"],
)
def test_collections_are_checked_by_what_the_arguments_say(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=re.escape(override.split("=")[0])):
        configure("data=npz", override)


@pytest.mark.parametrize("data", ["digits", "npz", "mnist"])
def test_a_composed_config_can_be_sent_to_another_process(data: str) -> None:
    cfg = configure(f"data={data}")
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_the_trainers_config_names_parameters_of_the_trainer() -> None:
    assert fields(TrainerConfig).keys() <= parameters(Trainer).keys()
