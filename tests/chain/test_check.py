"""`check`: all findings that need no model, reported together; only prepared data are written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rpo_trainer.chain.check import check_recipe
from rpo_trainer.cli.commands import main
from rpo_trainer.data.counts import DROPS, WARNINGS
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.errors import ModelError, Problems
from rpo_trainer.models import adapter_files
from rpo_trainer.models.loading import load_model, load_weights
from rpo_trainer.recipe import ModelSpec
from tests.chain import tiny
from tests.raising import codes_of, with_code


def check(folder: Path, recipe: tiny.Recipe | None = None, **settings: Any) -> list[str]:
    return check_recipe(tiny.load(folder, recipe), folder / "run", **settings)


def problems(folder: Path, recipe: tiny.Recipe) -> Problems:
    with pytest.raises(Problems) as error:
        check(folder, recipe)
    return error.value


def place(folder: Path, text: str) -> str:
    """Return file:line of a text of the recipe."""
    path = folder / "recipe.yaml"
    lines = path.read_text().splitlines()
    return f"{path}:{1 + next(i for i, line in enumerate(lines) if text in line)}"


def test_a_good_recipe_shows_examples_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def no_model(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    make = transformers.PreTrainedModel.__init__

    def unread(*args: Any, **kwargs: Any) -> None:
        if torch.get_default_device().type != "meta":  # only its size is read
            no_model()
        make(*args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", no_model)
    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", unread)
    recipe = tiny.tiny_recipe()
    del tiny.stage_of(recipe, "code")["max_steps"]
    tiny.stage_of(recipe, "code")["num_train_epochs"] = 1.5
    lines = check(tmp_path, recipe)
    assert lines[:3] == ["code (sft)", "  40 examples, 8 steps", "  8 held-out examples"]
    assert "  44 examples, 6 steps" in lines
    sampled = [line.split() for line in lines if line.startswith("  48 prompts; ")]
    assert {words[-1] for words in sampled} == {"general", "dpo", "rpo-1"}
    assert [line for line in lines if not line.startswith(" ")] == [
        "code (sft)", "general (sft)", "dpo (dpo)", "rpo-1 (rpo)", "rpo-2 (rpo)",
    ]  # fmt: skip
    assert tiny.written(tmp_path) == {"recipe.yaml"}


def test_only_some_stages(tmp_path: Path) -> None:
    assert check(tmp_path, only={"dpo"})[0] == "dpo (dpo)"


def test_steps_are_those_that_training_takes(finished: Path, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    stage = tiny.stage_of(recipe, "code")
    del stage["max_steps"]
    stage["num_train_epochs"], stage["global_batch_size"] = 1.5, 24
    recipe["stages"] = [stage]
    (line,) = [x for x in check(tmp_path, recipe) if "steps" in x]
    run_dir = tiny.run(tmp_path, recipe)
    assert line == f"  40 examples, {tiny.records(run_dir)['code']['steps']} steps"


def broken(folder: Path) -> tiny.Recipe:
    recipe = tiny.tiny_recipe()
    bad = [{"prompt": "p", "chosen": "a"}]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    tiny.stage_of(recipe, "code")["training_args"] = {"adam_eps": 1.0}
    tiny.stage_of(recipe, "code")["data"]["train"] = [{"path": "absent.jsonl"}]
    tiny.stage_of(recipe, "general")["peft"] = {"rang": 2}
    tiny.stage_of(recipe, "dpo")["reference"] = "./nowhere"
    tiny.stage_of(recipe, "dpo")["optim"] = "adam_typo"
    tiny.stage_of(recipe, "rpo")["data"] = {"train": [{"path": "bad.jsonl"}]}
    recipe["eval"] = {"data": [{"path": "held-out.jsonl"}]}
    return recipe


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, broken(tmp_path))
    text = str(found)
    for part in (
        "adam_eps", "absent.jsonl: ", "rang", "nowhere",
        "adam_typo", "held-out.jsonl: ", "rejected",
    ):  # fmt: skip
        assert part in text, part
    assert found.exit_code == 3
    # Replay makes stage 2 read stage 1's file, every stage has the evaluation, `rpo` two rounds.
    assert text.count("absent.jsonl: ") == 1
    assert text.count("held-out.jsonl") == 1
    (line,) = re.findall(r"yaml:(\d+) \(stages\.code\.data\): \S+/absent\.jsonl: ", text)
    above = (tmp_path / "recipe.yaml").read_text().splitlines()[: int(line)]
    assert above[-1].endswith("data:") and "absent" not in "".join(above)
    assert not tiny.written(tmp_path / "run")


def test_exit_codes(tmp_path: Path) -> None:
    recipe = tiny.changed(tiny.tiny_recipe(), "code.optim", "adam_typo")
    assert problems(tmp_path, recipe).exit_code == 2
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "code")["data"]["train"] = [{"path": "absent.jsonl"}]
    found = problems(tmp_path, recipe)
    assert found.exit_code == 3 and set(codes_of(found)) == {"data.no-such-file"}


def test_a_missing_tokenizer_does_not_hide_faults_of_the_data(tmp_path: Path) -> None:
    recipe = broken(tmp_path)
    recipe["model"]["tokenizer"] = "./no-tokenizer"
    found = problems(tmp_path, recipe)
    assert {"model.not-found", "data.no-such-file"} <= set(codes_of(found))


def test_prompts_must_have_ground_truth_and_a_template(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "add 1 and 2"}], "ground_truth": "3"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(rows[0]) + "\n")
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "rpo")["data"]["train"] = [{"path": "prompts.jsonl"}]
    assert "template.missing" in codes_of(problems(tmp_path, recipe))
    recipe["model"]["chat_template"] = "plain"
    assert check(tmp_path, recipe)
    del rows[0]["ground_truth"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (problem, *_) = problems(tmp_path, recipe).problems
    assert problem.code == "verifier.missing-ground-truth" and "1 of 1 rows" in problem.what


def test_max_length_beyond_the_context(tmp_path: Path) -> None:
    recipe = tiny.changed(tiny.tiny_recipe(), "dpo.max_length", 65)
    (problem,) = problems(tmp_path, recipe).problems
    assert problem.code == "model.context-exceeded"
    assert problem.where == f"{place(tmp_path, 'max_length: 65')} (stages.dpo.max_length)"
    assert "max_length 65" in problem.what and "64 tokens" in problem.what
    assert "max_length: 64" in str(problem.fix)


def saved_model(folder: Path, tokens: int = 100) -> Path:
    """A model of two layers in a directory, with its tokenizer."""
    config = tiny.tiny_recipe()["model"]["from_config"]
    spec = ModelSpec(from_config={**config, "vocab_size": tokens}, tokenizer="characters")
    load_model(spec, folder, seed=0, vocabulary=0).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def pickled(folder: Path) -> None:
    (saved_model(folder) / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_weights(folder: Path) -> None:
    (saved_model(folder) / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    os.truncate(saved_model(folder) / "model.safetensors", 3000)


def without_a_part(folder: Path) -> None:
    parts = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (saved_model(folder) / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(parts))


def with_own_code(folder: Path) -> None:
    path = saved_model(folder) / "config.json"
    own = {"model_type": "strange", "auto_map": {"AutoConfig": "own.Config"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def without_a_tensor(folder: Path) -> None:
    path = saved_model(folder) / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if "layers.1.mlp.down_proj" not in n}
    save_file(kept, path, metadata={"format": "pt"})


def with_a_cut_generation_config(folder: Path) -> None:
    (saved_model(folder) / "generation_config.json").write_text('{"do_sample": ')


def with_few_embeddings(folder: Path) -> None:
    saved_model(folder, tokens=90)


def a_reward_model(folder: Path) -> None:
    path = saved_model(folder) / "config.json"
    kind = {"architectures": ["LlamaForSequenceClassification"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **kind}))


# What is created, the code of the error, and what it names.
MODELS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "pickled weights only": (pickled, "model.pickled-weights", "(pytorch_model.bin)"),
    "no weights": (without_weights, "model.no-weights", ""),
    "weights that are cut": (cut, "model.damaged-weights", " model.safetensors "),
    "a part missing": (
        without_a_part, "model.damaged-weights", "model-00002-of-00002.safetensors",
    ),
    "code from a repository": (with_own_code, "model.needs-remote-code", ""),
    "more tokens than embeddings": (
        with_few_embeddings, "tokenizer.too-many-tokens", "90 embeddings",
    ),
    "a tensor missing": (
        without_a_tensor, "model.tensor-mismatch", "missing: model.layers.1.mlp.down_proj.weight",
    ),
    "a cut generation config": (
        with_a_cut_generation_config, "model.unreadable-generation-config", "",
    ),
    "head of rewards": (a_reward_model, "model.not-a-policy", ""),
}  # fmt: skip


@pytest.mark.parametrize("place_of", ["model", "init"])
@pytest.mark.parametrize("case", MODELS)
def test_a_model_with(case: str, place_of: str, tmp_path: Path) -> None:
    """Before any weight is read; also for a later stage, which would fail hours later."""
    make, code, named = MODELS[case]
    make(tmp_path / "mine")
    recipe = tiny.tiny_recipe()
    if place_of == "model":
        recipe["model"] = {"name_or_path": "./mine", "tokenizer": "characters", "dtype": "float32"}
        line, where = "model:", "(model): ./mine: "
    else:
        tiny.stage_of(recipe, "dpo")["init"] = "./mine"
        line, where = "init:", f"(stages.dpo.init): {tmp_path / 'mine'}: "
    (problem,) = problems(tmp_path, recipe).problems
    assert type(problem) is ModelError and problem.code == code and problem.fix
    assert str(problem).startswith(f"{place(tmp_path, line)} {where}")
    assert named in problem.what
    assert {name.split("/")[0] for name in tiny.written(tmp_path)} == {"mine", "recipe.yaml"}
    assert not (tmp_path / "mine" / "ran").exists()


def test_an_adapter_without_one_of_its_tensors(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    saved_model(theirs / "base")
    saved_adapter(theirs, "base")
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "dpo").update(init="./theirs")
    assert check(tmp_path, recipe)
    path = theirs / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "layers.1" not in n}, path)
    found = with_code(problems(tmp_path, recipe), "adapter.tensor-mismatch")
    assert "missing: base_model.model.model.layers.1" in found.what
    path.rename(theirs / "adapter_model.bin")
    found = with_code(problems(tmp_path, recipe), "adapter.unusable-weights")
    assert "adapter_model.bin" in found.what


@pytest.mark.parametrize("case", ["policy", "pickled", "with code"])
def test_a_scorer_that_cannot_be_loaded(case: str, tmp_path: Path) -> None:
    makers = {"pickled": pickled, "with code": with_own_code}
    makers.get(case, saved_model)(tmp_path / "mine")
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "dpo")["data"]["score"] = {"model": "./mine"}
    found = problems(tmp_path, recipe)
    code, named = {
        "pickled": ("model.pickled-weights", "pytorch_model.bin"),
        "policy": ("model.tensor-mismatch", "missing: score.weight"),
        "with code": ("model.needs-remote-code", ""),
    }[case]
    assert named in with_code(found, code).what
    assert not (tmp_path / "mine" / "ran").exists()


def test_random_weights_with_fewer_embeddings_than_tokens(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    recipe["model"]["from_config"]["vocab_size"] = 64
    (problem,) = problems(tmp_path, recipe).problems
    assert problem.code == "tokenizer.too-many-tokens"
    assert problem.where == f"{place(tmp_path, 'model:')} (model)"
    assert "100 tokens" in problem.what and "64 embeddings" in problem.what


def test_another_vocabulary_in_the_reference(tmp_path: Path) -> None:
    saved_model(tmp_path / "mine", tokens=120)
    recipe = tiny.changed(tiny.tiny_recipe(), "dpo.reference", "./mine")
    (problem,) = problems(tmp_path, recipe).problems
    assert problem.where == f"{place(tmp_path, 'reference: ')} (stages.dpo.reference)"
    assert problem.code == "tokenizer.mismatch" and problem.fix
    assert "120 tokens" in problem.what and " 100" in problem.what
    assert check(tmp_path, tiny.changed(recipe, "dpo.init", "./mine"))


def saved_adapter(folder: Path, base: str) -> None:
    """An adapter whose config names the model in `folder/base`."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load_weights(folder / "base"), config).save_pretrained(folder)
    adapter_files.write_base(folder, base)


def test_adapters_are_seen_with_what_lies_below_them(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "dpo").update(init="./theirs", reference="model")
    saved_model(theirs / "base", tokens=120)
    saved_adapter(theirs, "base")
    problem = with_code(problems(tmp_path, recipe), "tokenizer.mismatch")
    assert "(stages.dpo.reference)" in str(problem.where)
    assert re.search(r" 100 tokens, .* 120$", problem.what)
    saved_model(theirs / "base", tokens=90)
    (problem,) = problems(tmp_path, recipe).problems
    assert problem.code == "tokenizer.too-many-tokens" and "90 embeddings" in problem.what
    assert "(stages.dpo.init): " in str(problem.where)
    assert str(theirs) in str(problem.where) and str(theirs / "base") in str(problem.where)
    settings = json.loads((theirs / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "some/hub-name"
    (theirs / "adapter_config.json").write_text(json.dumps(settings))
    (problem,) = problems(tmp_path, recipe).problems
    assert problem.code == "model.cannot-load" and "(stages.dpo.init): " in str(problem.where)
    assert str(theirs) in str(problem.where) and "some/hub-name" in str(problem.where)


@pytest.mark.parametrize("responses_from", [None, "dpo"])
def test_held_out_rows_of_a_stage_that_samples(responses_from: str | None, tmp_path: Path) -> None:
    """They come with their responses, regardless of the source of the training rows."""
    recipe = tiny.tiny_recipe()
    stage = tiny.stage_of(recipe, "rpo")
    if responses_from is not None:
        stage["data"] = {"responses_from": responses_from, "pairs": {"select": "all_responses"}}
    stage["data"]["eval"] = [{"path": "held.jsonl"}]
    row = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
    rewards = {"chosen_reward": 1.0, "rejected_reward": 0.0}
    (tmp_path / "held.jsonl").write_text(json.dumps({**row, **rewards}) + "\n")
    assert check(tmp_path, recipe).count("  1 held-out example") == 2  # of both rounds
    (tmp_path / "held.jsonl").write_text(json.dumps(row) + "\n")
    assert "data.missing-rewards" in codes_of(problems(tmp_path, recipe))


def test_held_out_prompts_of_rows_that_another_stage_samples(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    stage = tiny.stage_of(recipe, "rpo")
    prompts = [{"prompt": f"{n} + 1 = ", "ground_truth": str(n + 1)} for n in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    tiny.stage_of(recipe, "dpo")["data"]["train"] = [{"path": "p.jsonl"}]
    stage["data"] = {
        "responses_from": "dpo",
        "eval": [{"path": "held.jsonl"}],
        "eval_overlap": "error",
    }
    row = {"prompt": "2 + 1 = ", "chosen": "3", "rejected": "5"}
    rewards = {"chosen_reward": 1.0, "rejected_reward": 0.0}
    (tmp_path / "held.jsonl").write_text(json.dumps({**row, **rewards}) + "\n")
    found = with_code(problems(tmp_path, recipe), "data.eval-overlap")
    assert found.what.startswith("1 of 1 eval rows")


def test_policies_to_sample_from_and_room_for_their_responses(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    generate = tiny.stage_of(recipe, "dpo")["data"]["generate"] = {
        "responses": 3, "max_new_tokens": 60, "policies": ["init", "./other", "code"],
    }  # fmt: skip
    recipe["eval"] = {
        "data": [tiny.task("general", "heldout", 4)], "score": {"verifier": "partial_match"},
        "generate": {"responses": 2, "max_new_tokens": 500},
    }  # fmt: skip
    several = problems(tmp_path, recipe)
    assert codes_of(several).count("model.context-exceeded") == 2
    found = str(several)
    assert "(stages.dpo.data.generate.policies" in found and "other" in found
    assert "(stages.dpo.data.generate.max_new_tokens): " in found
    assert "(eval.generate.max_new_tokens): " in found
    assert "context of 64" in found
    assert "3 problems found" in found
    generate.update(max_new_tokens=5, policies=["init", "code"])
    recipe["eval"]["generate"]["max_new_tokens"] = 5
    check(tmp_path, recipe)


def test_each_fault_of_an_evaluation_has_its_place(tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    recipe["eval"] = {
        "preferences": [{"path": "no-pairs.jsonl"}], "nll": [{"path": "no-rows.jsonl"}],
        "baseline": "./no-model",
    }  # fmt: skip
    found = problems(tmp_path, recipe)
    assert [str(one).split("): ", 1)[0].rsplit("(", 1)[1].split(":")[0] for one in found.problems] == [
        "eval", "eval", "eval.baseline",
    ]  # fmt: skip
    assert "no-pairs.jsonl" in str(found) and "no-rows.jsonl" in str(found)


def test_a_run_directory_that_a_run_would_refuse(finished_copy: Path, tmp_path: Path) -> None:
    recipe = tiny.tiny_recipe()
    check(tmp_path, recipe)  # a finished run of this recipe
    changed = problems(tmp_path, tiny.changed(recipe, "dpo.beta", 0.25))
    found = str(with_code(changed, "run.recipe-changed"))
    assert "beta" in found and "0.25" in found and "--allow-changed" in found
    (finished_copy / "chain.json").unlink()
    assert "run.not-a-run-directory" in codes_of(problems(tmp_path, recipe))


def test_held_out_rows_that_are_trained_on(tmp_path: Path) -> None:
    """A warning, or an error if the recipe requires it."""
    recipe = tiny.tiny_recipe()
    data = tiny.stage_of(recipe, "code")["data"]
    data["eval"] = [tiny.task("code", "train", 8)]
    shown = "8 of 8 eval rows"
    assert any(line.startswith(f"  WARNING: {shown}") for line in check(tmp_path, recipe))
    data["eval_overlap"] = "error"
    assert f" (stages.code.data.eval): {shown}" in str(problems(tmp_path, recipe))


def test_prompts_of_the_recipes_evaluation_that_are_trained_on(tmp_path: Path) -> None:
    """Both for rows that exist and for prompts whose responses will be sampled."""
    recipe = tiny.tiny_recipe()
    recipe["eval"] = {
        "data": [tiny.task("general", "heldout", 5), tiny.task("general", "preference", 2, seed=1)],
        "generate": {"max_new_tokens": 5}, "score": {"verifier": "exact"},
        "nll": [tiny.task("code", "train", 8), tiny.task("code", "heldout", 2)],
    }  # fmt: skip
    found: dict[str, list[str]] = {}
    for line in check(tmp_path, recipe):
        if not line.startswith(" "):
            found[stage := line.split()[0]] = []
        elif "WARNING: eval" in line:
            found[stage].append(line.strip().removeprefix("WARNING: ").partition(" (")[0])
    ((nll,), (data,)) = found["code"], found["dpo"]
    assert nll.startswith("eval.nll: 8 of 10 eval rows")
    assert data.startswith("eval.data: 2 of 7 eval rows")
    assert not found["rpo-1"] and not found["rpo-2"]
    tiny.stage_of(recipe, "code")["data"]["eval_overlap"] = "error"
    assert "8 of 10 eval rows" in str(problems(tmp_path, recipe))


def test_repeated_prompts_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": "x"} for p in ("a b", "A  b", "a b", "c")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny.tiny_recipe()
    data = tiny.stage_of(recipe, "code")["data"]
    data |= {"train": [{"path": "rows.jsonl"}], "dedup": "normalized"}
    del data["eval"]
    lines = check(tmp_path, recipe, only={"code"})
    dropped = f"2 rows, {DROPS['repeated_prompt']} (rows.jsonl:2, rows.jsonl:3)"
    assert any(line.startswith("  50% of") and line.endswith(dropped) for line in lines)


def test_what_deserves_attention_is_a_warning_and_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most rows dropped by max_length, a third tied, a column that is not read."""
    pair = {"prompt": "a b: ", "chosen": "c", "rejected": "d", "rejected_reward": 0.0}
    rows = [
        {**pair, "prompt": f"{i}: ", "chosen": "c" * (90 if i < 8 else 1), "notes": "some words",
         "chosen_reward": float(i % 2)}
        for i in range(10)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = saved_model(tmp_path / "mine") / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "temperature": 0.5}))
    recipe = tiny.tiny_recipe()
    recipe["model"] = {"name_or_path": "./mine", "tokenizer": "characters", "dtype": "float32"}
    data = {"train": [{"path": "rows.jsonl"}]}
    recipe["stages"] = [{"name": "one", "kind": "dpo", "beta": 0.1, "max_length": 40, "data": data}]
    path = tiny.write_recipe(tmp_path, recipe)
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path)])
    assert not ended.value.code
    shown = capsys.readouterr().out
    warnings = [line.strip() for line in shown.splitlines() if line.startswith("  WARNING: ")]
    assert any("80% of " in w and "max_length 40 (8)" in w for w in warnings)
    assert any("50% of " in w and "tied" in w for w in warnings)
    assert any("notes" in w and "columns" in w for w in warnings)
    assert any("temperature=0.5" in w for w in warnings)  # which transformers would not save
    assert sum("warning" in line.lower() for line in shown.splitlines()[:-1]) == len(warnings)
    assert shown.endswith(f"{path}: OK, with {len(warnings)} warnings\n")


def test_what_is_dropped_of_held_out_rows_is_shown(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": " "}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "code")["data"]["eval"] = [{"path": "held.jsonl"}]
    lines = check(tmp_path, recipe, only={"code"})
    assert "  1 held-out example" in lines
    dropped = f"1 row, {DROPS['empty_response']} (held.jsonl:2)"
    assert any(line.startswith("  held out: 50%") and line.endswith(dropped) for line in lines)
    assert any(line.startswith("  WARNING: held out: 50%") for line in lines)


def test_a_repeated_prompt_of_a_sampling_stage_is_shown(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "ground_truth": "r"}] * 2
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny.tiny_recipe()
    tiny.stage_of(recipe, "dpo")["data"]["train"] = [{"path": "prompts.jsonl"}]
    lines = check(tmp_path, recipe, only={"dpo"})
    assert f"  1 row (50%), {WARNINGS['duplicate_prompt']} (prompts.jsonl:2)" in lines


@pytest.mark.parametrize("field", ["init", "reference"])
def test_max_length_beyond_the_context_of_another_model(field: str, tmp_path: Path) -> None:
    path = saved_model(tmp_path / "mine") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 32}))
    recipe = tiny.changed(tiny.tiny_recipe(), f"dpo.{field}", "./mine")
    shown = str(problems(tmp_path, recipe))
    assert "[model.context-exceeded]" in shown
    assert "max_length 64" in shown and "./mine's" in shown and "32 tokens" in shown
    # The rounds that start from it have the same context; one line of the recipe causes the error.
    assert shown.endswith("1 problem found")


def test_another_tokenizer_of_the_same_size_in_a_reference(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "mine") / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    recipe = tiny.changed(tiny.tiny_recipe(), "dpo.reference", "./mine")
    (problem,) = problems(tmp_path, recipe).problems
    assert problem.code == "tokenizer.mismatch" and str(tmp_path / "mine") in str(problem.where)
