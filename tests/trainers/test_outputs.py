"""Files next to the weights: outputs end responses as in training, and configs are unchanged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from rpo_trainer import (
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rpo_trainer.chain import run_chain
from rpo_trainer.errors import ModelError, Problems, RunError
from rpo_trainer.models.adapters import load_adapter
from rpo_trainer.models.loading import load_weights
from rpo_trainer.rewards.sample import _end_tokens
from tests.chain import tiny
from tests.raising import raises
from tests.small_models import make_model

WORDS = [
    "user",
    "assistant",
    "a",
    "b",
    "c",
    "d",
    ":",
    "system",
    "yes",
    "no",
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
]
SPECIALS = ["<eos>", "<pad>", "<start>", "<end>", "<call>"]
END = "{% for m in messages %}<start> {{ m.role }} : {{ m.content }} <end>{% endfor %}"
EOS = "{% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<start> assistant :{% endif %}"
# Turns have no end marker: the token that opens the next one ends them.
OPENERS = (
    "{% for m in messages %}{{ '<call>' if m.role == 'user' else '<start>' }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<start> {% endif %}"
)
PROMPT_EOS = "{% if add_generation_prompt %}assistant :{% endif %}"
LORA = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<start>", "<end>", "<call>"],
    )  # fmt: skip
    made.chat_template = template
    return made


def chats(n: int = 4) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": w}]}
        for w in WORDS[-n:]
    ]


def completions(n: int = 4) -> list[dict[str, Any]]:
    return [{"prompt": "a b ", "completion": word} for word in WORDS[-n:]]


def tokenized(*ends: int) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": [6], "response_ids": [[8, end]], "response_mask": [[1, 1]]} for end in ends
    ]


def pairs() -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": word}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for word in WORDS[-4:]
    ]


def args(cls: Any, folder: Path, **changes: Any) -> Any:
    settings = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "max_steps": 1,
        "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    return cls(**{**settings, **changes})


def model(**changes: Any) -> Any:
    settings = {"vocab_size": len(tokenizer()), "eos_token_id": 0, "pad_token_id": None}
    made = make_model(**{**settings, "bos_token_id": None, **changes})
    made.generation_config = GenerationConfig.from_model_config(made.config)
    return made


def stored(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())  # type: ignore[no-any-return]


# template, rows, the base's end tokens → end tokens of the output, its tokenizer's end token
CASES: dict[str, tuple[str | None, Any, Any, Any, str]] = {
    "a marker": (END + PROMPT, chats(), 0, [3, 0], "<end>"),
    "a marker that the base knows last": (END + PROMPT, chats(), [0, 4, 3], [3, 0, 4], "<end>"),
    "a marker of its own, no other": (END + PROMPT, chats(), 3, 3, "<end>"),
    "the end token by a template": (EOS + PROMPT_EOS, chats(), 0, 0, "<eos>"),
    "completions": (None, completions(), 0, 0, "<eos>"),
    "completions of a base that lists more": (None, completions(), [4, 0], [0, 4], "<eos>"),
    "both kinds": (END + PROMPT, tokenized(3, 3, 3, 0, 3, 0), 0, [3, 0], "<eos>"),
    "the opener of a turn": (OPENERS, chats(), 0, [4, 0], "<eos>"),
    "an opener that the base knows": (OPENERS, chats(), [0, 4], [4, 0], "<eos>"),
    "a base without an end": (END + PROMPT, chats(), None, 3, "<end>"),
}


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_output_ends_where_training_ended(case: str, peft: bool, tmp_path: Path) -> None:
    template, rows, base, ends, eos = CASES[case]
    net = model()
    net.config.eos_token_id = net.generation_config.eos_token_id = base
    trainer = SFTTrainer(
        net, args=args(SFTConfig, tmp_path / "out"), train_dataset=rows,
        processing_class=tokenizer(template), peft_config=LoraConfig(**LORA) if peft else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    final = tmp_path / "final"
    assert stored(final, "generation_config.json")["eos_token_id"] == ends
    assert stored(final, "tokenizer_config.json")["eos_token"] == eos
    assert stored(final, "tokenizer_config.json")["pad_token"] == "<pad>"
    if not peft:
        assert stored(final, "config.json")["eos_token_id"] == ends
    assert trainer.processing_class.eos_token == "<eos>"  # later data does not change it


def test_what_is_pushed_in_training_is_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer is that of the checkpoint, and no pickle is uploaded or kept."""
    pushed: dict[str, Any] = {}

    class Hub:
        def upload_folder(self, *, folder_path: str, ignore_patterns: Any, **_: Any) -> Any:
            files = [path.name for path in Path(folder_path).iterdir() if path.is_file()]
            for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
                pushed[name] = (Path(folder_path) / name).read_bytes()
            return SimpleNamespace(is_done=lambda: True)

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: Hub())
    trainer = SFTTrainer(
        model(), args(SFTConfig, tmp_path, save_strategy="steps", save_steps=1), chats(),
        processing_class=tokenizer(END),
    )  # fmt: skip
    trainer.train()
    trainer.hub_model_id, trainer.push_in_progress = "someone/model", None
    saved = next(tmp_path.rglob("checkpoint-*"))
    trainer._push_from_checkpoint(str(saved))
    assert {"model.safetensors", "config.json", "tokenizer_config.json"} <= pushed.keys()
    assert all((saved / name).read_bytes() == content for name, content in pushed.items())
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith("training_args.bin")]


def test_a_difference_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(template: str | None, rows: Any, base: Any = 0) -> str:
        caplog.clear()
        net = model()
        net.config.eos_token_id = net.generation_config.eos_token_id = base
        with caplog.at_level(logging.WARNING, "rpo_trainer"):
            SFTTrainer(
                net, args=args(SFTConfig, tmp_path), train_dataset=rows,
                processing_class=tokenizer(template),
            )  # fmt: skip
        return caplog.text

    assert "'<end>' (3)" in said(END + PROMPT, chats()) and "eos_token_id" in caplog.text
    assert "eos_token" not in said(None, completions())
    # For a base that already stops there, the tokenizer may still change.
    assert "'<eos>'" in said(END + PROMPT, chats(), [0, 3]) and "'<end>'" in caplog.text
    assert "eos_token" not in said(OPENERS, chats(), [0, 4])


def test_tokens_where_a_response_was_cut_end_nothing(tmp_path: Path) -> None:
    rows = [
        {"prompt_ids": [6], "response_ids": [[7, 8, 4]], "response_mask": [[1, 1, 1]]},
        *[
            {"prompt_ids": [6], "response_ids": [[7, 3, 8, 3]], "response_mask": [[1, 1, 0, 1]]}
            for _ in range(200)
        ],
    ]
    trainer = SFTTrainer(
        model(), args=args(SFTConfig, tmp_path), train_dataset=rows, processing_class=tokenizer()
    )
    assert trainer.output.written.ends == (3,)
    calls = [{**rows[0], "id": str(n)} for n in range(9)]
    trainer = SFTTrainer(
        model(), args=args(SFTConfig, tmp_path), train_dataset=[*calls, *rows],
        processing_class=tokenizer(),
    )  # fmt: skip
    assert trainer.output.written.ends == (3, 4)  # often enough to be an end token


PARTS = {  # trained responses, with 0 as the base's end token → end tokens
    "an analysis before its answer": ([[7, 4], [8, 4, 9, 0]], (0,)),
    "the marker of the template": ([[7, 3], [8, 3, 9, 3]], ()),
    "one stray token in many": ([[7, 3]] * 199 + [[8, 3, 9, 3]], (3,)),
    "the next response": ([[7, 3], [3, 3], [3]], ()),
}


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("case", PARTS)
def test_tokens_that_training_continues_after_end_nothing(
    case: str, table: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    responses, ends = PARTS[case]
    rows: Any = [
        {"prompt_ids": [6], "response_ids": [r], "response_mask": [[1] * len(r)]} for r in responses
    ]
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        trainer = SFTTrainer(
            model(), args=args(SFTConfig, tmp_path),
            train_dataset=Dataset.from_list(rows) if table else rows,
            processing_class=tokenizer(END + PROMPT),
        )  # fmt: skip
    assert trainer.output.written.ends == ends
    left_out = [r for r in caplog.records if r.name == "rpo_trainer.trainers.fits"]
    assert bool(left_out) == (ends == ())


def test_a_template_that_writes_the_end_token_elsewhere_keeps_it(tmp_path: Path) -> None:
    template = "{{ eos_token }}" + END + PROMPT
    trainer = SFTTrainer(
        model(), args=args(SFTConfig, tmp_path), train_dataset=chats(),
        processing_class=tokenizer(template),
    )  # fmt: skip
    assert trainer.output.written.ends == (3,)
    assert trainer.output.written.tokenizer.eos_token == "<eos>"


def test_preferences_end_so_too_and_a_reward_model_as_it_was(tmp_path: Path) -> None:
    trainer: Any = DPOTrainer(
        model(), args=args(DPOConfig, tmp_path / "a"), train_dataset=pairs(),
        processing_class=tokenizer(END + PROMPT),
    )  # fmt: skip
    assert trainer.model.generation_config.eos_token_id == [3, 0]
    trainer = RewardTrainer(
        model(), args=args(RewardConfig, tmp_path / "b"), train_dataset=pairs(),
        processing_class=tokenizer(END + PROMPT),
    )  # fmt: skip
    assert (
        trainer.output.written.ends == () and trainer.output.written.tokenizer.eos_token == "<eos>"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_the_config_is_as_it_was_given(
    use_cache: bool, checkpointing: bool, tmp_path: Path
) -> None:
    given = model(use_cache=use_cache, attention_dropout=0.1)
    given.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    trainer = DPOTrainer(
        str(tmp_path / "base"),
        args=args(
            DPOConfig, tmp_path / "out", save_strategy="steps", save_steps=1,
            gradient_checkpointing=checkpointing,
        ),
        train_dataset=[
            {"prompt": "a ", "chosen": w, "rejected": "no"} for w in WORDS[-4:]
        ],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "out" / "checkpoint-1"):
        for name in ("config.json", "generation_config.json"):
            assert stored(folder, name) == stored(tmp_path / "base", name), folder
    assert trainer.model.config.use_cache is use_cache


# --- through a chain ---


def recipe(folder: Path, **peft: Any) -> tiny.Recipe:
    model(max_position_embeddings=64).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "t.jinja").write_text(END + PROMPT)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats()))
    stage = {
        "kind": "sft", "max_steps": 1, "learning_rate": 1e-3, "max_length": 32, "global_batch_size": 2,
        "data": {"train": [{"path": "rows.jsonl"}]}, **({"peft": peft} if peft else {}),
    }  # fmt: skip
    return {
        "model": {"name_or_path": "./base", "dtype": "float32", "chat_template": "t.jinja"},
        "stages": [{"name": "one", **stage}, {"name": "two", **stage}],
    }


@pytest.mark.parametrize("between", [None, "merge", "keep"])
def test_a_chain_ends_so_in_every_output(between: str | None, tmp_path: Path) -> None:
    peft = {**LORA, "between_stages": between} if between else {}
    run_dir = run_chain(tiny.load(tmp_path, recipe(tmp_path, **peft)), tmp_path / "run")
    for stage in ("one", "two"):
        final = run_dir / stage / "final"
        assert stored(final, "generation_config.json")["eos_token_id"] == [3, 0]
        assert AutoTokenizer.from_pretrained(final).eos_token == "<end>"
    final = run_dir / "two" / "final"
    base = load_weights(tmp_path / "base")
    net: Any = (
        load_adapter(base, final, trainable=False) if between == "keep" else load_weights(final)
    )
    assert _end_tokens(net, tokenizer(), []) == [0, 3]  # sampling stops where training did


# --- what cannot be saved ---

UNSAVABLE = {
    "sampling without sampling": {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    "a temperature of zero": {"do_sample": False, "temperature": 0.0},
    "beams without beams": {"num_beams": 1, "length_penalty": 2.0},
    "a negative pad token": {"pad_token_id": -1},
    "outputs that nobody returns": {"output_scores": True},
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_a_generation_config_that_would_not_be_saved_is_repaired(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = recipe(tmp_path)
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({**UNSAVABLE[case], "eos_token_id": 0, "top_k": 50}))
    from rpo_trainer.chain.check import check_recipe

    lines = "\n".join(check_recipe(tiny.load(tmp_path, loaded), tmp_path / "run"))
    with caplog.at_level(logging.WARNING, "rpo_trainer"):
        run_dir = run_chain(tiny.load(tmp_path, loaded), tmp_path / "run")
    names = set(UNSAVABLE[case]) - {"do_sample", "num_beams"}
    for name in names:
        assert f"{name}={UNSAVABLE[case][name]}" in lines and f"{name}=" in caplog.text
    written = stored(run_dir / "two" / "final", "generation_config.json")
    assert names.isdisjoint(written) and written["eos_token_id"] == [3, 0]


@pytest.mark.parametrize(
    "text", ["{", '{"num_return_sequences": 3}', '{"early_stopping": "perhaps"}', "[]"]
)
def test_a_generation_config_that_cannot_be_used_is_refused_early(
    text: str, tmp_path: Path
) -> None:
    loaded = recipe(tmp_path)
    (tmp_path / "base" / "generation_config.json").write_text(text)
    with raises("model.unreadable-generation-config", Problems):
        run_chain(tiny.load(tmp_path, loaded), tmp_path / "run")
    assert not (tmp_path / "run" / "one").exists()


def test_a_tokenizer_that_cannot_be_saved(tmp_path: Path) -> None:
    broken = tokenizer()
    broken.init_kwargs["extra"] = {1, 2}  # not JSON
    with raises("model.cannot-save", ModelError) as error:
        SFTTrainer(
            model(), args=args(SFTConfig, tmp_path), train_dataset=completions(),
            processing_class=broken,
        )  # fmt: skip
    assert "tokenizer" in error.value.what


def test_a_config_that_cannot_be_saved(tmp_path: Path) -> None:
    net = model()
    net.config.note = {"a set": {1, 2}}
    with raises("model.cannot-save", ModelError) as error:
        SFTTrainer(
            net, args=args(SFTConfig, tmp_path), train_dataset=completions(),
            processing_class=tokenizer(),
        )  # fmt: skip
    assert "config" in error.value.what


def test_parameters_that_share_memory_unsaid(tmp_path: Path) -> None:
    net = model()
    net.model.layers[0].mlp.up_proj.weight = net.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight, .*layers\.1"):
        SFTTrainer(
            net, args=args(SFTConfig, tmp_path), train_dataset=completions(),
            processing_class=tokenizer(),
        )  # fmt: skip
    tied = model(tie_word_embeddings=True)
    SFTTrainer(
        tied, args=args(SFTConfig, tmp_path), train_dataset=completions(),
        processing_class=tokenizer(),
    )  # fmt: skip


def test_a_directory_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rpo_trainer.models.saved_files.tempfile.TemporaryDirectory", full)
    with pytest.raises(RunError, match="No space left on device") as error:
        SFTTrainer(
            model(), args=args(SFTConfig, tmp_path), train_dataset=completions(),
            processing_class=tokenizer(),
        )  # fmt: skip
    assert error.value.where == str(tmp_path)


def test_the_saved_model_generates_to_its_end(tmp_path: Path) -> None:
    net = model()
    trainer = SFTTrainer(
        net, args=args(SFTConfig, tmp_path / "out", max_steps=60, learning_rate=2e-2),
        train_dataset=chats(), processing_class=tokenizer(END + PROMPT),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "final")
    ids = theirs.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        made = again.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert made[-1] == 3 and len(made) < 20
