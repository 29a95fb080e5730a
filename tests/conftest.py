from __future__ import annotations

import os
import sys

# The tests' tensors are small, and several processes share the machine: one thread each, those that tests start
# included. It also makes runs on different numbers of processes comparable, which else add up in another order.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

if sys.platform == "win32":  # which neither forks processes nor limits or measures their memory
    collect_ignore = [
        "frontends/lightning/test_bad_input.py",
        "frontends/lightning/test_kill.py",
        "frontends/lightning/test_monitor.py",
        "frontends/lightning/test_strategies.py",
        "report/test_run.py",
    ]
