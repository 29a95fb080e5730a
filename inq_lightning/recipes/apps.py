"""How `inq-train`, `inq-plan` and `inq-quantize` start: help at once, and mistakes told in one message.

Each is a Hydra application. What it takes to run, torch first of all, is imported only once it does.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from inq_lightning._version import __version__

_KEYS = {  # that most command lines have
    "inq.bits=4": "bits of a weight, 2 to 8",
    "model=resnet20": "the network; model=custom for one of your own",
    "data=npz data.path=images.npz": "the images; data=custom for data of your own",
    "ckpt=trained.ckpt": "a trained network to start from",
    "trainer=gpu": "where to train; trainer.max_epochs=20 and so on",
}


class App(NamedTuple):
    """What `--help` tells of one command.

    Attributes:
        name: Its name.
        about: What it is for.
        example: A line for a shell.
        keys: The five most used overrides, and what they do.
    """

    name: str
    about: str
    example: str
    keys: dict[str, str] = _KEYS

    def help(self) -> str:
        """The text for `--help`, at most 80 columns wide."""
        conf = Path(next(iter(import_module("inq_lightning.conf").__path__)))
        groups = sorted({path.parent for path in conf.glob("*/**/*.yaml")})
        names = {g.relative_to(conf).as_posix(): ", ".join(sorted(p.stem for p in g.glob("*.yaml"))) for g in groups}
        return "\n".join(
            [
                f"{textwrap.fill(self.about, 80)}\n",
                f"usage: {self.name} [KEY=VALUE ...] [GROUP=OPTION ...] [--json] [-m]\n",
                "most used:",
                *(f"  {key:<31}{meaning}" for key, meaning in self.keys.items()),
                "\ngroups, and their options:",
                *(f"  {_fold(f'{name}: {options}')}" for name, options in names.items()),
                "\noptions:",
                "  --json         lines of JSON on standard output, for programs",
                "  -m             a run for each of several values, such as inq.bits=2,3,4",
                "  --cfg job      the whole configuration, as the other arguments make it",
                "  --version      the version of inq-lightning",
                "  --hydra-help   everything that Hydra takes besides",
                f"\nexample:\n  {self.example}\n",
                "documentation: docs/how-to/hydra.md in the repository, and every key in\n"
                "docs/reference/configuration.md",
            ]
        )


def _fold(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 76, subsequent_indent="    "))


TRAIN = App(
    "inq-train",
    "Trains a network at full precision, or loads one, quantizes its weights to powers of two, phase by phase, tests "
    "both and reports.",
    "inq-train inq.bits=4 data=npz data.path=images.npz model=resnet20",
)
PLAN = App(
    "inq-plan",
    "Prints what inq-train would do with the same arguments: which layers, when, and what that saves. It needs no data "
    "and trains nothing.",
    "inq-plan inq.bits=4 model=resnet20 data=npz",
    {
        **{key: meaning for key, meaning in _KEYS.items() if key != "trainer=gpu"},
        "inq/schedule=alexnet": "when the quantized portion rises",
    },
)
QUANTIZE = App(
    "inq-quantize",
    "Quantizes a trained network without training, on some hundred images; tests it before and after, and reports.",
    "inq-quantize ckpt=trained.ckpt inq.bits=3 data=npz data.path=images.npz",
    {
        "ckpt=trained.ckpt": "the trained network",
        **{key: meaning for key, meaning in _KEYS.items() if key not in ("ckpt=trained.ckpt", "trainer=gpu")},
        "images=256": "how many training images it looks at",
    },
)


def train() -> None:
    """`inq-train`."""
    if _begins(TRAIN):
        from inq_lightning.recipes.train import main

        _run(TRAIN, main)


def plan() -> None:
    """`inq-plan`."""
    if _begins(PLAN):
        from inq_lightning.recipes.plan import main

        _run(PLAN, main)


def quantize() -> None:
    """`inq-quantize`."""
    if _begins(QUANTIZE):
        from inq_lightning.recipes.quantize import main

        _run(QUANTIZE, main)


def _begins(app: App) -> bool:
    """Whether there is more to do than to help; ``--json``, which Hydra would refuse, becomes ``output=json``.

    In ``sys.argv``, as that is the only place where Hydra looks for arguments.
    """
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(app.help())
        return False
    if "--version" in sys.argv[1:]:
        print(f"{app.name} {__version__}")
        return False
    sys.argv[1:] = ["output=json" if argument == "--json" else argument for argument in sys.argv[1:]]
    return True


def _complete(main: Callable[[], None]) -> None:
    """Offer what completes a line, but not the groups' internal base configs, which Hydra lists with the others."""
    with redirect_stdout(StringIO()) as offered:
        main()
    print(re.sub(r"\S+=base(_\w+)?(?!\S) ?", "", offered.getvalue()), end="")


def _run(app: App, main: Callable[[], None]) -> None:
    """Run it; a mistake of the user's ends the process with one message and exit code 2.

    With ``HYDRA_FULL_ERROR=1`` in the environment, every error shows where it was raised.
    """
    from inq_lightning.recipes.mistakes import explain

    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print errors itself, and exit
    try:
        _complete(main) if {"-sc", "--shell-completion"} & {*sys.argv} else main()
    except Exception as error:
        message = None if asked == "1" else explain(error)
        if message is None:
            raise
        print(f"{app.name}: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        if asked is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = asked
