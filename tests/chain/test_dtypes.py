"""The dtypes of a chain: of outputs, of the start of the next stage, and of frozen weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpo_trainer.chain import run as chain_run
from rpo_trainer.errors import Problems, RunError
from rpo_trainer.models import adapter_files
from rpo_trainer.models.weight_files import stored_dtype
from rpo_trainer.plan import plan_recipe
from rpo_trainer.plan.disk import together
from rpo_trainer.stages.output_dtype import FOREVER, exact_until
from rpo_trainer.stages.prepare import StagePreparer
from tests.chain import tiny
from tests.raising import raises

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
BF16 = torch.bfloat16


def short(stages: tuple[str, ...] = ("code", "dpo"), **defaults: Any) -> tiny.Recipe:
    recipe = tiny.tiny_recipe()
    recipe["stages"] = [stage for stage in recipe["stages"] if stage["name"] in stages]
    recipe["defaults"] |= defaults
    return recipe


def adapted(recipe: tiny.Recipe, *names: str, **fields: Any) -> tiny.Recipe:
    for name in names:
        tiny.stage_of(recipe, name).update(peft={**LORA, **fields}, learning_rate=1e-2)
    return recipe


def losses(run_dir: Path, stage: str) -> list[Any]:
    return [m.get("loss", m.get("eval_loss")) for m in tiny.metrics(run_dir) if m["stage"] == stage]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, torch.Tensor] = model.state_dict()
    return found


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(tmp_path_factory.mktemp("exact"), short())


@pytest.fixture(scope="module")
def half_begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain with bfloat16 outputs, after its first stage."""
    return tiny.run(tmp_path_factory.mktemp("half"), short(save_dtype="bfloat16"), only=["code"])


# --- outputs ---


def test_the_next_stage_starts_from_exact_weights(
    exact: Path, half_begun: Path, tmp_path: Path
) -> None:
    """A chain that saves bfloat16 trains like one that saves float32: sampled pairs and losses agree."""
    code = half_begun / "code"
    assert stored_dtype(code / "final") == BF16 and stored_dtype(code / "exact") == torch.float32
    assert AutoModelForCausalLM.from_pretrained(code / "final").dtype == BF16
    for name, weight in weights_of(exact / "code" / "final").items():
        assert torch.equal(weights_of(code / "exact")[name], weight)
        assert torch.equal(weights_of(code / "final")[name], weight.to(BF16).float())
    shutil.copytree(half_begun, tmp_path / "run")
    run_dir = tiny.run(tmp_path, short(save_dtype="bfloat16"))
    assert losses(run_dir, "dpo") == losses(exact, "dpo")
    assert not (run_dir / "code" / "exact").exists()  # no stage will read it
    assert not (run_dir / "dpo" / "exact").exists()  # no stage ever reads it
    records = tiny.records(run_dir)
    assert {name: record["output"]["dtype"] for name, record in records.items()} == {
        "code": "bfloat16", "dpo": "bfloat16",
    }  # fmt: skip
    assert records["code"]["output"]["exact"] and "exact" not in records["dpo"]["output"]
    assert "| saved weights | bfloat16 |" in (run_dir / "dpo" / "final" / "README.md").read_text()
    before = tiny.content(run_dir)
    assert tiny.run(tmp_path, short(save_dtype="bfloat16")) == run_dir  # finished: nothing to do
    assert tiny.content(run_dir) == before


@pytest.mark.parametrize("harm", ["removed", "changed"])
def test_what_seeds_the_next_stage_is_verified(harm: str, half_begun: Path, tmp_path: Path) -> None:
    shutil.copytree(half_begun, tmp_path / "run")
    exact = tmp_path / "run" / "code" / "exact"
    if harm == "removed":
        shutil.rmtree(exact)
    else:
        path = exact / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with raises("run.damaged-output", RunError) as error:
        tiny.run(tmp_path, short(save_dtype="bfloat16"))
    assert "exact" in error.value.what


def test_by_default_the_dtype_of_the_loaded_model_is_delivered(exact: Path, tmp_path: Path) -> None:
    """A bfloat16 model is delivered in bfloat16; its first stage is still trained in float32."""
    assert stored_dtype(exact / "code" / "final") == torch.float32  # of random weights
    recipe = short(("code",))
    source = AutoModelForCausalLM.from_pretrained(exact / "code" / "final", dtype=BF16)
    source.save_pretrained(tmp_path / "model")
    del recipe["model"]["from_config"]
    recipe["model"]["name_or_path"] = "./model"
    run_dir = tiny.run(tmp_path, recipe)
    assert stored_dtype(run_dir / "code" / "final") == BF16
    chain = chain_run._Chain(tiny.load(tmp_path, recipe), run_dir)
    assert chain.models.start(chain.preparer.stages[0]).dtype == torch.float32


def test_a_merged_adapter_is_delivered_and_handed_on_exactly(tmp_path: Path) -> None:
    """LoRA in both stages, merged: `final` is the rounded `exact`, which is base and adapter in float32."""
    recipe = adapted(short(save_dtype="bfloat16"), "code", "dpo")
    recipe["model"]["dtype"] = "bfloat16"
    run_dir = tiny.run(tmp_path, recipe, only=["code"])
    final, exact = weights_of(run_dir / "code" / "final"), weights_of(run_dir / "code" / "exact")
    assert stored_dtype(run_dir / "code" / "final") == BF16
    assert all(torch.equal(final[name], exact[name].to(BF16).float()) for name in final)
    changed = [name for name in exact if not torch.equal(final[name], exact[name])]
    assert changed and all(name.split(".")[-2] in LORA["target_modules"] for name in changed)
    tiny.run(tmp_path, recipe)
    assert tiny.records(run_dir)["dpo"]["step0"]["nats_per_token"] == 0.0
    base = json.loads((run_dir / "dpo" / "adapter" / adapter_files.CONFIG).read_text())
    assert base["base_model_name_or_path"] == str(run_dir / "code" / "final")


def test_an_exact_base_of_a_kept_adapter_stays(tmp_path: Path) -> None:
    recipe = adapted(
        short(save_dtype="bfloat16"), "dpo", between_stages="keep", merge=True, frozen_dtype="float32"
    )  # fmt: skip
    run_dir = tiny.run(tmp_path, recipe)
    assert (run_dir / "code" / "exact").is_dir()
    base = json.loads((run_dir / "dpo" / "final" / adapter_files.CONFIG).read_text())
    assert base["base_model_name_or_path"] == str(run_dir / "code" / "exact")
    assert stored_dtype(run_dir / "dpo" / "merged") == BF16
    assert tiny.records(run_dir)["dpo"]["output"]["dtype"] == "float32"  # the adapter
    preparer = StagePreparer(tiny.load(tmp_path, recipe))
    assert exact_until(preparer) == {"code": FOREVER}


def test_a_dtype_for_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    recipe = adapted(short(), "dpo", between_stages="keep")
    tiny.stage_of(recipe, "dpo")["save_dtype"] = "bfloat16"
    with pytest.raises(Problems) as error:
        tiny.load(tmp_path, recipe)
    (problem,) = error.value.problems
    assert problem.code == "recipe.unused-field" and "save_dtype" in str(problem.where)


def test_disk_counts_what_is_there_at_once(tmp_path: Path) -> None:
    recipe = short(("code", "general", "dpo"), save_dtype="bfloat16", save_steps=None)
    plan = plan_recipe(tiny.load(tmp_path, recipe), tmp_path / "run")
    n = plan.parameters
    assert plan.exact_until == {"code": "general", "general": "dpo"}
    for stage in plan.stages:
        assert stage.disk["output"] == 2 * n
        assert ("exact" in stage.disk) == (stage.name != "dpo")
    # While `general` is written, the exact weights of `code` and its own exist.
    disks = {stage.name: stage.disk for stage in plan.stages}
    rest = sum(s.disk["output"] + s.disk.get("reference cache", 0) for s in plan.stages)
    saving = disks["dpo"]["saving"]
    assert saving == 4 * n and together(disks, plan.exact_until) == rest + 8 * n + saving


# --- frozen weights ---


@pytest.mark.parametrize("between", ["merge", "keep"])
def test_the_frozen_base_has_the_dtype_of_the_arithmetic(between: str, tmp_path: Path) -> None:
    recipe = adapted(short(), "code", "dpo", between_stages=between)
    recipe["model"]["dtype"] = "bfloat16"
    run_dir = tiny.run(tmp_path, recipe)
    chain = chain_run._Chain(tiny.load(tmp_path, recipe), run_dir)
    for stage in chain.preparer.stages:
        model = chain.models.start(stage)
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {BF16}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert tiny.records(run_dir)["dpo"]["step0"]["nats_per_token"] == 0.0
    if between == "keep":
        assert stored_dtype(run_dir / "code" / "base") == BF16


def test_rounding_a_base_is_a_warning(
    exact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(exact, tmp_path / "run")

    def start(**fields: Any) -> Any:
        caplog.clear()
        recipe = adapted(short(), "dpo", **fields)
        recipe["model"]["dtype"] = "bfloat16"
        preparer = StagePreparer(tiny.load(tmp_path, recipe))
        return chain_run.Models(preparer, tmp_path / "run").start(preparer.stages[1])

    assert {p.dtype for p in start().parameters() if not p.requires_grad} == {BF16}
    assert "rounded to bfloat16" in caplog.text and "frozen_dtype" in caplog.text
    plain = start(frozen_dtype="float32")
    assert {p.dtype for p in plain.parameters()} == {torch.float32} and not caplog.text


def test_deepspeed_holds_rounded_weights_in_float32(
    exact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The values are the same, so that the engine does not change the model; `plan` counts them so."""
    shutil.copytree(exact, tmp_path / "run")
    recipe = adapted(short(), "dpo")
    recipe["model"]["dtype"] = "bfloat16"
    preparer = StagePreparer(tiny.load(tmp_path, recipe))
    models = chain_run.Models(preparer, tmp_path / "run")
    held = models.start(preparer.stages[1]).state_dict()
    models.one_dtype = True
    rounded = models.start(preparer.stages[1]).state_dict()
    for name, weight in rounded.items():  # PEFT initializes an adapter in the dtype of its base
        same = "lora_" in name or torch.equal(weight, held[name].float())
        assert weight.dtype == torch.float32 and same, name
    assert "DeepSpeed" in caplog.text
    loaded = tiny.load(tmp_path, recipe)
    zero = plan_recipe(loaded, tmp_path / "run", engine="zero2").stages[1]
    single = plan_recipe(loaded, tmp_path / "run").stages[1]
    assert (zero.frozen, single.frozen) == ("float32", "bfloat16")
    assert zero.memory.weights > 1.8 * single.memory.weights
