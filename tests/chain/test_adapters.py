"""Adapters in a chain: merged or kept between stages, step-0 checks, resumed runs, other tools."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpo_trainer.chain import run as chain_run
from rpo_trainer.chain import run_chain
from rpo_trainer.chain.check import check_recipe
from rpo_trainer.errors import Problems, RecipeError, RunError
from rpo_trainer.models import adapter_files
from rpo_trainer.recipe import expand_stages, load_recipe
from rpo_trainer.stages.settings import lora_config
from rpo_trainer.trainers.checkpoint import verify_manifest
from tests.chain import tiny
from tests.chain.killer import run_until
from tests.raising import raises, with_code

peft = pytest.importorskip("peft")

LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
KEEP = {**LORA, "between_stages": "keep"}
PREFERENCE = ("dpo", "rpo-1", "rpo-2")
ROOT = Path(__file__).parents[2]
IDS = torch.arange(4, 24)[None]


def adapted(first: str, spec: dict[str, Any], **fields: Any) -> tiny.Recipe:
    """The tiny recipe with an adapter in every stage from `first` on."""
    recipe = tiny.tiny_recipe()
    names = [stage["name"] for stage in recipe["stages"]]
    for stage in recipe["stages"][names.index(first) :]:
        stage.update(peft=dict(spec), learning_rate=1e-2, **fields)
    return recipe


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.log_softmax(-1)


def assert_step_zero(run_dir: Path, stages: tuple[str, ...] = PREFERENCE) -> None:
    records = tiny.records(run_dir)
    for name in stages:
        check = records[name]["step0"]
        assert check["ok"] and check["nats_per_token"] < 1e-5, name


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with one adapter on random weights, from SFT to the second round of RPO."""
    return tiny.run(tmp_path_factory.mktemp("kept"), adapted("code", KEEP))


@pytest.fixture
def before_general(finished: Path, tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: tiny.cut_before(finished, folder / "run", "general")


# --- keep ---


def test_a_kept_adapter_goes_through_the_chain(kept: Path) -> None:
    assert_step_zero(kept)
    weights = tiny.weights(kept)
    assert tuple(weights) == tuple(sorted(tiny.STAGES)) and len(set(weights.values())) == 5
    for name in tiny.STAGES:
        files = {p.name for p in (kept / name / "final").iterdir()}
        assert {
            adapter_files.CONFIG,
            adapter_files.WEIGHTS,
            "tokenizer.json",
            "manifest.json",
        } <= files
        assert "model.safetensors" not in files
        assert "library_name: peft" in (kept / name / "final" / "README.md").read_text()
    # Each stage starts from the adapter of the previous one: the first update is small, none starts over.
    finals = [peft.load_peft_weights(str(kept / name / "final")) for name in tiny.STAGES]
    for before, after in itertools.pairwise(finals):
        a = torch.cat([before[n].flatten() for n in sorted(before)])
        b = torch.cat([after[n].flatten() for n in sorted(after)])
        assert 0 < (a - b).norm() < 0.6 * a.norm()
    # The random base is written once, by the stage that created the adapter.
    assert [p.parent.name for p in sorted(kept.glob("*/base"))] == ["code"]


def test_a_kept_adapter_is_read_by_other_tools(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = kept / "rpo-2" / "final"
    name = json.loads((final / adapter_files.CONFIG).read_text())["base_model_name_or_path"]
    assert name == str(kept / "code" / "base")
    base = AutoModelForCausalLM.from_pretrained(name)
    alone = logps(base)
    by_peft = logps(peft.PeftModel.from_pretrained(base, final))
    assert (by_peft - alone).abs().max() > 0.01
    for cwd in (final, kept.parent):
        monkeypatch.chdir(cwd)
        for loader in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
            torch.testing.assert_close(logps(loader.from_pretrained(final)), by_peft)


def test_a_run_with_kept_adapters_can_be_moved(kept: Path, tmp_path: Path) -> None:
    """The chain reads the base by a path relative to the adapter; the absolute path is for other tools."""
    moved = shutil.copytree(kept, tmp_path / "run")
    for stage in ("general", "rpo-2"):
        assert adapter_files.base_of(moved / stage / "final") == str(moved / "code" / "base")
    chain = chain_run._Chain(tiny.load(tmp_path, adapted("code", KEEP)), moved)
    before = chain_run._Chain(tiny.load(tmp_path, adapted("code", KEEP)), kept)
    torch.testing.assert_close(
        logps(chain.models.output("rpo-2")), logps(before.models.output("rpo-2"))
    )


def test_the_reference_is_the_adapter_as_the_stage_began(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cached log-probs are those of the base with the previous stage's adapter, not of the base."""
    tiny.cut_before(kept, tmp_path / "cut" / "run", "rpo-1")
    seen: dict[str, Any] = {}
    train = chain_run.train_stage

    def spy(trainer: Any, *args: Any, **more: Any) -> Any:
        seen["model"], seen["ref_model"] = trainer.model, trainer.ref_model
        seen["start"] = logps(trainer.model)
        trainer.model.train()
        result = train(trainer, *args, **more)
        seen["frozen"] = [n for n, p in trainer.model.named_parameters() if not p.requires_grad]
        seen["logps"] = trainer.train_dataset.extra["reference_logps"]
        return result

    monkeypatch.setattr(chain_run, "train_stage", spy)
    tiny.run(tmp_path / "cut", adapted("code", KEEP), only={"rpo-1"})
    assert seen["ref_model"] is None  # no additional memory
    assert not any("lora_" in name for name in seen["frozen"])
    base = AutoModelForCausalLM.from_pretrained(kept / "code" / "base")
    before = peft.PeftModel.from_pretrained(base, kept / "dpo" / "final")
    torch.testing.assert_close(seen["start"], logps(before))
    assert tiny.weights(tmp_path / "cut" / "run")["rpo-1"] == tiny.weights(kept)["rpo-1"]


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("step:code:3", marks=pytest.mark.slow),
        pytest.param("step:dpo:1", marks=pytest.mark.slow),
        "step:rpo-1:2",
        pytest.param("replace:rpo-1/final", marks=pytest.mark.slow),
    ],
)
def test_keep_resumed_is_keep_straight(point: str, kept: Path, tmp_path: Path) -> None:
    recipe = adapted("code", KEEP)
    if "rpo-1" in point:  # the earlier stages are copied from the uninterrupted run
        tiny.cut_before(kept, tmp_path / "run", "rpo-1")
    run_until(point, lambda: tiny.run(tmp_path, recipe))
    tiny.run(tmp_path, recipe)
    assert tiny.weights(tmp_path / "run") == tiny.weights(kept)
    assert_step_zero(tmp_path / "run")


def test_the_base_of_an_adapter_is_watched(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "run")
    path = tmp_path / "run" / "code" / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    with raises("run.damaged-output", RunError, where=str(tmp_path / "run" / "code" / "final")):
        tiny.run(tmp_path, adapted("code", KEEP))


def test_merge_true_writes_the_merged_model_too(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.cut_before(kept, tmp_path / "run", "rpo-1")
    recipe = adapted("code", KEEP)
    tiny.stage_of(recipe, "rpo")["peft"]["merge"] = True
    run_dir = tiny.run(tmp_path, recipe)
    assert tiny.weights(run_dir) == tiny.weights(kept)
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "rpo-2" / "merged")
    monkeypatch.chdir(run_dir / "rpo-2" / "final")
    both = AutoModelForCausalLM.from_pretrained(".")
    torch.testing.assert_close(logps(merged), logps(both), rtol=0, atol=1e-4)
    assert (run_dir / "rpo-2" / "merged" / "tokenizer.json").is_file()
    assert not list(run_dir.glob("*/.merged"))


@pytest.mark.slow
def test_the_last_of_a_kept_chain_may_merge(kept: Path, tmp_path: Path) -> None:
    tiny.cut_before(kept, tmp_path / "run", "rpo-1")
    recipe = adapted("code", KEEP)
    tiny.stage_of(recipe, "rpo").update(repeat=1, name="rpo-1", peft=dict(LORA))
    run_dir = tiny.run(tmp_path, recipe)
    assert_step_zero(run_dir, ("rpo-1",))
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "rpo-1" / "final")
    base = AutoModelForCausalLM.from_pretrained(run_dir / "code" / "base")
    both = peft.PeftModel.from_pretrained(base, run_dir / "rpo-1" / "adapter")
    torch.testing.assert_close(logps(merged), logps(both), rtol=0, atol=1e-4)
    kept_weights = peft.load_peft_weights(str(kept / "rpo-1" / "final"))
    for name, tensor in peft.load_peft_weights(str(run_dir / "rpo-1" / "adapter")).items():
        assert torch.equal(tensor, kept_weights[name])  # the rest of the run does not change it


@pytest.mark.slow
def test_a_stage_that_trains_all_weights_starts_from_the_merged(kept: Path, tmp_path: Path) -> None:
    tiny.cut_before(kept, tmp_path / "run", "rpo-1")
    recipe = adapted("code", KEEP)
    del tiny.stage_of(recipe, "rpo")["peft"]
    tiny.stage_of(recipe, "rpo").update(learning_rate=1e-4)
    run_dir = tiny.run(tmp_path, recipe)
    assert_step_zero(run_dir)
    assert (run_dir / "rpo-1" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_keep_over_a_stage_that_trained_all_weights(
    finished: Path, before_general: Any, tmp_path: Path
) -> None:
    recipe = adapted("general", KEEP)
    run_dir = before_general(tmp_path)
    tiny.run(tmp_path, recipe)
    assert_step_zero(run_dir)
    settings = json.loads((run_dir / "rpo-2" / "final" / adapter_files.CONFIG).read_text())
    assert settings["base_model_name_or_path"] == str(run_dir / "code" / "final")
    way = json.loads((run_dir / "rpo-2" / "final" / adapter_files.BASE).read_text())
    assert way == {"base": "../../code/final"}
    assert not list(run_dir.glob("*/base"))


# --- merge ---


@pytest.mark.slow
def test_merge_re_bases_each_stage(finished: Path, before_general: Any, tmp_path: Path) -> None:
    recipe = adapted("general", {**LORA, "target_modules": ["lm_head", "q_proj"], "use_dora": True})
    before_general(tmp_path / "cut")
    run_until("step:rpo-1:2", lambda: tiny.run(tmp_path / "cut", recipe))
    run_dir = tiny.run(tmp_path / "cut", recipe)
    assert_step_zero(run_dir)
    # Only the head of tied embeddings was adapted, so merging has untied them.
    first = AutoModelForCausalLM.from_pretrained(run_dir / "code" / "final")
    last = AutoModelForCausalLM.from_pretrained(run_dir / "rpo-2" / "final")
    embeddings = first.get_input_embeddings().weight
    assert first.lm_head.weight is embeddings
    assert torch.equal(last.get_input_embeddings().weight, embeddings)
    assert not torch.equal(last.lm_head.weight, embeddings)
    before_general(tmp_path / "straight")
    straight = tiny.run(tmp_path / "straight", recipe)
    assert tiny.weights(straight) == tiny.weights(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("between", ["merge", "keep"])
def test_a_start_that_changes_the_base(
    between: str, finished: Path, before_general: Any, tmp_path: Path
) -> None:
    spec = {**LORA, "init_lora_weights": "pissa", "between_stages": between}
    recipe = adapted("general", spec)
    before_general(tmp_path)
    run_until("step:dpo:2", lambda: tiny.run(tmp_path, recipe))
    run_dir = tiny.run(tmp_path, recipe)
    assert_step_zero(run_dir)
    bases = sorted(p.parent.name for p in run_dir.glob("*/base"))
    assert bases == (["general"] if between == "keep" else ["dpo", "general", "rpo-1", "rpo-2"])
    assert all(verify_manifest(run_dir / name / "base") is None for name in bases)
    # What readers of the adapter load equals what the stage has trained.
    folder = run_dir / "dpo" / ("final" if between == "keep" else "adapter")
    base = AutoModelForCausalLM.from_pretrained(adapter_files.base_of(folder))
    both = logps(peft.PeftModel.from_pretrained(base, folder))
    chain = chain_run._Chain(tiny.load(tmp_path, recipe), run_dir)
    torch.testing.assert_close(both, logps(chain.models.output("dpo")), rtol=0, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(run_dir / "general" / "base")
    start = peft.PeftModel.from_pretrained(base, run_dir / "general" / "base" / "start")
    code = AutoModelForCausalLM.from_pretrained(run_dir / "code" / "final")
    torch.testing.assert_close(logps(start), logps(code), rtol=0, atol=1e-4)
    before_general(tmp_path / "straight")
    straight = tiny.run(tmp_path / "straight", recipe)
    assert tiny.weights(straight) == tiny.weights(run_dir)


# --- the quickstart ---


@pytest.mark.long
@pytest.mark.parametrize("between", ["merge", "keep"])
def test_the_quickstart_with_adapters(between: str, tmp_path: Path) -> None:
    """All six stages of the real recipe, smaller; its preference stages have an adapter."""
    spec = f"{{r: 8, lora_alpha: 16, target_modules: all-linear, between_stages: {between}}}"
    sizes = [
        *(f"stages.{name}.max_steps=30" for name in ("code-sft", "general-sft")),
        *(f"stages.{name}.data.train.0.size=300" for name in ("dpo", "rpo")),
        "eval.data.0.size=40", "stages.dpo.num_train_epochs=1", "defaults.logging_steps=1",
    ]  # fmt: skip
    peft = [f"stages.{name}.{line}" for name in ("dpo", "rpo")
            for line in (f"peft={spec}", "learning_rate=3e-4")]  # fmt: skip
    loaded = load_recipe(ROOT / "recipes" / "quickstart" / "chain.yaml", [*sizes, *peft])
    run_dir = run_chain(loaded, tmp_path / "run")
    records = tiny.records(run_dir)
    for name in ("dpo", "rpo-1", "rpo-2", "rpo-3"):
        check = records[name]["step0"]
        assert check["ok"] and check["nats_per_token"] < 1e-5, name
        files = {path.name for path in (run_dir / name / "final").iterdir()}
        assert (adapter_files.WEIGHTS in files) == (between == "keep")
        assert ("model.safetensors" in files) == (between == "merge")
        # The next stage samples from what this stage has trained.
        assert records[name]["eval"]["reward_mean"] > 0
    margins = [m["rewards/margins"] for m in tiny.metrics(run_dir) if m["stage"] == "dpo"]
    assert margins[-1] > margins[0] and abs(margins[0]) < 1e-4


# --- paths ---


@pytest.mark.parametrize(
    "kind",
    [
        "goes on",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("merged first", "reference")),
    ],
)
def test_somebody_elses_adapter(kind: str, kept: Path, finished: Path, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    recipe["stages"] = [tiny.stage_of(recipe, "dpo")]
    (stage,) = recipe["stages"]
    theirs = tmp_path / "theirs"
    shutil.copytree(kept / "general" / "final", theirs)
    adapter_files.write_base(theirs, "base")
    shutil.copytree(kept / "code" / "base", theirs / "base")
    stage.update(init="./theirs", learning_rate=1e-2)
    if kind == "goes on":
        stage["peft"] = dict(KEEP)
    if kind == "reference":
        stage.update(init="model", reference="./theirs")
        recipe["model"].pop("from_config")
        recipe["model"]["name_or_path"] = str(finished / "code" / "final")
    run_dir = tiny.run(tmp_path, recipe)
    record = tiny.records(run_dir)["dpo"]
    assert ("step0" in record) == (kind != "reference")
    if kind == "goes on":
        settings = json.loads((run_dir / "dpo" / "final" / adapter_files.CONFIG).read_text())
        assert settings["base_model_name_or_path"] == str(theirs / "base")
        stage.update(init=str(theirs), peft={**KEEP, "r": 2})
        with raises("adapter.config-mismatch", RecipeError) as error:
            tiny.run(tmp_path / "other", recipe)
        assert "r is 4, not 2" in str(error.value)


# --- refusals ---


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("r", 8, "peft.r: 4 → 8"),
        ("between_stages", "merge", 'peft.between_stages: "keep" → "merge"'),
        ("lora_alpha", 32, "peft.lora_alpha: 16 → 32"),
    ],
)
def test_changes_of_the_adapter_are_refused_on_resume(
    key: str, value: Any, line: str, kept: Path, tmp_path: Path
) -> None:
    shutil.copytree(kept, tmp_path / "run")
    recipe = adapted("code", KEEP)
    for stage in recipe["stages"]:
        stage["peft"][key] = value
    with raises("run.recipe-changed", RunError) as error:
        tiny.run(tmp_path, recipe)
    for name in tiny.STAGES:
        assert f"stages.{name}.{line}" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "code", "shown"),
    [
        ({"rang": 2}, "recipe.unknown-peft-field", "rang"),
        ({"betwen_stages": "keep"}, "recipe.unknown-peft-field", "between_stages"),
        (
            {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 8},
            "recipe.unsupported-peft-type",
            "PREFIX_TUNING",
        ),
        ({"peft_type": "IA3"}, "recipe.unsupported-peft-type", "IA3"),
        ({"layers_pattern": "layers"}, "recipe.bad-peft", "layers_to_transform"),
        ({"init_lora_weights": False}, "adapter.random-start", "init_lora_weights=False"),
        ({"init_lora_weights": "eva"}, "adapter.data-start", "init_lora_weights='eva'"),
        ({"alora_invocation_tokens": [3]}, "adapter.unsupported-method", "activated LoRA"),
        ({"target_modules": ["nowhere"]}, "adapter.bad-config", "nowhere"),
        ({"r": "eight"}, "adapter.bad-config", "'str' and 'int'"),
    ],
)
def test_wrong_adapters_are_named_by_check(
    fields: dict[str, Any], code: str, shown: str, tmp_path: Path
) -> None:
    loaded = tiny.load(tmp_path, adapted("dpo", {**fields}))
    with pytest.raises(Problems) as error:
        check_recipe(loaded, tmp_path / "run", only={"dpo"})
    found = with_code(error.value, code)
    assert "stages.dpo.peft" in str(found.where) and shown in str(found)
    assert all(problem.fix for problem in error.value.problems)


def test_4_bits_need_bitsandbytes_and_whole_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adapted("dpo", {**KEEP, "quantization": "nf4"})
    stage = expand_stages(tiny.load(tmp_path, recipe).recipe)[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("recipe.missing-library", RecipeError) as error:
        lora_config(stage)
    assert error.value.where == "stages.dpo.peft.quantization"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    pissa = adapted("dpo", {**KEEP, "quantization": "nf4", "init_lora_weights": "pissa"})
    with raises("recipe.quantized-base-changes", RecipeError, where="stages.dpo.peft"):
        lora_config(expand_stages(tiny.load(tmp_path, pissa).recipe)[2])


# --- 4 bits ---


@pytest.mark.slow
@pytest.mark.extras("bitsandbytes")
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_qlora_keeps_its_base_in_4_bits(
    arithmetic: str, prefix: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adapted("dpo", {**KEEP, "quantization": "nf4"})
    recipe["model"]["dtype"] = arithmetic
    tiny.stage_of(recipe, "rpo")["peft"]["merge"] = True
    seen: list[str] = []
    make = chain_run.make_trainer

    def spy(stage: Any, config: Any, model: Any, *args: Any) -> Any:
        layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
        seen.append(f"{stage.name} {type(layer).__name__}")
        return make(stage, config, model, *args)

    monkeypatch.setattr(chain_run, "make_trainer", spy)
    run_dir = prefix(tmp_path, "dpo")
    if arithmetic == "bfloat16":
        state = json.loads((run_dir / "chain.json").read_text())
        state.pop("digest", None)
        state["model"]["dtype"] = arithmetic
        (run_dir / "chain.json").write_text(json.dumps(state))
    run_until("step:rpo-1:2", lambda: tiny.run(tmp_path, recipe))
    tiny.run(tmp_path, recipe)
    assert seen == ["dpo Linear4bit", *["rpo-1 Linear4bit"] * 2, "rpo-2 Linear4bit"]
    records = tiny.records(run_dir)
    assert all(records[name]["step0"]["ok"] for name in PREFERENCE)
    if arithmetic == "float32":
        assert_step_zero(run_dir)
    chain = chain_run._Chain(tiny.load(tmp_path, recipe), run_dir)
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "rpo-2" / "merged")
    off = (logps(merged) - logps(chain.models.output("rpo-2"))).abs().max()
    assert off < (1e-4 if arithmetic == "float32" else 0.1)
    assert (logps(merged) - logps(chain.models.output("general"))).abs().max() > 0.02


@pytest.mark.slow
@pytest.mark.extras("bitsandbytes")
def test_merged_4_bits_are_the_start_of_what_trains_all_weights(
    prefix: Any, tmp_path: Path
) -> None:
    recipe = adapted("dpo", {**LORA, "quantization": "nf4"})
    tiny.stage_of(recipe, "rpo").pop("peft")
    run_dir = prefix(tmp_path, "dpo")
    tiny.run(tmp_path, recipe)
    assert_step_zero(run_dir)
    assert (run_dir / "dpo" / "final" / "model.safetensors").is_file()
    assert (run_dir / "dpo" / "adapter" / adapter_files.WEIGHTS).is_file()


def test_no_file_names_a_place(kept: Path) -> None:
    """Except for the base of an adapter, which PEFT only finds by its absolute path."""
    place = str(kept.parent)
    for path in kept.rglob("*.json*"):
        if path.name != adapter_files.CONFIG:
            assert place not in path.read_text(errors="ignore"), path
