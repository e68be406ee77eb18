"""Exceptions of the other process, and the classes that represent them here."""

from __future__ import annotations

import importlib
import sys
from typing import Any

# Modules whose exceptions both processes have. Not unittest, whose exceptions control tests: a response could
# skip them.
MODULES = {
    "argparse", "asyncio.exceptions", "asyncio.queues", "binascii", "concurrent.futures._base",
    "configparser", "copy", "csv", "_csv", "dataclasses", "decimal", "email.errors", "getopt",
    "graphlib", "http.client", "io", "ipaddress", "json.decoder", "locale", "lzma", "_lzma",
    "numpy.exceptions", "numpy.linalg", "pickle", "_pickle", "queue", "_queue", "re", "re._constants",
    "shutil", "sre_constants", "statistics", "string", "struct", "subprocess", "tarfile",
    "threading", "urllib.error", "xml.etree.ElementTree", "zipfile", "zlib", "zoneinfo._common",
}  # fmt: skip


def base_of(kind: Any) -> tuple[list[type], list[str | None]]:
    """Return the user-defined classes of an exception class, and module and name of their known base.

    The base is builtin or from `MODULES`; classes of other libraries are skipped.
    """
    own: list[type] = []
    for below in kind.__mro__:
        if below.__module__ == "builtins":
            return own, [None, below.__name__]
        if below.__module__ in MODULES and below.__qualname__ == below.__name__:
            return own, [below.__module__, below.__name__]
        outside = below.__module__.split(".")[0] in sys.stdlib_module_names
        if not outside and issubclass(below, BaseException):
            own.append(below)
    return own, [None, "Exception"]


def find(module: Any, name: Any) -> type[BaseException]:
    """Return the class that `base_of` named; Exception if it is not a known one."""
    found: Any = None
    if type(name) is str and (module is None or (type(module) is str and module in MODULES)):
        try:
            found = getattr(importlib.import_module(module or "builtins"), name, None)
        except ImportError:
            found = None
    known = isinstance(found, type) and issubclass(found, BaseException)
    return found if known else Exception
