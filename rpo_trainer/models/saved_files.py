"""Files saved next to the weights: end tokens, generation config, tokenizer, processor."""

from __future__ import annotations

import copy
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig
from transformers.utils import (
    AUDIO_TOKENIZER_NAME,
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
)
from transformers.utils.hub import cached_file

from rpo_trainer.errors import ModelError, RunError, first_line
from rpo_trainer.models.multimodal import composite_config, is_multimodal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_OLD_TEMPLATE = "chat_template.json"  # of processors
# Not saved: it would take precedence over the tokenizer's template.
PROCESSOR_FILES = (
    PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, AUDIO_TOKENIZER_NAME
)  # fmt: skip
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FLAGGED = re.compile(r"^- `(\w+)`", re.MULTILINE)
_MISSING = object()
_PROBE = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ],
)  # fmt: skip


# --- ends ---


def listed(tokens: Any) -> list[int]:
    """Return `eos_token_id` of a config (a number, a list or None) as a list."""
    if tokens is None:
        return []
    return [int(t) for t in tokens] if isinstance(tokens, list | tuple) else [int(tokens)]


def joined_ends(trained: Sequence[int], known: Any) -> Any:
    """Combine end tokens: those of the training first, then those of the base, which stay valid."""
    base = listed(known)
    ends = [*trained, *(token for token in base if token not in trained)]
    if not trained or ends == base:
        return known
    return ends[0] if len(ends) == 1 else ends


def output_tokenizer(
    tokenizer: PreTrainedTokenizerBase, trained: Sequence[int]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer to save, whose end token is one that training ended responses with.

    It is unchanged if training used its end token, if another end token would change its output or that of
    its chat template, or if the template ends a turn with the token that opens the next one (GLM): plain
    text would then end with `<|user|>`. The pad token is not changed.
    """
    if not trained or tokenizer.eos_token_id in trained or _ends_with_openers(tokenizer):
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = tokenizer.convert_ids_to_tokens(trained[0])
    if changed.eos_token_id != trained[0] or _writes(changed) != _writes(tokenizer):
        return tokenizer
    return changed


def _ends_with_openers(tokenizer: PreTrainedTokenizerBase) -> bool:
    from rpo_trainer.data.rows import RowError
    from rpo_trainer.data.trained_spans import ChatRenderer

    try:
        return bool(tokenizer.chat_template) and ChatRenderer(tokenizer).ending().open
    except RowError:
        return False


def _writes(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    found: list[Any] = [tokenizer("a")["input_ids"], tokenizer.pad_token_id, len(tokenizer)]
    for messages in _PROBE if tokenizer.chat_template else ():
        for prompt in (False, True):
            try:
                found.append(
                    tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=prompt
                    )
                )
            except Exception as error:  # any error of a template
                found.append(type(error))
    return found


# --- generation config ---


def repair_generation(config: Any, where: str | None = None) -> list[str]:
    """Unset fields of a generation config that have no effect and that transformers refuses to save.

    Returns:
        `field=value` of the fields that were unset.

    Raises:
        ModelError: it cannot be saved for another reason.
    """
    plain = GenerationConfig()  # type: ignore[no-untyped-call]
    removed: list[str] = []
    try:
        config.validate(strict=True)
        return removed
    except ValueError as error:
        flagged = [name for name in _FLAGGED.findall(str(error)) if hasattr(plain, name)]
        problem = error
    for name in flagged:
        removed.append(f"{name}={getattr(config, name)}")
        setattr(config, name, getattr(plain, name))
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise _not_written("generation config", error, where) from problem
    return removed


def warn_repaired(removed: Sequence[str], where: str | None = None) -> str | None:
    """Return the warning about a repaired generation config; None if nothing was changed."""
    if not removed:
        return None
    return (
        f"{where + ': ' if where else ''}the generation config has {', '.join(removed)}, which have no "
        "effect (with greedy decoding, for example) and which transformers refuses to save: these fields "
        "are not saved"
    )


def read_generation(folder: Path, where: str) -> GenerationConfig | None:
    """Load the generation config of a directory; None if it has none.

    Raises:
        ModelError: it is unreadable; transformers would silently use a default.
    """
    path = folder / GENERATION
    if not path.is_file():
        return None
    try:
        json.loads(path.read_text(encoding="utf-8"))
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{GENERATION} cannot be read: {first_line(error)}",
            code="model.unreadable-generation-config",
            where=where,
            why="the model would generate and be saved with other settings",
            fix="repair the file, or remove it",
        ) from error


def _not_written(what: str, error: Exception, where: str | None) -> ModelError:
    return ModelError(
        f"the {what} cannot be saved: {first_line(error)}",
        code="model.cannot-save",
        where=where,
        why="the trained model could not be saved at the end",
        fix="load it, correct what the message names, and save it again",
    )


# --- test saves ---


def check_savable(
    parts: dict[str, Any], folder: Path | None = None, where: str | None = None
) -> None:
    """Save configs and tokenizers to a temporary directory, as at the end of training.

    Args:
        parts: by name, objects with `save_pretrained`; None is skipped.
        folder: the directory to test, that of the outputs; None: the system's temporary directory.

    Raises:
        ModelError: one of them cannot be saved.
        RunError: the directory is not writable.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".save-test-") as place:
            for what, part in parts.items():
                if part is None:
                    continue
                try:
                    part.save_pretrained(place)
                except OSError:
                    raise
                except Exception as error:  # any error of a config or a tokenizer
                    raise _not_written(what, error, where) from error
    except OSError as error:
        raise RunError(
            f"the directory is not writable: {error.strerror or error}",
            code="run.unusable-directory",
            where=str(folder or tempfile.gettempdir()),
            why="checkpoints and the trained model are saved here",
            fix="use another output directory, free disk space, or fix the permissions",
        ) from error


def check_unshared(model: Any) -> None:
    """Raise ModelError if parameters share memory and the model's class does not declare it.

    safetensors does not support shared tensors, and transformers refuses to save them.
    """
    known = getattr(model, "all_tied_weights_keys", None) or {}
    declared = {*known, *known.values()} if isinstance(known, dict) else set(known)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for shared in names.values():
        if len(shared) > 1 and sum(name not in declared for name in shared) > 1:
            raise ModelError(
                f"the parameters {', '.join(shared[:4])} are one tensor, which "
                f"{type(model).__name__} does not declare (`_tied_weights_keys`)",
                code="model.undeclared-shared-tensors",
                why="transformers refuses to save them, at the end of training",
                fix="copy the tensor: module.weight = nn.Parameter(module.weight.detach().clone())",
            )


class Written:
    """How a trainer saves its model: with the given config and the end tokens of the training.

    `transformers.Trainer` aligns special tokens with the tokenizer during training.

    Args:
        model: the transformers model.
        ends: end tokens of the training; empty: those of the model.
    """

    def __init__(self, model: Any, tokenizer: Any, ends: Sequence[int] = ()) -> None:
        self.model = model
        self.ends = tuple(ends)
        self.tokenizer = output_tokenizer(tokenizer, ends) if ends else tokenizer
        self._given: dict[tuple[int, str], Any] = {}

    def remember(self) -> None:
        """Store the special tokens before the Trainer aligns them; only the first call has an effect."""
        if not self._given:
            self._given = {(k, name): getattr(o, name, _MISSING) for k, o, name in self._fields()}

    def align(self, tokenizer: Any) -> None:
        """Set the tokenizer's special tokens in the configs for the duration of training.

        `transformers.Trainer.train` would do the same, with a warning; outputs keep what `remember` has kept.
        """
        config = self.model.config.get_text_config()
        generation = getattr(self.model, "generation_config", None)
        for name in _TOKENS:
            if (token := getattr(tokenizer, name, None)) is None:
                continue
            owners = [config] if generation is None else [config, generation]
            values = [getattr(owner, name, None) for owner in owners]
            if all(token in (v if isinstance(v, list) else [v]) for v in values):
                continue
            for owner, value in zip(owners, values, strict=True):
                # Every end token in a list stops a generation: none is removed.
                several = name == "eos_token_id" and (
                    owner is generation or isinstance(value, list)
                )
                others = [other for other in listed(value) if other != token] if several else []
                setattr(owner, name, [token, *others] if several else token)

    def _fields(self) -> Iterator[tuple[int, Any, str]]:
        config = self.model.config
        owners = [config, config.get_text_config(), getattr(self.model, "generation_config", None)]
        for number, owner in enumerate(owners):
            for name in _TOKENS if owner is not None else ():
                yield number, owner, name

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the configs to save on the model inside."""
        self.remember()
        missing = _MISSING
        changed: list[tuple[Any, str, Any]] = []

        def put(owner: Any, name: str, value: Any) -> None:
            now = getattr(owner, name, missing)
            if value is not missing and now is not missing and value != now:
                changed.append((owner, name, now))
                setattr(owner, name, value)

        for number, owner, name in self._fields():
            value = self._given.get((number, name), missing)
            if name == "eos_token_id" and value is not missing and self.ends:
                value = joined_ends(self.ends, value)
            put(owner, name, value)
        try:
            yield
        finally:
            for owner, name, value in reversed(changed):
                setattr(owner, name, value)


def set_ends(model: Any, ends: Sequence[int] = ()) -> None:
    """Configs at the end of training, for a model that is written as it is."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        repair_generation(generation)
    if not ends or generation is None:
        return
    for owner in (model.config, model.config.get_text_config(), generation):
        if hasattr(owner, "eos_token_id"):
            owner.eos_token_id = joined_ends(ends, owner.eos_token_id)


def ends_line(model: Any, written: Written, tokenizer: Any) -> str | None:
    """Describe how the output's end tokens differ from the base's; None if they do not."""
    generation = getattr(model, "generation_config", None)
    if generation is None or not written.ends:
        return None
    base = listed(generation.eos_token_id)
    word = tokenizer.convert_ids_to_tokens
    trained = ", ".join(f"{word(t)!r} ({t})" for t in written.ends)
    if set(written.ends) <= set(base):
        if written.tokenizer is tokenizer:
            return None
        return (
            f"responses end with {trained} in training: the saved tokenizer's eos_token is "
            f"{written.tokenizer.eos_token!r} instead of {tokenizer.eos_token!r}"
        )
    stops = ", ".join(f"{word(t)!r} ({t})" for t in base)
    config = f"stops at {stops}" if stops else "has no eos_token_id"
    own = (
        f"its tokenizer's eos_token is {written.tokenizer.eos_token!r}"
        if written.tokenizer is not tokenizer
        else f"its tokenizer keeps eos_token {tokenizer.eos_token!r}"
    )
    return (
        f"responses end with {trained} in training, but the model's generation config {config}: the saved "
        f"eos_token_id includes both, and {own}"
    )


# --- files of the processor ---


def processor_files(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> dict[str, bytes]:
    """Return the contents of the processor's files of a directory or hub name, by file name."""
    read = ((name, _file_of(source, name, revision, local_files_only)) for name in PROCESSOR_FILES)
    return {name: content for name, content in read if content is not None}


def processor_template(
    source: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> str | None:
    """Return the template of `chat_template.json`, which tokenizers do not read; None if there is none."""
    content = _file_of(source, _OLD_TEMPLATE, revision, local_files_only)
    try:
        found = json.loads(content or b"{}")["chat_template"]
    except (ValueError, LookupError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _file_of(
    source: str | Path, name: str, revision: str | None, local_files_only: bool
) -> bytes | None:
    try:
        path = cached_file(str(source), name, revision=revision, local_files_only=local_files_only)
    except OSError:
        return None
    return None if path is None else Path(path).read_bytes()


def remember_processor(model: Any, files: Mapping[str, bytes]) -> None:
    """Attach the processor's files to a model for `write_auto_class_files`."""
    model._rpo_processor_files = dict(files)


def write_auto_class_files(model: Any, folder: Path) -> None:
    """Add the files that Auto classes need to a model saved by `save_pretrained`.

    A multimodal model gets the processor's files of its source: attached by the loader, or from that
    directory or the hub's cache. A text part whose configuration has no Auto class (Emu3, Mllama) gets the
    composite configuration.
    """
    if (config := composite_config(model)) is not None:
        config.save_pretrained(folder)
    if not is_multimodal(model.config):
        return
    files = getattr(model, "_rpo_processor_files", None)
    if files is None:
        name = getattr(model, "name_or_path", "") or ""
        files = processor_files(name, local_files_only=True) if name else {}
        remember_processor(model, files)
    for name, content in files.items():
        (folder / name).write_bytes(content)
