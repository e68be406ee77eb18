"""Variables of a chat template: sources, precedence, effect, and warnings about unread ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pytest

from rpo_trainer.cli.options import parse_kwargs
from rpo_trainer.data import Audit, encode_prompt, end_token_ids, load_rows, prepare_dataset
from rpo_trainer.data.adapt_rows import adapt
from rpo_trainer.data.filters import drop_duplicates
from rpo_trainer.data.sources import RawSource
from rpo_trainer.data.template_variables import variables
from rpo_trainer.data.tokenize import audit_prompts
from rpo_trainer.errors import DataError, Problems, RecipeError
from rpo_trainer.recipe import Recipe
from rpo_trainer.recipe.template_kwargs import COLUMN
from tests.raising import raises

# `mode` begins the prompt, `mark` ends a turn, and documents come first.
TEMPLATE = (
    "{% for d in documents or [] %}{{ d.text }}\n{% endfor %}"
    "{% if not mode is defined %}{% set mode = 'none' %}{% endif %}[{{ mode }}]"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|endoftext|>' if mark and m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TALK = [{"role": "user", "content": "The cat"}]
ROWS: dict[str, dict[str, Any]] = {
    "sft": {"messages": [*TALK, {"role": "assistant", "content": "sat"}]},
    "pair": {"prompt": TALK, "chosen": "sat", "rejected": "ran"},
    "rating": {"prompt": TALK, "response": "sat", "score": 1.0},
}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], eos="<|im_end|>", chat_template=TEMPLATE
    )


def prepared(
    rows: list[dict[str, Any]], tokenizer: Any, kind: Any = "sft", **more: Any
) -> list[str]:
    """Prompt and responses of each example as text."""
    more |= {"attributes": ["score"]} if kind == "rating" else {}
    data = prepare_dataset(rows, tokenizer, kind=kind, max_length=1000, **more)
    return [
        "|".join(map(tokenizer.decode, (example["prompt_ids"], *example["response_ids"])))
        for example in data
    ]


@pytest.mark.parametrize("kind", ROWS)
def test_all_responses_of_a_row_are_rendered_with_its_variables(kind: str, tokenizer: Any) -> None:
    rows = [{**ROWS[kind], COLUMN: given} for given in ({"mode": "a"}, {"mode": "b"}, None, {})]
    found = prepared(rows, tokenizer, kind, chat_template_kwargs={"mode": "all", "mark": True})
    assert [text[: text.index("]")] for text in found] == ["[a", "[b", "[all", "[all"]
    responses = found[0].split("|<")[0].count("\n") and found[0].count("<|endoftext|>")
    assert responses == (2 if kind == "pair" else 1)
    assert "<|im_end|>" not in found[0].partition("assistant")[2]
    plain = prepared([ROWS[kind]], tokenizer, kind)
    assert plain[0].startswith("[none]") and "<|endoftext|>" not in plain[0]


def test_training_and_sampling_see_the_same_prompt(tokenizer: Any) -> None:
    given = {"mode": "a", "documents": [{"text": "of <|im_end|> a document"}]}
    for how, parsed in (("text", False), ("parse", True)):
        row = {**ROWS["sft"], COLUMN: given}
        (example,) = prepare_dataset(
            [row],
            tokenizer,
            kind="sft",
            max_length=1000,
            special_tokens=how,  # type: ignore[arg-type]
        )
        ids = encode_prompt(tokenizer, TALK, parsed=parsed, template_kwargs=given)
        assert example["prompt_ids"] == ids
        # Special-token text in a document is read as in the messages.
        assert ids.count(tokenizer.eos_token_id) == 1 + parsed
        assert "of <|im_end|> a document" in tokenizer.decode(ids)


def test_ends_of_responses_follow_the_variables(tokenizer: Any) -> None:
    marked = end_token_ids(tokenizer, {"mark": True})
    assert marked == [*end_token_ids(tokenizer), tokenizer.convert_tokens_to_ids("<|endoftext|>")]


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_row_before_source_before_model(arrow: bool, as_text: bool) -> None:
    own = [{"mode": "row"}, {"a": {"b": [2]}}, None]
    rows = [{**ROWS["sft"], COLUMN: json.dumps(each) if as_text and each else each} for each in own]
    if arrow:  # every object has all keys
        rows = pa.Table.from_pylist(rows).to_pylist()
    raw = RawSource("src", rows, [0, 1, 2], "file", arrow)
    found = adapt(
        raw, kind="sft", audit=Audit(), source_kwargs={"mode": "source", "deep": 1},
        model_kwargs={"mode": "model", "deep": 0, "top": None},
    )  # fmt: skip
    both = {"mode": "source", "deep": 1, "top": None}
    assert [row[COLUMN] for row in found] == [
        {**both, "mode": "row"}, {**both, "a": {"b": [2]}}, both,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("{not JSON", "JSON"), (3, "object"), ([1], "object"), ({"tools": []}, "tools"),
        ({"messages": []}, "messages"), ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"eos_token": "x"}, "eos_token"), ({"a b": 1}, "a b"), ({"documents": "text"}, "documents"),
    ],
)  # fmt: skip
def test_what_no_variable_can_be_is_refused_by_name(given: Any, named: str, tokenizer: Any) -> None:
    with pytest.raises((DataError, Problems)) as error:
        prepared([{**ROWS["sft"], COLUMN: given}, ROWS["sft"]], tokenizer)
    assert COLUMN in str(error.value) and named in str(error.value)
    if isinstance(given, dict):
        model = {"from_config": {"model_type": "llama"}, "tokenizer": "characters"}
        for place in ({"model": {**model, COLUMN: given}}, {"source": {COLUMN: given}}):
            source = {"path": "x.jsonl", **place.get("source", {})}
            stage = {"name": "s", "kind": "sft", "data": {"train": [source]}, "max_steps": 1}
            with pytest.raises(ValueError, match=named):
                Recipe.model_validate({"model": model, "stages": [stage], **place})


def test_variables_that_nothing_reads(tokenizer: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    with raises("template.unread-variable", RecipeError, where=f"{COLUMN}.mod") as error:
        prepared([ROWS["sft"]], tokenizer, chat_template_kwargs={"mod": 1})
    assert "`mode`" in str(error.value.fix)
    bare = make_tokenizer(["</s>"], eos="</s>")
    with raises("template.missing", RecipeError):
        prepared([{"prompt": "a", "response": "b"}], bare, chat_template_kwargs={"mode": 1})
    # Variables of rows are counted, including all of text rows; those of the model apply to messages only.
    rows = [{**ROWS["sft"], COLUMN: {"mod": n, "mode": n}} for n in range(3)]
    text = {"prompt": "a", "response": "b"}
    audit = Audit()
    prepared(rows, tokenizer, audit=audit)
    prepared([text], tokenizer, audit=audit, chat_template_kwargs={"mode": 1})
    prepared([{**text, COLUMN: {"mode": 1}}], tokenizer, audit=audit)
    counts = {n.split("`")[1]: c.count for n, c in audit.warnings.items() if COLUMN in n}
    assert counts == {"mod": 3, "mode": 1}
    assert all(level == logging.WARNING for level, line in audit.messages() if COLUMN in line)
    prompts = Audit()
    raw = RawSource("src", [{"prompt": TALK, COLUMN: {"mod": 1}}], [0], "file")
    audit_prompts(
        adapt(raw, kind="prompt", audit=prompts), tokenizer, prompts, refuse_special_text=True
    )
    assert any("`mod`" in name for name in prompts.warnings)


def test_a_recipe_hands_its_variables_to_every_source(jsonl: Any, tmp_path: Path) -> None:
    name = jsonl([ROWS["pair"], {**ROWS["pair"], COLUMN: {"mode": "row"}}])
    source = {"path": name, COLUMN: {"mode": "source"}}
    preferences = {"preferences": [{"path": name}]}
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": "x", COLUMN: {"mode": "model", "mark": True}},
            "eval": preferences,
            "stages": [
                {
                    "name": "dpo", "kind": "dpo", "beta": 0.1, "learning_rate": 1e-5, "max_length": 9,
                    "global_batch_size": 1, "max_steps": 1, "eval": preferences,
                    "data": {"train": [source], "eval": [{"path": name}]},
                }
            ],
        }
    )  # fmt: skip
    wanted = {"stages.dpo.data.train.0": "source"}
    sources = dict(recipe.sources())
    assert set(sources) == {
        "stages.dpo.data.train.0", "stages.dpo.data.eval.0", "eval.preferences.0",
        "stages.dpo.eval.preferences.0",
    }  # fmt: skip
    for key, spec in sources.items():
        rows = load_rows([spec], kind="pair", base_dir=tmp_path, audit=Audit(), seed=0)
        modes = [(row[COLUMN]["mode"], row[COLUMN]["mark"]) for row in rows]
        assert modes == [(wanted.get(key, "model"), True), ("row", True)]
    assert recipe.model_dump()["eval"]["preferences"][0][COLUMN] is None  # set once in a recipe


def test_equal_prompts_with_other_variables_are_two(tokenizer: Any) -> None:
    rows = [
        {"id": str(n), "prompt": TALK, COLUMN: given}
        for n, given in enumerate([{"mode": 1}, {"mode": 2}, {"mode": 1}])
    ]
    assert [row["id"] for row in drop_duplicates(rows, "exact", Audit())] == ["0", "1"]


def test_variables_are_found_in_a_template(tokenizer: Any) -> None:
    assert variables(tokenizer) == {
        "mode",
        "mark",
        "documents",
        "messages",
        "add_generation_prompt",
    }


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("{{ x }}", True),
        ("{% set x = x | default('a') %}{{ x }}", True),
        ("{% if x is not defined %}{% set x = 1 %}{% endif %}{{ x }}", True),
        ("{% set x = 1 %}{{ x }}", False),
        ("{% if yes %}{% set x = 1 %}{% else %}{% set x = 2 %}{% endif %}{{ x }}", False),
        ("{% if no %}{% set x = 1 %}{% endif %}{{ x }}", True),
        ("{% if no %}{% set x = 1 %}{% elif no %}{% set x = 2 %}{% endif %}{{ x }}", True),
        ("{% if yes %}{% set x = 1 %}{% else %}{{ raise_exception('') }}{% endif %}{{ x }}", False),
        ("{% for x in [1] %}{{ x }}{% endfor %}", False),
        ("{% for x in [1] %}{{ x }}{% endfor %}{{ x }}", True),
        ("{% for a in [1] %}{% set x = a %}{{ x }}{% endfor %}", False),
        ("{% for a in [1] %}{% set x = a %}{% endfor %}{{ x }}", True),
        ("{% for a in [1, 2] %}{{ x if a == 2 }}{% set x = a %}{% endfor %}", True),
        ("{% for a in [1] if a == x %}{{ a }}{% else %}b{% endfor %}", True),
        ("{% for x in [1] if x %}{{ loop.index }}{% endfor %}", False),
        ("{% for a in [1, 2] %}{% if a == 1 %}{% continue %}{% else %}{% set x = a %}{% endif %}{{ x }}"
         "{% endfor %}", False),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}", False),
        ("{% macro f(a, b=x) %}{{ b }}{% endmacro %}{{ f(2) }}", True),
        ("{% macro f() %}{{ x }}{% endmacro %}{{ f() }}", True),
        ("{% macro f() %}{{ x() }}{% endmacro %}{% macro x() %}b{% endmacro %}{{ f() }}", False),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ {'x': 1}.x }}", False),
        ("{% set x %}b{% endset %}{{ x }}", False),
        ("{% set a %}{{ x }}{% endset %}{{ a }}", True),
        ("{% with x = 1 %}{{ x }}{% endwith %}", False),
        ("{% with x = x %}{{ x }}{% endwith %}", True),
        ("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}", False),
        ("{% generation %}{% set x = 1 %}{% endgeneration %}{{ x }}", True),
        ("{% set x, a = 1, 2 %}{{ x }}", False),
        ("{% filter upper %}{{ x }}{% endfilter %}", True),
    ],
)  # fmt: skip
def test_a_name_is_a_variable_where_its_value_can_change_the_text(
    template: str, read: bool, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(["</s>"], eos="</s>", chat_template=template)
    texts = {
        tokenizer.apply_chat_template(TALK, tokenize=False, yes=True, no=False, **given)
        for given in ({}, {"x": 1.5}, {"x": 1})
    }
    assert (len(texts) > 1) == read  # behavior of Jinja
    assert ("x" in variables(tokenizer)) == read
    assert variables(tokenizer) <= {"x", "yes", "no"}


def test_variables_of_the_command_line() -> None:
    words = ["a=false", "b=low", "c.d=[1, 2]"]
    assert parse_kwargs(words) == {"a": False, "b": "low", "c": {"d": [1, 2]}}
    assert parse_kwargs([]) is None
    with pytest.raises((RecipeError, Problems), match="--kwargs"):
        parse_kwargs(["a", "tools=1"])


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("enable_thinking", "--kwargs enable_thinking"), ("a=", "--kwargs a="), ("=b", "--kwargs =b"),
        ("a=[", "--kwargs a=["), ("tools=1", "--kwargs.tools"), ("documents=a", "--kwargs.documents"),
        ("b.c=1", "--kwargs b.c=1"),
    ],
)  # fmt: skip
def test_a_word_of_the_command_line_that_sets_nothing(word: str, where: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_kwargs([*(["b=1"] if word.startswith("b.") else []), word])
    found = error.value
    assert found.where == where
    said = f"{found.why} {found.fix}"
    assert "recipe" not in said and "stages" not in said
    assert ("enable_thinking=false" in said) == (not where.startswith("--kwargs."))


def test_special_text_of_documents_stays_itself_where_a_variable_adds_tokens(
    make_tokenizer: Any,
) -> None:
    mark = "<|longer_than_all_special_tokens|>"
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], eos="<|im_end|>",
        chat_template="{{ '" + mark + "' if more }}" + TEMPLATE,
    )  # fmt: skip
    tokenizer.add_tokens([mark])  # text in the data, unless the template writes it
    given = {"more": True, "documents": [{"text": f"of <|im_end|> and {mark}"}]}
    (text,) = prepared([{**ROWS["sft"], COLUMN: given}], tokenizer)
    assert text.startswith(f"{mark}of <|im_end|> and {mark}\n[none]")
