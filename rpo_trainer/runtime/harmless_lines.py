"""Lines of other libraries that are harmless in a run here: hidden by logger and text, nothing else."""

from __future__ import annotations

import logging
import warnings

# By the logger's name: how its line begins. The reason stands above each.
HARMLESS: dict[str, tuple[str, ...]] = {
    # At import, wherever there is no `kernels`: 4-bit weights on a CPU take another path, same results.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # At import on a machine without a GPU: says what the run says itself.
    "DeepSpeed": ("Setting accelerator to CPU. If you have GPU",),
}
# By the module that warns: how the text begins (a regular expression), and its category.
HARMLESS_WARNINGS: dict[str, tuple[str, type[Warning]]] = {}


class _Hide(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


def hide_harmless_lines() -> None:
    """Hides the lines of this table, for programs; a second call changes nothing."""
    for name, beginnings in HARMLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Hide) for known in logger.filters):
            logger.addFilter(_Hide(beginnings))
    for module, (beginning, category) in HARMLESS_WARNINGS.items():
        warnings.filterwarnings("ignore", beginning, category, module)
