"""A rank whose last exchange is not finished when Python shuts down (see `test_end.py`).

python -m tests.distributed.finishing end | nothing
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import torch

from rpo_trainer.runtime import distributed


class Slow:
    """Delay the end of Python, which frees modules one after the other."""

    def __del__(self, sleep: Any = time.sleep) -> None:
        sleep(2.0)


def main(how: str) -> None:
    torch.distributed.init_process_group("gloo")
    # As DDP does. Its functions have the group as a default argument from here on.
    importlib.import_module("torch.distributed.nn.functional")
    late = torch.distributed.get_rank() == 1
    torch.distributed.barrier()
    time.sleep(1.5 if late else 0)
    work = torch.distributed.all_reduce(torch.ones(8), async_op=True)
    work.get_future().then(lambda _: None)  # it needs the interpreter lock
    del work
    time.sleep(1.5 if late else 0)
    if how == "end":
        assert distributed.end()


if __name__ == "__main__":
    main(sys.argv[1])
    slow = Slow()
