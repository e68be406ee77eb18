"""Each recipe of recipes/models is checked and trained for two steps, with a shrunk model of its family."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rpo_trainer.cli.commands import main
from rpo_trainer.data.quickstart import character_tokenizer
from rpo_trainer.data.templates import CHATML, CHATML_TOKENS
from rpo_trainer.recipe import load_recipe
from tests.chain.tiny import records
from tests.documents import ROOT
from tests.small_models import make_model

RECIPES = sorted((ROOT / "recipes" / "models").glob("*.yaml"))
FAMILIES = {
    "gemma-3-1b": "gemma3_text", "llama-3.1-8b-lora": "llama", "mistral-7b-qlora": "mistral",
    "qwen3-8b-lora": "qwen3", "smollm2-135m": "llama",
}  # fmt: skip
_OPENS = "{{ '<|im_start|>assistant\\n' }}"
# A template with the variable of Qwen3's: where it is false, the generation prompt closes the thinking.
THINKING = CHATML.replace(
    "add_generation_prompt %}",
    "add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    + _OPENS + "{{ '<think></think>' }}{% elif add_generation_prompt %}",
)  # fmt: skip


def save_model(folder: Path, family: str, *, template: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML_TOKENS)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    make_model(family, vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(
        folder
    )


def ultrafeedback(path: Path, rows: int) -> Path:
    """Rows with the columns of HuggingFaceH4/ultrafeedback_binarized."""
    lines = []
    for n in range(rows):
        question = {"role": "user", "content": f"{n} + 1 = "}
        better, worse = str(n + 1), str(n)
        lines.append(
            {
                "prompt": question["content"], "prompt_id": str(n),
                "messages": [question, {"role": "assistant", "content": better}],
                "chosen": [question, {"role": "assistant", "content": better}],
                "rejected": [question, {"role": "assistant", "content": worse}],
                "score_chosen": 8.0 + n % 2, "score_rejected": 3.0 + n % 4,
            }
        )  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def overrides(recipe: Path, folder: Path) -> list[str]:
    """A small model and small data in place of those on the hub, and two steps per stage."""
    family = FAMILIES[recipe.stem]
    reads_thinking = "enable_thinking" in recipe.read_text(encoding="utf-8")
    save_model(folder / "model", family, template=THINKING if reads_thinking else CHATML)
    train, heldout = (
        ultrafeedback(folder / "train.jsonl", 16),
        ultrafeedback(folder / "eval.jsonl", 4),
    )
    words = [f"model.name_or_path={folder / 'model'}", "defaults.warmup_steps=1"]
    words += [
        "defaults.global_batch_size=8",
        "defaults.num_train_epochs=null",
        "defaults.max_steps=2",
    ]
    for stage in load_recipe(recipe).recipe.stages:
        words.append(f"stages.{stage.name}.data.train=[{{path: {train}}}]")
        words.append(f"stages.{stage.name}.data.eval=[{{path: {heldout}}}]")
    return words


def test_every_family_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES} == set(FAMILIES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_header_names_the_hub_model_and_its_commands(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    model = load_recipe(recipe).recipe.model.name_or_path
    assert model is not None and re.fullmatch(r"[\w-]+/[\w.-]+", model)
    page = (recipe.parent / "README.md").read_text(encoding="utf-8")
    assert f"[{recipe.name}]({recipe.name}) | `{model}`" in page
    assert re.findall(r"^#   rpo-trainer (\w+) (\S+)$", text, flags=re.MULTILINE) == [
        ("plan", f"recipes/models/{recipe.name}"), ("run", f"recipes/models/{recipe.name}"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_checks_and_trains(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "quantization" in recipe.read_text(encoding="utf-8"):
        pytest.importorskip("bitsandbytes")
    words = overrides(recipe, tmp_path)
    run_dir = tmp_path / "run"
    for command in ("check", "run"):
        with pytest.raises(SystemExit) as ended:
            main([command, str(recipe), *words, "--run-dir", str(run_dir)])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.out + said.err
    finished = records(run_dir)
    assert [record["state"] for record in finished.values()] == ["done"] * 3
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = {(line["stage"], line.get("step")) for line in map(json.loads, lines)}
    assert {(name, 2) for name in finished} <= steps
