"""Load models and tokenizers: safetensors only, no remote code unless allowed, clear errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rpo_trainer.data import set_chat_template
from rpo_trainer.data.template_variables import check_kwargs
from rpo_trainer.errors import ModelError, first_line
from rpo_trainer.models.from_config import NEEDED, auto_class, make_config, make_random_model
from rpo_trainer.models.from_pretrained import (
    LOADING_ERRORS,
    load_complete,
    load_pretrained,
    refuse_adapter,
)
from rpo_trainer.models.multimodal import (
    with_vocabulary,
)
from rpo_trainer.models.sharding import num_rows
from rpo_trainer.recipe.template_kwargs import COLUMN
from rpo_trainer.runtime.file_errors import reads, require_files, require_sizes
from rpo_trainer.runtime.files import near_directory
from rpo_trainer.runtime.hub_access import hub_answers, is_cached, is_hub_name, no_answer_reason

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from rpo_trainer.recipe import ModelSpec

logger = logging.getLogger(__name__)

# Arguments of `from_pretrained` that configurations and tokenizers take too
_OF_A_REPOSITORY = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")


@reads("the tokenizer", lambda spec, base_dir: f"model: {spec.tokenizer or spec.name_or_path}")
def load_tokenizer(spec: ModelSpec, base_dir: Path) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer and set its chat template."""
    if spec.tokenizer == "characters":
        from rpo_trainer.data.quickstart import character_tokenizer

        tokenizer: Any = character_tokenizer()
    else:
        name = spec.tokenizer or spec.name_or_path
        if name is None:
            raise ModelError(
                "a model created by from_config has no tokenizer",
                code="tokenizer.missing",
                where="model.tokenizer",
                why="text cannot be tokenized without one",
                fix="set it to a directory, a hub name, or `characters`",
            )
        tokenizer = _load(AutoTokenizer, name, base_dir, spec, what="tokenizer")
    template = spec.chat_template
    if template is not None and (path := base_dir / Path(template).expanduser()).is_file():
        template = str(path)
    templated = set_chat_template(tokenizer, template)
    check_kwargs(spec.chat_template_kwargs, templated, f"model.{COLUMN}")
    templated("a")  # raises here if its settings prevent tokenization
    if templated.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end token",
            code="tokenizer.no-end-token",
            where=f"model: {spec.tokenizer or spec.name_or_path}",
            why="without one, the end of a response can neither be trained nor recognized in sampling",
            fix="set eos_token in tokenizer_config.json",
        )
    return templated


@reads("the model", lambda spec, *_, **__: f"model: {spec.name_or_path}")
def load_model(
    spec: ModelSpec,
    base_dir: Path,
    *,
    seed: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    quantization: BitsAndBytesConfig | None = None,
    reward: bool = False,
) -> PreTrainedModel:
    """Load the model that the first stage starts from.

    Args:
        dtype: of the weights. Weights that are trained must be float32 regardless of `spec.dtype` (the dtype
            of the arithmetic), because steps of 1e-7 are lost in bfloat16 weights.
        quantization: how the linear layers are held, if they are frozen.
        reward: accept a reward model too (see `auto_class`).
    """
    if spec.from_config is not None:
        model: Any = make_random_model(with_vocabulary(spec.from_config, vocabulary), seed, dtype)
    else:
        assert spec.name_or_path is not None  # the schema
        config = _load(AutoConfig, spec.name_or_path, base_dir, spec, what="model's configuration")
        model = _load(
            auto_class(config, reward=reward, where=f"model: {spec.name_or_path}"),
            spec.name_or_path,
            base_dir,
            spec,
            what="model",
            dtype=dtype,
            **_quantized(quantization),
        )
    check_vocabulary(model, vocabulary)
    name = spec.name_or_path or ""
    local = base_dir / Path(name).expanduser()
    return _named(model, os.path.abspath(local) if name and local.exists() else name)


@reads("the model's configuration", lambda spec, *_, **__: f"model: {spec.name_or_path}")
def load_config(spec: ModelSpec, base_dir: Path, source: str | None, vocabulary: int) -> Any:
    """Load the configuration of the recipe's model, or of `source`, a directory or hub name."""
    if source is None and spec.from_config is not None:
        return make_config(with_vocabulary(spec.from_config, vocabulary))
    name = spec.name_or_path
    if source is not None:
        name, spec = source, spec.model_copy(update={"revision": None})  # of another repository
    assert name is not None  # the schema
    config = _load(AutoConfig, name, base_dir, spec, what="model's configuration")
    return require_sizes(config, f"model: {name}")


def _quantized(config: BitsAndBytesConfig | None) -> dict[str, Any]:
    return {} if config is None else {"quantization_config": config}


@reads("the model", lambda folder, **_: str(folder))
def load_weights(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    quantization: BitsAndBytesConfig | None = None,
    reward: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a stage's output, or any local model directory.

    Args:
        dtype: of the weights; float32 if they are trained.
        quantization: how the linear layers are held, if they are frozen.
        reward: accept a reward model too (see `auto_class`).

    Raises:
        ModelError: no model, none in safetensors, or an incomplete one.
    """
    config = saved_config(folder, str(folder), trust_remote_code=trust_remote_code)
    try:
        model = load_complete(
            auto_class(config, reward=reward, where=str(folder)),
            folder,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            local_files_only=True,
            **_quantized(quantization),
        )
    except LOADING_ERRORS as error:
        raise _not_loaded("model", error, str(folder)) from error
    return _named(model, os.path.abspath(folder))


@reads("the model", lambda name, **_: name)
def load_model_named(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    reward: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the model of a name or path that a trainer was given.

    Args:
        dtype: of the weights, regardless of the dtype of the files; float32 if they are trained, because
            lower dtypes round small steps away. `bf16` of the arguments is the arithmetic.
        reward: accept a reward model too (see `auto_class`).
        settings: further arguments of `from_pretrained`; a `dtype` that is not None replaces `dtype`.

    Raises:
        ModelError: it cannot be loaded completely, from safetensors and without remote code.
    """
    refuse_adapter(name)
    arguments = dict(settings or {})
    offline = _offline(name, "model", arguments)
    try:
        source = {key: arguments[key] for key in _OF_A_REPOSITORY if key in arguments}
        config = load_pretrained(AutoConfig, name, **source)
        _refuse_kernel(config, name)
        factory = auto_class(config, reward=reward, where=name)
        older = arguments.pop("torch_dtype", None)
        chosen = arguments.pop("dtype", None) or older or dtype
        model: PreTrainedModel = load_complete(factory, name, dtype=chosen, **arguments)
    except LOADING_ERRORS as error:
        cache_dir = arguments.get("cache_dir")
        raise _not_loaded("model", error, name, offline=offline, cache_dir=cache_dir) from error
    model._rpo_complete = True  # type: ignore[assignment]
    return model


def load_tokenizer_named(
    name: str, settings: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a name or path that a trainer was given; ModelError if there is none."""
    source = {key: value for key, value in (settings or {}).items() if key in _OF_A_REPOSITORY}
    offline = _offline(name, "tokenizer", source)
    try:
        tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, name, **source)
    except LOADING_ERRORS as error:
        cache_dir = source.get("cache_dir")
        raise _not_loaded("tokenizer", error, name, offline=offline, cache_dir=cache_dir) from error
    return tokenizer


def _offline(name: str, what: str, settings: dict[str, Any]) -> str | None:
    """Set `local_files_only` if the hub does not answer, and return the name then; see `_is_available`."""
    if settings.get("local_files_only"):
        return None
    source = {key: settings.get(key) for key in ("revision", "token")}
    if _is_available(name, Path(name).expanduser(), what, name, **source):
        return None
    settings["local_files_only"] = True
    return name


def _refuse_kernel(config: Any, where: str) -> None:
    """Refuse a config that names an attention kernel on the hub, which is remote code."""
    if "/" in (name := str(getattr(config, "_attn_implementation", None) or "")):
        raise ModelError(
            f"the model's configuration loads attention code from the hub ({name})",
            code="model.hub-kernel",
            where=where,
            why="that code would run with your permissions",
            fix="remove attn_implementation from config.json",
        )


@reads("the model's configuration", lambda folder, where, **_: where)
def saved_config(folder: Path, where: str, *, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a local model; ModelError if it is missing or unreadable."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            "this directory contains no model",
            code="model.not-found",
            where=where,
            why=NEEDED,
            fix="give a directory with config.json and weights in safetensors",
        )
    require_files(folder, where)
    try:
        config = load_pretrained(
            AutoConfig, folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except LOADING_ERRORS as error:
        raise _not_loaded("model", error, where) from error
    if not trust_remote_code:
        _refuse_kernel(config, where)
    return require_sizes(config, where)


def _not_loaded(
    what: str,
    error: Exception,
    where: str,
    *,
    offline: str | None = None,
    cache_dir: str | None = None,
) -> ModelError:
    """Return the error for a failed load.

    Args:
        offline: the hub name that only the cache was searched for, because the hub does not answer.
        cache_dir: the hub's cache; None: the default one.
    """
    if "trust_remote_code" in str(error):
        return ModelError(
            f"the {what} cannot be loaded: it requires code from its repository",
            code="model.needs-remote-code",
            where=where,
            why="that code would run with your permissions",
            fix="use a model that transformers supports itself; or review the code and set "
            "`trust_remote_code: true` under `model`",
        )
    reason = first_line(error)
    fix = "give a directory with the model's files (safetensors), or a hub name"
    if offline is not None:
        if not is_cached(offline, cache_dir):
            reason = f"no such directory, not in the hub's cache, and {no_answer_reason()}"
        fix = (
            "give a directory with the model's files (safetensors), or retry with network access; "
            f"`hf download {offline}` fills the cache that is used offline"
        )
    return ModelError(
        f"the {what} cannot be loaded: {reason}",
        code="model.cannot-load",
        where=where,
        why=NEEDED,
        fix=fix,
    )


def _named(model: Any, name: str) -> PreTrainedModel:
    """Set where a model comes from, a hub name or an absolute path; adapters save it as their base."""
    model.name_or_path = model.config.name_or_path = name
    model._rpo_complete = True  # see `adapter_parts.fresh_parameters`
    return model  # type: ignore[no-any-return]


def check_vocabulary(model: Any, tokens: int) -> None:
    """Raise ModelError if the tokenizer has more tokens than the model has embeddings."""
    check_tokens(num_rows(model.get_input_embeddings().weight), tokens, "model")


def check_tokens(rows: int, tokens: int, where: str) -> None:
    """Raise ModelError if a tokenizer has more tokens than a model has embeddings."""
    if tokens > rows:
        raise ModelError(
            f"the tokenizer has {tokens} tokens, the model {rows} embeddings",
            code="tokenizer.too-many-tokens",
            where=where,
            why="token ids beyond the embedding table cannot be embedded",
            fix="use the model's own tokenizer, or resize the model's embeddings first",
        )


def _load(
    factory: Any, name: str, base_dir: Path, spec: ModelSpec, *, what: str, **settings: Any
) -> Any:
    local = base_dir / Path(name).expanduser()
    where = str(local) if local.exists() else name
    if local.is_dir():
        require_files(local, f"model: {name}")
    revision = spec.revision or "main"
    known = _is_available(name, local, what, f"model: {name}", revision=revision)
    load = load_complete if what == "model" else load_pretrained
    try:
        loaded = load(
            factory,
            where,
            revision=revision,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=not known,
            **settings,
        )
        if factory is AutoConfig and not spec.trust_remote_code:
            _refuse_kernel(loaded, f"model: {name}")
        return loaded
    except ModelError as error:
        raise error.at(f"model: {name}") from None
    except LOADING_ERRORS as error:
        raise _not_loaded(what, error, f"model: {name}", offline=None if known else name) from error


def _is_available(
    name: str,
    local: Path,
    what: str,
    where: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> bool:
    """Whether a path exists or the hub answers; otherwise only its cache can be read.

    Without an answer, transformers retries for 45 s before it reads the cache.

    Raises:
        ModelError: there is no such path, and the name cannot be one of the hub.
    """
    if local.exists():
        return True
    if not is_hub_name(name):
        raise ModelError(
            f"the {what} cannot be loaded: no such directory{near_directory(local)}",
            code="model.not-found",
            where=where,
            fix="give a directory with the model's files (safetensors), or a hub name",
        )
    return hub_answers(name, "model", revision, token)
