"""Data and tokenizer of the quickstart, generated without a download.

Two tasks with the same small questions, each with a known answer:

* `quickstart/code`: Python expressions to evaluate, `'abc'[::-1] -> `
* `quickstart/general`: plain instructions, `reverse abc: `

The training rows of `code` have correct answers. Those of `general` are written by a *weak teacher*, which is
correct with probability `TEACHER_ACCURACY`, so that the preference stages have something to improve.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from rpo_trainer.errors import RecipeError, suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CODE, GENERAL = "quickstart/code", "quickstart/general"
SPLITS = ("train", "preference", "heldout")
TEACHER_ACCURACY = 0.6

# A hash of its text assigns every prompt to one split: 60%, 30%, 10%.
_SPLIT_OF_BUCKET = ("train",) * 6 + ("preference",) * 3 + ("heldout",)
# Few letters and small numbers, so that a model with a million parameters can be trained in minutes.
_LETTERS = "abcdefghij"
# Consecutive draws without a new prompt after which a split counts as exhausted.
_MISSES = 2000


class _Operation(NamedTuple):
    """One kind of question: its text in each task, its arguments, its answer."""

    code: str
    general: tuple[str, ...]
    draw: Callable[[Random], tuple[Any, ...]]
    solve: Callable[..., str]


def _word(rng: Random) -> tuple[str]:
    return ("".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 5))),)


def _two_numbers(rng: Random) -> tuple[int, int]:
    return rng.randint(1, 50), rng.randint(1, 9)


def _number(rng: Random) -> tuple[int]:
    return (rng.randint(1, 99),)


_OPERATIONS = (
    _Operation("'{0}'[::-1]", ("reverse {0}", "{0} backwards"), _word, lambda w: w[::-1]),
    _Operation(
        "''.join(sorted('{0}'))",
        ("sort {0}", "put {0} in order"),
        _word,
        lambda w: "".join(sorted(w)),
    ),
    _Operation("'{0}'.upper()", ("{0} in capitals",), _word, lambda w: w.upper()),
    _Operation("'{0}' * 2", ("repeat {0}", "write {0} twice"), _word, lambda w: w * 2),
    _Operation("'{0}'[1:]", ("{0} without the first letter",), _word, lambda w: w[1:]),
    _Operation("max('{0}')", ("latest letter of {0}",), _word, max),
    _Operation(
        "{0} + {1}",
        ("add {0} and {1}", "{0} plus {1}"),
        _two_numbers,
        lambda a, b: str(a + b),
    ),
    _Operation("len('{0}')", ("length of {0}", "letters in {0}"), _word, lambda w: str(len(w))),
    _Operation("2 * {0}", ("double {0}", "twice {0}"), _number, lambda n: str(2 * n)),
)


def code_rows(split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of `quickstart/code` (see `load_task`): Python expressions with correct answers."""
    return _rows(CODE, _expression, None, split, size, seed)


def general_rows(split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of `quickstart/general` (see `load_task`): instructions, answered by the weak teacher."""
    return _rows(GENERAL, _instruction, _weak_teacher, split, size, seed)


def _rows(
    name: str,
    ask: Callable[[_Operation, tuple[Any, ...], Random], str],
    respond: Callable[[str, tuple[Any, ...], Random], str] | None,
    split: str,
    size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return rows with prompts by `ask` and, in `train`, responses by `respond` (None: correct ones)."""
    require_known("split", split, SPLITS, code="data.unknown-split")
    if size < 1:
        raise RecipeError(
            f"`size` must be at least 1, got {size}",
            code="data.bad-size",
            where=f"task {name}",
            fix="write a number of rows",
        )
    rng = Random(f"{name} {split} {seed}")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    misses = 0
    while len(rows) < size:
        if misses == _MISSES:
            raise RecipeError(
                f"the split has about {len(rows)} different prompts, but `size` is {size}",
                code="data.bad-size",
                where=f"task {name}, split {split}",
                fix="lower `size`, and increase `num_train_epochs` instead",
            )
        operation = rng.choice(_OPERATIONS)
        arguments = operation.draw(rng)
        prompt = ask(operation, arguments, rng)
        if prompt in seen or split_of(prompt) != split:
            misses += 1
            continue
        misses = 0
        seen.add(prompt)
        truth = operation.solve(*arguments)
        row = {"id": f"{name}/{split}/{seed}/{len(rows)}", "prompt": prompt}
        if split == "train" and respond is not None:
            row["response"] = respond(truth, arguments, rng)
        elif split != "preference":
            row["response"] = truth
        rows.append({**row, "ground_truth": truth})
    return rows


def split_of(prompt: str) -> str:
    """Return the split of a prompt, a function of its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return _SPLIT_OF_BUCKET[int.from_bytes(digest[:8], "big") % len(_SPLIT_OF_BUCKET)]


def _expression(operation: _Operation, arguments: tuple[Any, ...], rng: Random) -> str:
    return operation.code.format(*arguments) + " -> "


def _instruction(operation: _Operation, arguments: tuple[Any, ...], rng: Random) -> str:
    return rng.choice(operation.general).format(*arguments) + ": "


def _weak_teacher(truth: str, arguments: tuple[Any, ...], rng: Random) -> str:
    if rng.random() < TEACHER_ACCURACY:
        return truth
    return rng.choice(_wrong_answers(truth, str(arguments[0])))


def _wrong_answers(truth: str, argument: str) -> list[str]:
    """Return plausible wrong answers: off by 1 or 10, letters swapped, the last one missing, the input."""
    if truth.isdigit():
        number = int(truth)
        found = [str(number + step) for step in (-10, -1, 1, 10) if number + step >= 0]
    else:
        found = [
            truth[:i] + truth[i + 1] + truth[i] + truth[i + 2 :] for i in range(len(truth) - 1)
        ]
    found += [truth[:-1], argument]
    return [slip for slip in found if slip not in ("", truth)]


def require_known(what: str, name: str, known: tuple[str, ...], *, code: str) -> None:
    """Raise RecipeError with this code if a task or split is unknown."""
    if name not in known:
        raise RecipeError(
            f"unknown {what} '{name}' of the built-in data{suggestion(name, known)}",
            code=code,
            where=what,
            fix=f"use one of: {', '.join(known)}",
        )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with 100 tokens: 96 characters (printable ASCII and newline), and 4 special ones.

    `<s>` begins a text, `</s>` ends a response, `<pad>` pads, and any other character is `<unk>`. It has no
    chat template.
    """
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    # Byte-pair encoding without merges yields one token per character.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
