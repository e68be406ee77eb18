"""Private names of other libraries: each one in use is in the table below, and is unchanged."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import rpo_trainer
from rpo_trainer.step.attention import ATTENTION_NAME
from tests.private_names import uses
from tests.watched_trainer import OVERRIDDEN, Squares, worked

PACKAGE = Path(rpo_trainer.__file__).parent


def found(path: str) -> Any:
    """Return the object at `module.name.name`; an assertion fails if it does not exist."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            assert hasattr(thing, part), f"{path} is gone"
            thing = getattr(thing, part)
        return thing
    raise AssertionError(f"{path} is gone")


def takes(path: str, *arguments: str, **named: Any) -> None:
    """`path` accepts these arguments; its parameters begin with these names, for a method after `self`."""
    signature = inspect.signature(found(path))
    parameters = [name for name in signature.parameters if name != "self"]
    assert tuple(parameters[: len(arguments)]) == arguments, f"{path}{signature}"
    positions = [None] * (len(arguments) + ("self" in signature.parameters))
    signature.bind(*positions, **named)


def source_of(path: str) -> str:
    return inspect.getsource(found(path))


def nothing(result: Any) -> bool:
    return result is None


def overridden(name: str, gives: Callable[[Any], bool] = nothing) -> Callable[[], None]:
    """The method has the arguments that we pass on, the loop calls it, and it returns what we return."""

    def check() -> None:
        takes(f"transformers.Trainer.{name}", *OVERRIDDEN[name])
        results = worked().calls[name]
        assert results, f"the loop of transformers does not call Trainer.{name}"
        assert gives(results[-1]), f"Trainer.{name} gives {results[-1]!r}"

    return check


def model_and_loader(result: Any) -> bool:
    return isinstance(result[0], Squares) and len(result) == 2


def a_scalar(value: Any) -> bool:
    return isinstance(value, float | torch.Tensor)


# --- the contract of each name ---


def mask_mapping() -> None:
    # Attention implementations are registered there, and transformers looks there for a mask function.
    from transformers import AttentionMaskInterface

    assert ATTENTION_NAME in AttentionMaskInterface._global_mapping
    mapping = source_of("transformers.masking_utils._preprocess_mask_arguments")
    assert "_global_mapping" in mapping


def attention_of_config() -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


@functools.cache
def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8, num_hidden_layers=1, name_or_path="here", **sizes)
    )


def initialized() -> None:
    """Weights that are marked as loaded are kept; others are not."""
    for marked in (True, False):
        layer = nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight.fill_(1.0)
        layer.weight._is_hf_initialized = marked  # type: ignore[attr-defined]
        tiny()._init_weights(layer)
        assert bool((layer.weight == 1).all()) is marked


def conversions() -> None:
    from transformers import core_model_loading

    text = inspect.getsource(core_model_loading)
    assert 'getattr(model, "_weight_conversions", None)' in text  # saving reverts them
    assert "model._weight_conversions = " in text
    assert callable(core_model_loading.WeightTransform.was_used)


def jinja() -> None:
    template = found("transformers.utils.chat_template_utils._compile_jinja_template")("{{ x }}")
    assert template.environment.parse("{{ x }}").body


def deepspeed_config() -> None:
    module = found("transformers.integrations.deepspeed")
    reference = module._hf_deepspeed_config_weak_ref
    assert reference is None or reference() is None  # there is no engine here
    for name in ("unset_hf_deepspeed_config", "is_deepspeed_zero3_enabled"):
        assert "_hf_deepspeed_config_weak_ref" in inspect.getsource(getattr(module, name))


def saved_name() -> None:
    assert tiny().config.to_diff_dict().get("_name_or_path", "here") == "here"
    assert "name_or_path" not in tiny().config.to_diff_dict()


def peft_loaded() -> None:
    assert tiny()._hf_peft_config_loaded is False
    assert "self._hf_peft_config_loaded = True" in source_of(
        "transformers.integrations.peft.PeftAdapterMixin"
    )


def kept_in_float32() -> None:
    """Loading upcasts these, the first only for float16."""
    model = tiny()
    assert model._keep_in_fp32_modules == set() == model._keep_in_fp32_modules_strict
    source = source_of("transformers.PreTrainedModel")
    assert "self._keep_in_fp32_modules is not None and dtype == torch.float16" in source
    assert "self._keep_in_fp32_modules_strict is not None and dtype in (" in source


def running_loss() -> None:
    assert isinstance(worked()._tr_loss, torch.Tensor)
    assert worked()._tr_loss.ndim == 0


def batch_size() -> None:
    assert worked()._train_batch_size == worked().args.train_batch_size


def layers() -> None:
    assert set(tiny()._no_split_modules or ()) == {"LlamaDecoderLayer"}


def has_triton() -> None:
    assert isinstance(found("torch.utils._triton.has_triton")(), bool)


def internal_call() -> None:
    takes("transformers.Trainer.save_model", "output_dir", "_internal_call")
    assert worked().calls["save_model"][-1] is True  # of a checkpoint


def pushed() -> None:
    takes("transformers.Trainer._push_from_checkpoint", "checkpoint_folder")
    assert "self._push_from_checkpoint(" in source_of("transformers.Trainer._save_checkpoint")


def shared_state() -> None:
    PartialState()
    assert isinstance(PartialState._shared_state, Mapping)
    assert isinstance(AcceleratorState._shared_state, Mapping)
    assert PartialState._shared_state["num_processes"] == PartialState().num_processes


def prepared_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    assert accelerator._models == []
    model = accelerator.prepare(nn.Linear(1, 1))
    assert accelerator._models == [model]
    assert "_original_forward" in vars(model)


def process_groups() -> None:
    takes("torch.distributed.distributed_c10d._get_default_store")
    assert isinstance(torch.distributed.distributed_c10d._world.pg_map, Mapping)


def storage_keys() -> None:
    one = torch.zeros(2)
    keys = [t.untyped_storage()._cdata for t in (one, one[1:], torch.zeros(2))]
    assert keys[0] == keys[1] != keys[2]


def fake_tensors() -> None:
    with found("torch._subclasses.FakeTensorMode")(allow_non_fake_inputs=True):
        assert torch.empty(2**50).add(1).shape == (2**50,)


def dispatch_mode() -> None:
    seen = []

    class Mode(found("torch.utils._python_dispatch.TorchDispatchMode")):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.zeros(1)
    assert seen


def tree() -> None:
    pytree = found("torch.utils._pytree")
    assert pytree.tree_leaves(((1, [2]), {"a": 3})) == [1, 2, 3]
    assert pytree.tree_map(abs, ((-1, [2]), {"a": -3})) == ((1, [2]), {"a": 3})
    assert pytree.tree_map_only(int, str, [1, "b", 2.0]) == ["1", "b", 2.0]


def learning_rates() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    scheduler._last_lr = [3.0]
    assert scheduler.get_last_lr() == [3.0]


def zero_norms() -> None:
    for name in ("stage_1_and_2.DeepSpeedZeroOptimizer", "stage3.DeepSpeedZeroOptimizer_Stage3"):
        assert "self._global_grad_norm = " in source_of(f"deepspeed.runtime.zero.{name}")
    assert "self._global_grad_norm = " in source_of(
        "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
    )


def zero_weights() -> None:
    takes("deepspeed.utils.safe_get_full_fp32_param", "param")
    assert "_hp_mapping" in source_of("deepspeed.utils.safe_get_full_fp32_param")


def http_client() -> None:
    openai = pytest.importorskip("openai")
    with openai.DefaultHttpxClient() as client:
        assert isinstance(client._mounts, Mapping)
        assert callable(client._transport._pool._network_backend.connect_tcp)


def schema_parts() -> None:
    validators = pytest.importorskip("jsonschema").validators
    validator = validators.Draft202012Validator({})
    validators.Draft202012Validator(
        schema={}, registry=validator._registry, _resolver=validator._resolver
    )


def data_files(tmp_path: Path) -> None:
    import json

    from datasets import Dataset

    Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path))
    state = json.loads((tmp_path / "state.json").read_text())
    assert [(tmp_path / one["filename"]).is_file() for one in state["_data_files"]] == [True]


def indices() -> None:
    from datasets import Dataset

    dataset = Dataset.from_dict({"a": [1, 2, 3]})
    assert dataset._indices is None
    assert dataset.select([2, 0])._indices.column(0).to_pylist() == [2, 0]
    assert dataset.select([1, 2]).data.table.num_rows in (2, 3)  # a range may be a slice


def fingerprint() -> None:
    """It follows the content and how the data set was made."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"a": [1, 2, 3]})
    others = [dataset.select([0, 1]), dataset.map(lambda row: {"a": row["a"] + 1}),
              Dataset.from_dict({"a": [1, 2, 4]})]  # fmt: skip
    assert len({dataset._fingerprint, *(other._fingerprint for other in others)}) == 4
    assert Dataset.from_dict({"a": [1, 2, 3]})._fingerprint == dataset._fingerprint


def exists(path: str, kind: Any = None) -> Callable[[], None]:
    def check() -> None:
        thing = found(path)
        assert kind is None or isinstance(thing, kind), f"{path} is {thing!r}"

    return check


# --- the table ---


class Use(NamedTuple):
    """A private name, the files of the package that use it, and its contract."""

    owner: str
    name: str
    files: str
    check: Callable[..., None]


_TRAINER = "transformers.Trainer"
USES = [
    Use("transformers.TrainingArguments", "_VALID_DICT_FIELDS",
        "trainers/argument_checks.py trainers/config.py trainers/base_config.py "
        "trainers/trl_arguments.py",
        exists("transformers.TrainingArguments._VALID_DICT_FIELDS", list)),
    Use(_TRAINER, "_determine_best_metric", "trainers/reward.py",
        overridden("_determine_best_metric", lambda result: isinstance(result, bool))),
    Use(_TRAINER, "_finalize_training", "trainers/base.py",
        overridden("_finalize_training", lambda result: result.global_step == 2)),
    Use(_TRAINER, "_get_grad_norm", "trainers/base.py", overridden("_get_grad_norm", a_scalar)),
    Use(_TRAINER, "_get_output_dir", "trainers/base.py",
        overridden("_get_output_dir", lambda result: result == worked().args.output_dir)),
    Use(_TRAINER, "_internal_call", "trainers/base.py", internal_call),
    Use(_TRAINER, "_load_from_checkpoint", "trainers/checkpoint.py", overridden("_load_from_checkpoint")),
    Use(_TRAINER, "_load_optimizer_and_scheduler", "trainers/base.py trainers/checkpoint.py",
        overridden("_load_optimizer_and_scheduler")),
    Use(_TRAINER, "_load_scaler", "trainers/checkpoint.py", overridden("_load_scaler")),
    Use(_TRAINER, "_prepare_for_training", "trainers/base.py",
        overridden("_prepare_for_training", model_and_loader)),
    Use(_TRAINER, "_prepare_inputs", "chain/training.py trainers/base.py",
        overridden("_prepare_inputs", lambda result: isinstance(result, dict))),
    Use(_TRAINER, "_push_from_checkpoint", "trainers/base.py", pushed),
    Use(_TRAINER, "_save", "trainers/base.py", overridden("_save")),
    Use(_TRAINER, "_save_checkpoint", "trainers/base.py", overridden("_save_checkpoint")),
    Use(_TRAINER, "_save_optimizer_and_scheduler",
        "trainers/base.py trainers/preference.py",
        overridden("_save_optimizer_and_scheduler")),
    Use(_TRAINER, "_tr_loss", "trainers/base.py", running_loss),
    Use(_TRAINER, "_track_num_input_tokens", "trainers/base.py", overridden("_track_num_input_tokens")),
    Use(_TRAINER, "_train_batch_size", "trainers/base.py", batch_size),
    Use("transformers.AttentionMaskInterface", "_global_mapping", "step/attention.py step/attention_reach.py",
        mask_mapping),
    Use("transformers.PreTrainedConfig", "_attn_implementation", "models/loading.py step/forward.py",
        attention_of_config),
    Use("transformers.PreTrainedConfig", "_name_or_path", "step/reference.py", saved_name),
    Use("transformers.PreTrainedModel", "_hf_peft_config_loaded", "models/from_pretrained.py", peft_loaded),
    Use("transformers.PreTrainedModel", "_init_weights", "trainers/setup.py", initialized),
    Use("transformers.PreTrainedModel", "_is_hf_initialized", "trainers/setup.py", initialized),
    *(Use("transformers.PreTrainedModel", name, "models/dtypes.py", kept_in_float32)
      for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")),
    Use("transformers.PreTrainedModel", "_no_split_modules", "trainers/engine.py",
        layers),
    Use("transformers.PreTrainedModel", "_weight_conversions", "models/from_pretrained.py", conversions),
    Use("transformers.integrations.deepspeed", "_hf_deepspeed_config_weak_ref", "models/sharding.py",
        deepspeed_config),
    Use("transformers.utils.chat_template_utils", "_compile_jinja_template", "data/template_variables.py",
        jinja),
    Use("accelerate.Accelerator", "_models", "trainers/engine.py", prepared_model),
    Use("accelerate.Accelerator", "_original_forward", "models/unwrap.py", prepared_model),
    Use("accelerate.PartialState", "_shared_state", "runtime/distributed.py", shared_state),
    Use("torch.UntypedStorage", "_cdata", "plan/memory.py", storage_keys),
    Use("torch", "_dynamo", "step/attention_flex.py", exists("torch._dynamo.config.recompile_limit", int)),
    Use("torch", "_subclasses", "plan/memory.py", fake_tensors),
    Use("torch.distributed.distributed_c10d", "_get_default_store", "runtime/distributed.py", process_groups),
    Use("torch.distributed.distributed_c10d", "_world", "runtime/distributed.py", process_groups),
    Use("torch.optim.lr_scheduler.LambdaLR", "_last_lr", "trainers/checkpoint.py", learning_rates),
    Use("torch.utils", "_python_dispatch", "plan/memory.py", dispatch_mode),
    Use("torch.utils", "_pytree", "models/dtypes.py plan/memory.py step/attention_reach.py "
        "trainers/background_save.py", tree),
    Use("torch.utils", "_triton", "step/attention_flex.py step/logprobs.py",
        has_triton),
    Use("datasets.Dataset", "_data_files", "data/sources.py", data_files),
    Use("datasets.Dataset", "_fingerprint", "trainers/stored_examples.py", fingerprint),
    Use("datasets.Dataset", "_indices", "data/arrow_rows.py", indices),
    Use("deepspeed", "_global_grad_norm", "trainers/engine.py", zero_norms),
    Use("deepspeed", "_hp_mapping", "models/sharding.py", zero_weights),
    *(Use("httpx", name, "rewards/http_client.py", http_client)
      for name in ("_mounts", "_network_backend", "_pool", "_transport")),
    *(Use("jsonschema", name, "rewards/verifiers/schemas.py", schema_parts)
      for name in ("_registry", "_resolver")),
    Use("atexit", "_run_exitfuncs", "runtime/distributed.py", exists("atexit._run_exitfuncs")),
    Use("subprocess", "_posixsubprocess", "rewards/verifiers/sandbox/limits.py",
        exists("_posixsubprocess.fork_exec")),
]  # fmt: skip


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(use, marks=pytest.mark.extras("deepspeed") if use.owner == "deepspeed" else ())
        for use in USES
    ],
    ids=lambda use: f"{use.owner}.{use.name}",
)
def test_a_private_name_is_what_it_was(use: Use, request: pytest.FixtureRequest) -> None:
    wanted = inspect.getfullargspec(use.check).args
    fixtures = {name: request.getfixturevalue(name) for name in wanted}
    try:
        use.check(**fixtures)
    except Exception as error:
        pytest.fail(
            f"{use.owner}.{use.name} is used by rpo_trainer/({use.files.replace(' ', ', ')}), and is not "
            f"what it was: {type(error).__name__}: {error}"
        )


def test_the_table_has_each_private_name_that_is_used_and_no_other() -> None:
    table = {(file, use.name) for use in USES for file in use.files.split()}
    used = uses(PACKAGE)
    used -= {("recipe/convert/recognize.py", "_component_")}  # a key of the configs of torchtune
    assert used - table == set(), "not in the table: use a public name, or say here what is assumed"
    assert table - used == set(), "not used any more: remove it from the table"
