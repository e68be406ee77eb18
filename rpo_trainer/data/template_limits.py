"""Limits on chat templates, which are untrusted code: time, memory and output length."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from rpo_trainer.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # for one conversation; a template usually needs less than a millisecond
CHARACTERS = 2**26  # for one conversation
_PROBE_SECONDS = 10.0
_PROBE_BYTES = 2**31  # in addition to the current size of the process
_CHECK_EVERY = 0.2
_MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class TemplateLimit(Exception):
    """A template runs too long or writes too much."""


class _Watch(threading.Thread):
    """Interrupts threads that exceed their time limit.

    There is one per process: starting a thread for each conversation would take longer than rendering it.
    """

    def __init__(self) -> None:
        super().__init__(name="template-limit", daemon=True)
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}  # by thread
        self.begun = threading.Event()

    def run(self) -> None:
        while True:
            self.begun.wait()
            time.sleep(_CHECK_EVERY)
            with self.lock:
                if not self.deadlines:
                    self.begun.clear()
                for thread, deadline in list(self.deadlines.items()):
                    if time.monotonic() > deadline:
                        del self.deadlines[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(thread), ctypes.py_object(TemplateLimit)
                        )


_watch: _Watch | None = None
_making = threading.Lock()


def _watching() -> _Watch:
    global _watch
    with _making:
        if _watch is None or _watch.process != os.getpid():  # a fork has no threads
            _watch = _Watch()
            _watch.start()
        return _watch


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TemplateLimit in the block if it takes longer; a single call into C is not interrupted."""
    watch, own = _watching(), threading.get_ident()
    with watch.lock:
        watch.deadlines[own] = time.monotonic() + seconds
        watch.begun.set()
    try:
        yield
    except TemplateLimit:
        raise TemplateLimit(f"it does not terminate within {seconds:.0f} s") from None
    finally:
        with watch.lock:
            if watch.deadlines.pop(own, None) is None:  # interrupted, or about to be
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(own), None)


def check_template_limits(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Render a short conversation in a child process with limits.

    Raises:
        ModelError: the chat template does not terminate, or needs gigabytes of memory.
    """
    if not tokenizer.chat_template or not hasattr(os, "fork"):
        return
    child = os.fork()
    if child == 0:
        os._exit(_render_with_limits(tokenizer))
    fault = _wait(child)
    if fault is not None:
        raise ModelError(
            f"the chat template {fault}",
            code="template.exceeds-limits",
            where=where,
            why="rendering a short conversation should take less than a millisecond",
            fix="fix the template, or set `chat_template` to chatml, plain or the path of another one",
        )


def _wait(child: int) -> str | None:
    end = time.monotonic() + _PROBE_SECONDS
    pause = 0.001
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return None if os.waitstatus_to_exitcode(status) == 0 else "uses too much memory"
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    with suppress(ProcessLookupError):
        os.kill(child, 9)
    os.waitpid(child, 0)
    return f"does not terminate within {_PROBE_SECONDS:.0f} s"


def _render_with_limits(tokenizer: Any) -> int:
    """Return 1 if the memory limit is exceeded. Other errors are reported when rows are rendered."""
    import resource

    try:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _PROBE_BYTES, held + _PROBE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError):
        pass  # not Linux: only the time is limited
    for prompt in (False, True):
        try:
            messages = _MESSAGES[:1] if prompt else _MESSAGES
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            if len(text) > CHARACTERS:
                return 1
        except MemoryError:
            return 1
        except BaseException:
            continue
    return 0
