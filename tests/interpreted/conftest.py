"""These tests run with TRITON_INTERPRET=1 alone, as `make test` and tests/kernels/test_interpreted.py do."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    torch.set_num_threads(1)  # the tests are small: on a busy machine threads make them many times slower
    # For plans.py: --import-mode=importlib adds nothing to the path.
    sys.path.append(str(Path(__file__).parents[1] / "kernels"))
else:
    collect_ignore_glob = ["test_*.py"]
