from __future__ import annotations

import os

# The tests' tensors are small, and several processes share the machine: one thread each, those that tests start
# included. It also makes runs on different numbers of processes comparable, which else add up in another order.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
