from __future__ import annotations

import io
import json
import re
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from processes import launch, run_program
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.loggers import MLFlowLogger as MLFlowLoggerOfLightning
from pytorch_lightning.loggers import WandbLogger as WandbLoggerOfLightning
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.strategies import ModelParallelStrategy
from strategies_worker import Net, ShardedNet
from support import SCHEDULE, TinyModule, assert_same_state, trainer
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor, nn

from inq_lightning import INQCallback, Schedule
from inq_lightning.frontends.lightning.loggers import layout
from inq_lightning.frontends.lightning.monitor import INQMonitor

SHORT = {0: 0.5, 1: 1.0}
FIGURES = ["inq/exponents", "inq/heatmap", "inq/metrics"]


class Logging(TinyModule):
    """Logs what modules usually log, and has hyper-parameters."""

    def __init__(self, width: int = 14, **options: Any) -> None:
        super().__init__(**options)
        self.save_hyperparameters("width")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        self.log(f"{stage}/loss", self.loss(batch))
        self.log(f"{stage}/acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def run(*loggers: Logger, schedule: dict[int, float] = SHORT, ckpt: Path | None = None, **options: Any) -> INQMonitor:
    monitor = INQMonitor()
    options = {"logger": list(loggers), "limit_val_batches": 1.0, "max_epochs": len(schedule)} | options
    trainer(INQCallback(schedule=schedule), monitor, **options).fit(Logging(), ckpt_path=ckpt)
    return monitor


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), {"images": 0, "histograms": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """A run that tests before and after, as TensorBoard reads it."""
    folder = tmp_path_factory.mktemp("shown")
    logger = TensorBoardLogger(folder, name="", version="run")
    callbacks = [INQCallback(bits=4, schedule=SCHEDULE), INQMonitor(), LearningRateMonitor()]
    t = trainer(*callbacks, logger=logger, limit_val_batches=1.0, log_every_n_steps=1)
    module = Logging(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))
    t.test(module, verbose=False)
    t.fit(module)
    t.test(module, verbose=False)
    return events(folder / "run")


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_every_phase_has_a_figure_of_each_kind_and_the_metrics_have_one_of_the_end(shown: EventAccumulator) -> None:
    assert sorted(shown.Tags()["images"]) == FIGURES
    assert [image.step for image in shown.Images("inq/exponents")] == [1, 5, 9, 13]
    assert [image.step for image in shown.Images("inq/heatmap")] == [1, 5, 9, 13]
    assert [image.step for image in shown.Images("inq/metrics")] == [1, 5, 9, 13, 16, 17]  # the last with the test's
    for tag in FIGURES:
        for image in shown.Images(tag):
            pixels = imread(io.BytesIO(image.encoded_image_string))
            assert pixels.shape[:2] == (image.height, image.width)
            assert pixels.shape[0] > 200
            assert pixels.std() > 0.05  # not blank


def test_histograms_count_the_frozen_and_the_free_weights_of_each_phase(shown: EventAccumulator) -> None:
    layers = {"net.0.weight": 112, "net.3.weight": 56}
    assert set(shown.Tags()["histograms"]) == {f"inq_exponents/{n}/{k}" for n in layers for k in ("frozen", "free")}
    for name, numel in layers.items():
        frozen = [h.histogram_value for h in shown.Histograms(f"inq_exponents/{name}/frozen")]
        free = [h.histogram_value for h in shown.Histograms(f"inq_exponents/{name}/free")]
        assert [h.num for h in free] == [numel - round(p * numel) for p in (0.5, 0.75, 0.875)]
        assert frozen[0].num == numel / 2  # the largest half has no zeros
        assert [h.num for h in frozen] == sorted(h.num for h in frozen)
        assert len(frozen) == 4
        assert max(frozen[-1].bucket_limit) - frozen[-1].min <= 7  # 4 bits: seven exponents


def test_the_layout_groups_scalars_that_exist(shown: EventAccumulator) -> None:
    (event,) = shown.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}
    assert charts.keys() == {"INQ", "metrics"}
    assert charts["INQ"].keys() == {
        "quantized fraction",
        "phase",
        "signal-to-quantization-noise ratio (dB)",
        "learning rate",
    }
    assert charts["metrics"].keys() >= {"acc", "loss"}
    scalars = {f"^{tag}$".replace("-", r"\-") for tag in shown.Tags()["scalars"]}
    for chart in charts["INQ"].values():
        assert set(chart) <= scalars
    assert {"^val/acc$", "^test/acc$"} <= set(charts["metrics"]["acc"])


def test_the_layout_has_a_chart_of_all_layers_where_they_are_logged() -> None:
    charts = layout(
        [
            "inq/quantized_fraction",
            "inq/quantized_fraction_per_layer/a.weight",
            "inq/quantized_fraction_per_layer/b.weight",
        ]
    )
    (pattern,) = charts["INQ"]["quantized fraction by layer"][1]
    assert re.match(pattern, "inq/quantized_fraction_per_layer/b.weight")
    assert not re.match(pattern, "inq/quantized_fraction")


def plugin(shown: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(shown.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)


def test_the_hparams_table_begins_with_bits_and_test_metrics_beside_runs_without_a_monitor(tmp_path: Path) -> None:
    runs = [[], *([INQCallback(bits=bits, schedule=SHORT), INQMonitor()] for bits in (4, 3))]
    for version, callbacks in enumerate(runs):
        logger = TensorBoardLogger(tmp_path, name="", version=f"version_{version}")
        trainer(*callbacks, logger=logger, max_epochs=2, limit_val_batches=1.0).fit(Logging())
    assert len(list(tmp_path.glob("events*"))) == 1  # of the last run
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))))
    tags = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, tags, None)
    assert experiment.hparam_infos[0].name == "inq/bits"
    assert [info.name.tag for info in experiment.metric_infos][:2] == ["test/acc", "test/loss"]


def test_the_hparams_tab_gets_the_settings_and_the_final_metrics(shown: EventAccumulator) -> None:
    hparams = plugin(shown, "session_start_info").session_start_info.hparams
    assert hparams["inq/bits"].number_value == 4
    assert hparams["inq/partition"].string_value == "magnitude"
    assert hparams["inq/portions"].string_value == "0.5, 0.75, 0.875, 1.0"
    assert hparams["inq/keep_zeros"].string_value == "False"
    assert hparams["width"].number_value == 14
    metrics = {info.name.tag for info in plugin(shown, "experiment").experiment.metric_infos}
    assert metrics >= {"inq/quantized_fraction", "inq/bytes", "val/acc", "test/acc", "test/loss", "train/loss"}
    assert "hp_metric" not in metrics
    assert metrics <= set(shown.Tags()["scalars"]) | {"train/loss"}  # Lightning logs it by step and by epoch


def test_the_bytes_are_those_of_the_quantized_weights_and_the_other_parameters(shown: EventAccumulator) -> None:
    others = sum(p.numel() for p in Logging().parameters()) - 168
    (event,) = shown.Scalars("inq/bytes")
    assert event.value == -(-(168 * 4 + others * 32) // 8)


# ---- other loggers ---------------------------------------------------------------------------------------------------


def test_a_csv_logger_gets_no_figures_and_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "isinstance.treespec|.*does not have many workers|`isinstance")
        run(CSVLogger(tmp_path, name="", version="run"), log_every_n_steps=1)
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"inq/bytes", "inq/quantized_fraction", "val/acc"} <= set(header)
    assert "inq/bits: 5" in (tmp_path / "run" / "hparams.yaml").read_text()
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".csv", ".yaml"}


class Alternating(Logging):
    """Two optimizers, each of which steps in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 3)]


def test_figures_are_on_lightnings_step_axis_however_many_optimizers_there_are(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    options = {"logger": logger, "limit_val_batches": 1.0, "max_epochs": 2, "log_every_n_steps": 1}
    t = trainer(INQCallback(schedule=SHORT), INQMonitor(), **options)
    t.fit(Alternating())
    assert t.global_step == 16
    shown = events(tmp_path / "run")
    for tag, steps in zip(FIGURES, ([1, 5], [1, 5], [5, 8]), strict=True):
        assert [image.step for image in shown.Images(tag)] == steps
    assert [event.step for event in shown.Scalars("train/loss_step")][-1] == 7
    assert [event.step for event in shown.Scalars("inq/bytes")] == [8]


class FileStore(Logger):
    """Keeps each metric in a file of its name, which may be a path, as MLflow's file store does."""

    name, version = "files", 0

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{step} {value}\n")


def test_no_metric_is_a_folder_of_others(tmp_path: Path) -> None:
    callback = INQCallback(schedule=SHORT, log_per_layer=True)
    module = Logging()
    module.empty = nn.Linear(4, 0)
    trainer(callback, INQMonitor(), logger=FileStore(tmp_path), max_epochs=2).fit(module)
    folder = tmp_path / "inq" / "quantized_fraction_per_layer"
    assert {path.name for path in folder.iterdir()} == {"net.0.weight", "net.3.weight", "empty.weight"}
    assert (tmp_path / "inq" / "quantized_fraction").read_text().endswith(" 1.0\n")


def test_several_loggers_and_none_work(tmp_path: Path) -> None:
    first, second = (TensorBoardLogger(tmp_path, name="", version=v) for v in "ab")
    run(first, CSVLogger(tmp_path, name="", version="c"), second)
    for version in "ab":
        assert sorted(events(tmp_path / version).Tags()["images"]) == FIGURES
    monitor = run()
    assert [round(p["fraction"], 3) for p in monitor.state_dict()["history"]] == [0.5, 1.0]


class Stub(Logger):
    """A logger with its class's name as its only likeness to the real one, whose package may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[tuple[str, int | None]] = []
        self.params: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return "stub"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.params.update(params)


class WandbLogger(Stub):
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        (figure,) = images
        assert isinstance(figure, Figure)
        figure.savefig(io.BytesIO())
        self.figures.append((key, step))


class MLFlowLogger(Stub):
    run_id = "7"

    @property
    def experiment(self) -> MLFlowLogger:
        return self

    def log_figure(self, run_id: str, figure: Figure, artifact_file: str) -> None:
        assert run_id == "7"
        tag, step = artifact_file.removesuffix(".png").rsplit("/", 1)
        figure.savefig(io.BytesIO())
        self.figures.append((tag, int(step)))


def test_wandb_and_mlflow_get_the_figures_through_their_own_interface() -> None:
    loggers = WandbLogger(), MLFlowLogger()
    run(*loggers)
    for logger in loggers:
        assert [step for tag, step in logger.figures if tag == "inq/heatmap"] == [1, 5]
        assert [step for tag, step in logger.figures if tag == "inq/metrics"] == [5, 8]
        assert {tag for tag, _ in logger.figures} == set(FIGURES)
        assert logger.params["inq/bits"] == 5


# The real ones, where their packages are installed: pip install wandb mlflow


def test_a_real_wandb_run_has_scalars_images_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLoggerOfLightning(offline=True, save_dir=tmp_path, project="inq")
    run(logger, log_every_n_steps=1)
    summary, config = logger.experiment.summary, logger.experiment.config
    assert summary["inq/quantized_fraction"] == 1
    assert summary["inq/bytes"] > 0
    assert summary["val/acc"] >= 0
    assert config["inq/portions"] == "0.5, 1.0"
    wandb.finish()
    for tag, count in zip(FIGURES, (2, 2, 2), strict=True):
        images = list(tmp_path.glob(f"wandb/offline-run-*/files/media/images/{tag}_*.png"))
        assert len(images) == count
        assert all(imread(path).std() > 0.05 for path in images)


def test_a_real_mlflow_run_has_scalars_images_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.chdir(tmp_path)  # where its files go beside a database
    logger = MLFlowLoggerOfLightning("inq", tracking_uri="sqlite:///runs.db")
    run(logger, log_every_n_steps=1)
    client = tracking.MlflowClient("sqlite:///runs.db")
    data = client.get_run(logger.run_id).data
    assert data.metrics.keys() >= {"inq/quantized_fraction", "inq/phase", "inq/sqnr_db", "inq/bytes", "val/acc"}
    assert data.params["inq/portions"] == "0.5, 1.0"
    fractions = client.get_metric_history(logger.run_id, "inq/quantized_fraction")
    assert [metric.value for metric in fractions] == [0.5, 1.0]
    for tag, steps in zip(FIGURES, ([1, 5], [1, 5], [5, 8]), strict=True):
        files = [file.path for file in client.list_artifacts(logger.run_id, tag)]
        assert files == [f"{tag}/{step:08d}.png" for step in steps]
        image = imread(client.download_artifacts(logger.run_id, files[0], str(tmp_path)))
        assert image.std() > 0.05


# ---- training is left alone ------------------------------------------------------------------------------------------


def test_the_weights_and_the_random_numbers_are_the_same_with_and_without(tmp_path: Path) -> None:
    modules, states = [], []
    for callbacks in ([], [INQMonitor()]):
        seed_everything(3, verbose=False)
        module = Logging()
        logger = TensorBoardLogger(tmp_path, name="", version=str(len(callbacks)))
        trainer(INQCallback(schedule=SHORT), *callbacks, logger=logger, max_epochs=2, limit_val_batches=1.0).fit(module)
        modules.append(module)
        states.append(torch.get_rng_state())
    assert_same_state(*modules)
    assert torch.equal(*states)


def test_the_order_of_the_two_callbacks_makes_no_difference(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer(INQMonitor(), INQCallback(schedule=SHORT), max_epochs=2, logger=logger).fit(Logging())
    assert [image.step for image in events(tmp_path / "run").Images("inq/heatmap")] == [1, 5]


def test_a_schedule_in_steps_is_shown_at_its_steps(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callback = INQCallback(schedule=Schedule([0.5, 1.0], [2, 6], "step"))
    trainer(callback, INQMonitor(), logger=logger).fit(Logging())
    assert [image.step for image in events(tmp_path / "run").Images("inq/heatmap")] == [3, 7]


def test_without_an_inqcallback_the_error_says_what_to_add() -> None:
    with pytest.raises(ValueError, match=r"callbacks=\[INQCallback\(\), INQMonitor\(\)\]"):
        trainer(INQMonitor()).fit(Logging())


# ---- several processes -----------------------------------------------------------------------------------------------


def fit_monitored(out: str, processes: int, sharded: bool) -> None:
    """One of so many processes, all on the same data; the loggers write on the first."""
    options: dict[str, Any] = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    options |= {"use_distributed_sampler": False, "limit_val_batches": 1.0, "num_sanity_val_steps": 1}
    if sharded:
        options["strategy"] = ModelParallelStrategy(processes, 1, timeout=timedelta(seconds=60))
    loggers = [TensorBoardLogger(out, name="", version="tensorboard"), CSVLogger(out, name="", version="csv")]
    module = ShardedNet() if sharded else Net()
    callbacks = [INQCallback(schedule=SCHEDULE), INQMonitor(), LearningRateMonitor()]
    trainer(*callbacks, logger=loggers, log_every_n_steps=1, **options).fit(module)


def histograms(shown: EventAccumulator) -> dict[str, list[tuple[int, list[float], list[float]]]]:
    return {
        tag: [
            (event.step, list(event.histogram_value.bucket_limit), list(event.histogram_value.bucket))
            for event in shown.Histograms(tag)
        ]
        for tag in shown.Tags()["histograms"]
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    """What one process shows."""
    folder = tmp_path_factory.mktemp("one")
    fit_monitored(str(folder), 1, False)
    return events(folder / "tensorboard")


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_show_once_what_one_does(sharded: bool, one: EventAccumulator, tmp_path: Path) -> None:
    launch(2, fit_monitored, str(tmp_path), 2, sharded)
    writers = {path.name.split(".")[-2] for path in (tmp_path / "tensorboard").glob("events.*")}
    assert len(writers) == 1  # their process ids
    two = events(tmp_path / "tensorboard")
    assert len(histograms(one)) == 6
    assert histograms(two) == histograms(one)
    assert two.Tags() == one.Tags()
    for tag in FIGURES:
        assert [image.step for image in two.Images(tag)] == [image.step for image in one.Images(tag)]
    for tag in ("inq/bytes", "inq/quantized_fraction", "val_loss"):
        assert [(e.step, e.value) for e in two.Scalars(tag)] == [(e.step, e.value) for e in one.Scalars(tag)]
    assert (tmp_path / "csv" / "metrics.csv").read_text().count("\n") > 5


# ---- resume ----------------------------------------------------------------------------------------------------------


class Interruption(Callback):
    """Stops in the middle of an epoch."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 10:
            raise RuntimeError("interrupted")


def test_a_resumed_run_has_the_history_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(schedule=SCHEDULE)
    saving = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    last = ModelCheckpoint(tmp_path, "last", enable_version_counter=False)
    callbacks = [INQCallback(schedule=SCHEDULE), INQMonitor(), Interruption(), last]
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(*callbacks, limit_val_batches=1.0, **saving).fit(Logging())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["INQMonitor"]
    assert len(json.dumps(state)) < 1000
    resumed = run(schedule=SCHEDULE, ckpt=tmp_path / "last.ckpt")
    ours, theirs = resumed.state_dict()["history"], whole.state_dict()["history"]
    assert [(p["step"], p["fraction"]) for p in ours] == [(p["step"], p["fraction"]) for p in theirs]
    assert ours[-1]["metrics"].keys() == {"train/loss", "val/loss", "val/acc"}
    assert ours == theirs


def test_a_second_fit_begins_with_an_empty_history() -> None:
    monitor = INQMonitor()
    for _ in range(2):
        trainer(INQCallback(schedule=SCHEDULE), monitor, limit_val_batches=1.0).fit(Logging())
    assert len(monitor.state_dict()["history"]) == 4


# ---- without matplotlib ----------------------------------------------------------------------------------------------

WITHOUT = """
import sys, warnings
import torchmetrics  # which imports it where it is installed
for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
from pytorch_lightning.loggers import TensorBoardLogger
from inq_lightning import INQCallback
from inq_lightning.frontends.lightning.monitor import INQMonitor
from support import SCHEDULE, TinyModule, trainer
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    logger = TensorBoardLogger({folder!r}, name="", version="run")
    trainer(INQCallback(schedule=SCHEDULE), INQMonitor(), logger=logger).fit(TinyModule())
print(*[w.message for w in caught if "figures" in str(w.message)], sep="\\n")
"""


def test_without_matplotlib_one_warning_says_so_and_the_rest_is_logged(tmp_path: Path) -> None:
    code = WITHOUT.format(folder=str(tmp_path))
    printed = run_program("-c", code, cwd=tmp_path)
    lines = [line for line in printed.splitlines() if line]
    assert len(lines) == 1, printed
    assert "the extra train, pip install 'matplotlib>=" in lines[0]
    tags = events(tmp_path / "run").Tags()
    assert tags["images"] == []
    assert len(tags["histograms"]) == 4
    assert "inq/bytes" in tags["scalars"]
