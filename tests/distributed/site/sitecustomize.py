"""On PYTHONPATH of launched commands: lets ranks run any engine on CPUs, see `tests.distributed.gloo`."""

import importlib.util
import os
from pathlib import Path

if "WORLD_SIZE" in os.environ:
    spec = importlib.util.spec_from_file_location("gloo", Path(__file__).parents[1] / "gloo.py")
    gloo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gloo)
    gloo.allow()
