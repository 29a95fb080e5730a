"""The structured configs behind `conf/`: they give every key its type, so that Hydra refuses a wrong one by name.

Importing this module registers those of the groups `inq` and `inq/schedule` with Hydra, which an application of your
own can then compose, with ``pkg://inq_lightning.conf`` on its search path, and build the callback from them with
``hydra.utils.instantiate(cfg.inq)``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, OmegaConf

from inq_lightning.core.options import Options
from inq_lightning.core.schedule import PRESETS, Schedule, Unit, default_preset
from inq_lightning.grid import MAX_BITS, MIN_BITS
from inq_lightning.recipes.structured import configures

_BITS = f"{MIN_BITS} to {MAX_BITS}"
Output = Literal["auto", "rich", "json"]


def _by_pattern(kind: Any) -> Any:
    """Nothing for any pattern yet; patterns can be set without the ``+`` that a plain dict would ask for."""
    return DictConfig({}, key_type=str, element_type=kind, flags={"struct": False})


def build_schedule(
    bits: int,
    preset: str | None = None,
    portions: Sequence[float] | None = None,
    starts: Sequence[int] | None = None,
    epochs_per_phase: int | None = None,
    unit: Unit = "epoch",
) -> Schedule:
    """Build the schedule that a config describes.

    Args:
        bits: Bit width whose preset is taken where neither ``portions`` nor ``preset`` is given.
        preset: One of the paper's rows.
        portions: Accumulated portions; they go before ``preset``.
        starts: When each portion begins.
        epochs_per_phase: Length of each phase, in place of ``starts``; with neither, the phases are spread evenly over
            the Trainer's run.
        unit: What ``starts`` counts, ``"epoch"`` or ``"step"``.

    Raises:
        ValueError: The values contradict each other or are not allowed.
    """
    if portions is None:
        portions = Schedule.from_preset(preset or default_preset(bits)).portions
    if epochs_per_phase is None:
        return Schedule(portions, starts, unit)
    if starts is not None or unit != "epoch":
        raise ValueError("epochs_per_phase excludes starts and unit=step: each of them says when phases begin")
    return Schedule.every(epochs_per_phase, portions)


@configures(build_schedule, allowed={"bits": _BITS, "preset": ", ".join(PRESETS)})
class ScheduleConfig:
    """When the quantized portion rises; arguments of :func:`build_schedule`."""


@configures(Options, allowed={"bits": _BITS, "levels": "auto, paper, full, dense, {zero: …, exponents: […]}"})
class INQConfig:
    """Arguments of :class:`~inq_lightning.INQCallback`: those of :class:`~inq_lightning.Options`."""

    _target_: str = "inq_lightning.INQCallback"
    _convert_: str = "all"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    layer_bits: dict[str, int] = field(default_factory=lambda: _by_pattern(int))
    layer_levels: dict[str, Any] = field(default_factory=lambda: _by_pattern(Any))
    layer_activation_bits: dict[str, int] = field(default_factory=lambda: _by_pattern(int))


@dataclass
class TrainerConfig:
    """Arguments of Lightning's Trainer; others can be added with ``+trainer.NAME=VALUE``.

    Attributes:
        accelerator: Kind of device to train on: ``auto``, ``cpu``, ``gpu``, ``mps`` or ``tpu``.
        devices: How many of them, or a list of their indices; ``auto`` takes all.
        num_nodes: Number of machines.
        strategy: How the devices share the work: ``auto``, ``ddp`` or another of Lightning's strategies.
        precision: Number format of the computation, such as ``32-true``, ``bf16-mixed`` or ``16-mixed``; weights stay
            float32 in the mixed ones.
        max_epochs: Epochs of the quantization. Left out, it follows from the schedule: so many epochs for each phase,
            4 unless ``inq.schedule.epochs_per_phase`` says otherwise.
        max_steps: Optimizer steps after which training ends even if ``max_epochs`` has not; -1 is no limit.
        max_time: Wall time after which training ends, as ``DD:HH:MM:SS``.
        accumulate_grad_batches: Batches whose gradients add up before an optimizer step.
        gradient_clip_val: Largest norm or value of the gradients; null does not clip.
        gradient_clip_algorithm: What is clipped: ``norm`` (where it is null, too) or ``value``.
        deterministic: Whether only deterministic algorithms may run; null leaves it to torch.
        benchmark: Whether cuDNN tries out which algorithm is fastest; null leaves it to Lightning.
        fast_dev_run: Run a single batch of everything, to find errors.
        limit_train_batches: Training batches an epoch, as a number or a share; null takes all.
        limit_val_batches: The same of validation batches.
        limit_test_batches: The same of test batches.
        val_check_interval: How often to validate within an epoch, in batches or as a share; null: at its end.
        check_val_every_n_epoch: Validate after every so many epochs.
        num_sanity_val_steps: Validation batches that are tried before training starts.
        log_every_n_steps: Log values of single steps every so many steps.
        enable_progress_bar: Show Lightning's progress bar.
        enable_model_summary: Show Lightning's table of layers before training.
    """

    _target_: str = "pytorch_lightning.Trainer"
    accelerator: str = "auto"
    devices: Any = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    max_epochs: int | None = None
    max_steps: int = -1
    max_time: str | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    deterministic: bool | None = None
    benchmark: bool | None = None
    fast_dev_run: bool = False
    limit_train_batches: Any = None
    limit_val_batches: Any = None
    limit_test_batches: Any = None
    val_check_interval: Any = None
    check_val_every_n_epoch: int = 1
    num_sanity_val_steps: int = 0
    log_every_n_steps: int = 10
    enable_progress_bar: bool = True
    enable_model_summary: bool = False


@dataclass
class PretrainConfig:
    """The training of the full-precision network, skipped when ``ckpt`` names a trained one.

    Attributes:
        max_epochs: Epochs of the training.
        model: What differs in the model's config during this stage, such as ``pretrain.model.lr=0.1``.
    """

    max_epochs: int = 20
    model: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    """Everything that `inq-train` reads.

    Attributes:
        model: The network and how it is trained.
        data: The images.
        inq: The quantization: arguments of :class:`~inq_lightning.INQCallback`.
        trainer: Lightning's Trainer; others of its arguments can be added as ``+trainer.NAME=VALUE``.
        pretrain: The training of the full-precision network, skipped when ``ckpt`` names a trained one.
        logger: Loggers of Lightning, each under any name.
        callbacks: Callbacks of Lightning, each under any name.
        seed: Seed of everything random: weights, data, the order of training.
        ckpt: A trained network to start from, a Lightning checkpoint or a state_dict, saved by torch or as safetensors;
            pre-training is skipped. With ``resume``, the checkpoint of the interrupted run.
        resume: Whether to go on with the interrupted run that wrote ``ckpt``.
        stage: What loggers and checkpoints call the stage that runs, ``pretrain`` or ``quantize``; set by `inq-train`.
        output: What is printed: ``rich``, progress and a table for people; ``json``, a line of JSON for each epoch and
            one for the report on standard output, with the table on standard error; ``auto``, ``rich`` on a terminal
            and ``json`` elsewhere.
        output_dir: Folder of everything that is written; left out, Hydra makes one for each run.
    """

    model: Any = MISSING
    data: Any = MISSING
    inq: INQConfig = field(default_factory=INQConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    ckpt: str | None = None
    resume: bool = False
    stage: str = "quantize"
    output: str = field(default="auto", metadata={"allowed": ", ".join(get_args(Output))})
    output_dir: str = MISSING


@dataclass
class QuantizeConfig(TrainConfig):
    """What `inq-quantize` reads besides.

    Attributes:
        images: How many training images it may look at; labels do not matter.
    """

    images: int = 512


def run_name(number: int, overrides: Sequence[str]) -> str:
    """Name of one run of a sweep, for its folder: its number, and what is set in it alone, such as ``0_inq.bits-2``.

    Without ``=`` and commas, which Hydra would not take in ``ckpt=PATH``.
    """
    given = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])
    everywhere = {one.get_key_element() for one in given if not one.is_sweep_override()}
    own = [text for text in overrides if text.partition("=")[0] not in everywhere]
    return "_".join([str(number), *(re.sub(r"[^\w.]+", "-", text).strip("-") for text in own)])[:150]


def register_training() -> None:
    """Register the rest of `inq-train`'s configs.

    Not on import, as the Hydra plugin imports this module into other applications: Hydra would validate their own files
    of the same names, such as ``model/base.yaml``, against these, and Lightning would have to be there to list its
    modules' arguments.
    """
    from inq_lightning.recipes import classifier, data

    OmegaConf.register_new_resolver("inq_run_name", run_name, replace=True)
    _register(
        ("", "base_train", TrainConfig),
        ("", "base_quantize", QuantizeConfig),
        ("model", "base", classifier.ClassifierConfig),
        ("data", "base_digits", data.DigitsConfig),
        ("data", "base_npz", data.NpzConfig),
        ("data", "base_torchvision", data.TorchvisionConfig),
        ("trainer", "base", TrainerConfig),
        ("pretrain", "base", PretrainConfig),
    )


def _register(*configs: tuple[str, str, type]) -> None:
    for group, name, node in configs:
        ConfigStore.instance().store(name, node, group or None)


_register(("inq", "base", INQConfig), ("inq/schedule", "base", ScheduleConfig))
