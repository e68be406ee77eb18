"""Reference log-probs: values, and when a cached value is used or not."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rpo_trainer.data.example_view import ExampleView, example_view
from rpo_trainer.step import reference
from rpo_trainer.step.forward import install
from rpo_trainer.step.reference import cached_logprobs, dataset_logprobs, model_key
from rpo_trainer.step.reference_cache import ReferenceCache, response_key, response_keys
from tests.small_models import make_model
from tests.trainers.plain import make_rows, plain_sums

ROWS = make_rows(0, (2, 3, 2, 5, 2, 2, 4, 2, 3, 2))
FIRST_KEY = (2593973650149420138, 6612356335525143378)
RESPONSES = sum(len(row["response_ids"]) for row in ROWS)


@pytest.fixture(autouse=True, scope="module")
def light():
    """One thread for tiny matrices, and no garbage collection over all imported libraries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    found = make_model()
    install(found)
    return found


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of responses in each forward of the reference pass."""
    counts: list[int] = []
    own = reference._Pass.__call__

    def counting(self: Any, examples: Any) -> Any:
        counts.append(sum(len(example["response_ids"]) for example in examples))
        return own(self, examples)

    monkeypatch.setattr(reference._Pass, "__call__", counting)
    monkeypatch.setattr(reference, "_verify", lambda *args: None)
    return counts


def compute(
    model: Any, rows: Any, folder: Path | None = None, **settings: Any
) -> list[list[float]]:
    values = dataset_logprobs(
        model, rows, layout="shared", cache=ReferenceCache(folder), **settings
    )
    return list(values)


# --- values ---


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_values_are_plain_log_probs(layout, batch_tokens):
    model = make_model()
    rows = make_rows(1, (2, 3, 5, 2), spans=True)
    with torch.no_grad():
        expected = [plain_sums(model, row).tolist() for row in rows]
    install(model, layout=layout)
    values = dataset_logprobs(
        model, rows, layout=layout, cache=ReferenceCache(None), batch_tokens=batch_tokens
    )
    for a, b in zip(values, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_the_model_is_put_in_eval_mode_and_back():
    model = make_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    install(model)
    model.train()
    values = compute(model, ROWS)
    assert model.training
    assert values == compute(model, ROWS)


def test_forwards_keep_to_the_token_budget(model, computed):
    compute(model, ROWS, batch_tokens=60)
    assert len(computed) > 3 and sum(computed) == RESPONSES


# --- cached values are used ---


def test_stored_values_are_the_same_and_nothing_is_computed(model, tmp_path, computed):
    first = compute(model, ROWS, tmp_path)
    assert sum(computed) == RESPONSES
    computed.clear()
    assert compute(model, ROWS, tmp_path) == first
    assert compute(model, ROWS[::-1], tmp_path) == first[::-1]
    assert compute(model, ROWS[3:6], tmp_path) == first[3:6]
    assert computed == []


def test_of_a_larger_mix_only_the_new_rows_are_computed(model, tmp_path, computed):
    compute(model, ROWS[:6], tmp_path)
    computed.clear()
    values = compute(model, ROWS[4:], tmp_path)
    assert sum(computed) == sum(len(row["response_ids"]) for row in ROWS[6:])
    for a, b in zip(values, compute(model, ROWS[4:]), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_a_response_added_to_a_prompt_is_computed(model, tmp_path, computed):
    compute(model, ROWS, tmp_path)
    computed.clear()
    more = copy.deepcopy(ROWS[0])
    more["response_ids"].append([7, 8, 9])
    more["response_mask"].append([1, 1, 1])
    compute(model, [more], tmp_path)
    assert sum(computed) == 3


def test_every_token_and_mask_counts():
    keys = {
        response_key([1, 2], [3, 4], [1, 1]),
        response_key([1], [2, 3, 4], [1, 1, 1]),
        response_key([1, 2, 3], [4], [1]),
        response_key([2, 1], [3, 4], [1, 1]),
        response_key([1, 2], [4, 3], [1, 1]),
        response_key([1, 2], [3, 4], [0, 1]),
        response_key([1, 2], [3], [1]),
        # The same numbers in a row, split elsewhere.
        response_key([1], [2, 1], [1, 1]),
        response_key([1, 2, 1], [1], [1]),
    }
    assert len(keys) == 9
    assert response_key([1, 2], [3, 4], [1, 1]) in keys


@pytest.mark.parametrize("kind", [np.int32, np.int8, np.int64])
def test_keys_from_buffers_are_those_of_lists_and_of_earlier_versions(kind):
    rows = make_rows(3, (2, 3, 1, 4), spans=True)
    rows[1]["response_ids"][0], rows[1]["response_mask"][0] = [], []
    masks = [[np.array(mask, dtype=kind) for mask in row["response_mask"]] for row in rows]
    view = example_view([{**row, "response_mask": m} for row, m in zip(rows, masks, strict=True)])
    expected = [
        response_key(row["prompt_ids"], ids, mask)
        for row in rows
        for ids, mask in zip(row["response_ids"], row["response_mask"], strict=True)
    ]
    assert list(map(tuple, response_keys(view).tolist())) == expected
    # As written by the first version: caches on disk stay valid.
    assert response_key([1, 2, 3], [4, 5], [1, 0]) == FIRST_KEY
    assert response_key(np.array([1, 2, 3]), np.array([4, 5]), np.array([1, 0], kind)) == FIRST_KEY


def test_a_cache_is_a_dict_of_its_newest_values(tmp_path):
    rng = np.random.default_rng(0)
    keys = [
        (int(low), int(high)) for low, high in rng.integers(-9, 9, (300, 2))
    ]  # many equal halves
    expected: dict[Any, float] = {}
    cache = ReferenceCache(tmp_path)
    for start in range(0, 300, 60):
        part = {key: float(start + i) for i, key in enumerate(keys[start : start + 60])}
        cache.add(part)
        expected |= part
        assert dict(cache) == expected and len(cache) == len(expected)
    wanted = np.array([*keys, *((n, 100) for n in range(-10, 10))], dtype=np.int64)
    values, known = cache.lookup(wanted)
    assert known.tolist() == [True] * 300 + [False] * 20
    assert values[:300].tolist() == [expected[key] for key in keys]
    assert (0, 100) not in cache and cache.get((0, 100)) is None
    cache.forget()
    assert dict(cache) == {} and parts(tmp_path) == []
    assert not cache.lookup(wanted)[1].any()


def test_cached_values_alone_are_read_without_a_model(model, tmp_path):
    first = compute(model, ROWS[:6], tmp_path)
    cache = ReferenceCache(tmp_path)
    assert list(cached_logprobs(ROWS[:6], cache)) == first
    assert cached_logprobs(ROWS, cache) is None


def test_each_example_is_read_once(model, monkeypatch):
    view, read = example_view(ROWS), []
    own = ExampleView.__getitem__
    monkeypatch.setattr(
        ExampleView, "__getitem__", lambda *args: read.append(args[1]) or own(*args)
    )
    compute(model, view)
    assert sorted(read) == list(range(len(ROWS)))


def test_a_killed_pass_resumes(model, tmp_path, computed, monkeypatch):
    monkeypatch.setattr(reference, "_ROWS_PER_PART", 4)
    own, calls = reference.token_logprobs, []

    def dies(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(reference, "token_logprobs", dies)
    with pytest.raises(KeyboardInterrupt):
        compute(model, ROWS, tmp_path, batch_tokens=40)
    kept = len(ReferenceCache(tmp_path))
    assert 4 <= kept < RESPONSES
    computed.clear()
    values = compute(model, ROWS, tmp_path, batch_tokens=40)
    assert sum(computed) == RESPONSES - kept
    for a, b in zip(values, compute(model, ROWS), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize("budget", [40, 60, 8192])
def test_shards_split_what_is_missing_and_join_to_the_same_bits(budget, model, computed):
    expected = compute(model, ROWS, batch_tokens=budget)
    batches = len(computed)
    parts: list[dict[Any, float]] = []
    forwards = []
    for rank in range(2):
        computed.clear()
        with contextlib.suppress(KeyError):  # the other part is missing: nothing was gathered
            compute(
                model, ROWS, batch_tokens=budget, shard=(rank, 2),
                gather=lambda values: parts.append(values) or values,
            )  # fmt: skip
        forwards.append(len(computed))
    # Every rank has a forward in each round, as sharded weights need; an odd one is computed twice.
    assert forwards == [-(-batches // 2)] * 2
    assert len(set(parts[0]) & set(parts[1])) < RESPONSES / 2 or batches == 1
    joined = compute(
        model, ROWS, batch_tokens=budget, shard=(0, 2), gather=lambda values: values | parts[1]
    )
    assert joined == expected


# --- damaged and stale values are not used ---


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "other"])
def test_a_damaged_part_is_computed_again(harm, model, tmp_path, computed, caplog):
    first = compute(model, ROWS, tmp_path)
    (part,) = parts(tmp_path)
    content = bytearray(part.read_bytes())
    if harm == "cut":
        os.truncate(part, len(content) - 3)
    elif harm == "flip":
        content[-2] ^= 1
        part.write_bytes(content)
    elif harm == "empty":
        part.write_bytes(b"")
    else:
        save_file({"something": load_file(part)["keys"]}, part)
    computed.clear()
    assert compute(model, ROWS, tmp_path) == first
    assert sum(computed) == RESPONSES
    assert "is damaged" in caplog.text and "recomputed" in caplog.text
    assert compute(model, ROWS, tmp_path) == first  # and cached again
    assert sum(computed) == RESPONSES


def test_no_single_flipped_byte_gives_a_wrong_value(model, tmp_path):
    compute(model, ROWS[:2], tmp_path)
    (part,) = parts(tmp_path)
    content, good = part.read_bytes(), dict(ReferenceCache(tmp_path))
    for place in range(len(content)):
        part.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        found = dict(ReferenceCache(tmp_path))
        assert found == {} or found == good, place


def test_a_damaged_part_costs_only_its_own_rows(model, tmp_path, computed):
    compute(model, ROWS[:5], tmp_path)
    compute(model, ROWS, tmp_path)
    sizes = {part: len(load_file(part)["keys"]) for part in parts(tmp_path)}
    assert len(sizes) == 2
    part, lost = next(iter(sizes.items()))
    os.truncate(part, 20)
    computed.clear()
    compute(model, ROWS, tmp_path)
    assert sum(computed) == lost


def test_leftovers_of_a_write_are_ignored(model, tmp_path, computed):
    first = compute(model, ROWS, tmp_path)
    (tmp_path / ".part-abc").write_bytes(b"half")
    computed.clear()
    assert compute(model, ROWS, tmp_path) == first and computed == []


def test_wrong_values_are_found_on_load(model, tmp_path, caplog):
    first = compute(model, ROWS, tmp_path)
    cache = ReferenceCache(tmp_path)
    wrong = {key: value + 1.0 for key, value in cache.items()}
    cache.forget()
    assert parts(tmp_path) == []
    ReferenceCache(tmp_path).add(wrong)
    assert dict(ReferenceCache(tmp_path)) == pytest.approx(wrong)
    values = compute(model, ROWS, tmp_path)
    assert "is stale" in caplog.text
    for a, b in zip(values, first, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert max(ReferenceCache(tmp_path).values()) < max(wrong.values())


def test_rounding_within_the_tolerance_is_not_stale(model, tmp_path, caplog):
    compute(model, ROWS, tmp_path)
    cache = ReferenceCache(tmp_path)
    cache.add({key: value + 5e-4 for key, value in cache.items()})
    compute(model, ROWS, tmp_path)
    assert "stale" not in caplog.text
    compute(model, ROWS, tmp_path, tolerance=1e-6)
    assert "stale" in caplog.text


# --- the model's key ---


def lora(model: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        **{"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **settings}
    )
    return get_peft_model(copy.deepcopy(model), config)


def test_key_is_of_the_content():
    a, b = make_model(), make_model()
    assert model_key(a) == model_key(b)
    install(a)  # does not change the key
    a.train()
    a.config._name_or_path = "elsewhere"
    assert model_key(a) == model_key(b)
    with torch.no_grad():
        b.lm_head.weight[3, 5] += 1e-6
    assert model_key(a) != model_key(b)


@pytest.mark.parametrize("part", ["dtype", "config", "arithmetic", "adapter", "buffer"])
def test_key_changes_with_everything_that_changes_the_values(part):
    model = make_model()
    key = model_key(model)
    if part == "dtype":
        assert model_key(model.to(torch.bfloat16)) != key
    elif part == "config":
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}
        assert model_key(model) != key
    elif part == "arithmetic":
        assert model_key(model, arithmetic="torch.bfloat16") != key
    elif part == "adapter":
        keys = {key, model_key(lora(model)), model_key(lora(model, init_lora_weights=True))}
        # The same numbers at another scale.
        keys |= {model_key(lora(model, lora_alpha=32)), model_key(lora(model, use_rslora=True))}
        assert len(keys) == 5
        assert model_key(lora(model)) in keys
    else:
        model.register_buffer("extra", torch.ones(2))
        assert model_key(model) != key


# --- through the trainers ---


@pytest.fixture
def train(tmp_path, computed):
    """Train one step with a shared cache; return the number of responses that the reference model
    computed."""
    from rpo_trainer.data.quickstart import character_tokenizer
    from rpo_trainer.trainers import DPOConfig, DPOTrainer

    tokenizer = character_tokenizer()
    number = iter(range(100))

    def run(rows: Any, model: Any = None, *, peft_config: Any = None, **settings: Any) -> int:
        args = DPOConfig(
            output_dir=str(tmp_path / f"out{next(number)}"), max_steps=1, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
            **{"reference_cache_dir": str(tmp_path / "cache"), "learning_rate": 0.1, **settings},
        )  # fmt: skip
        trainer = DPOTrainer(
            make_model() if model is None else model, args=args, train_dataset=rows,
            processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip
        computed.clear()
        trainer.train()
        return sum(computed)

    return run


PAIRS = make_rows(0, (2,) * 10)


def test_settings_order_and_mix_do_not_matter(train):
    assert train(PAIRS[:8]) == 16
    assert train(PAIRS[:8], learning_rate=1e-4) == 0
    assert train(PAIRS[:8], beta=0.5, loss_type="ipo", sft_loss_weight=1.0) == 0
    assert train(PAIRS[:8], optim="sgd", gradient_accumulation_steps=2, seed=7) == 0
    assert train(PAIRS[7::-1]) == 0
    assert train(PAIRS[2:5]) == 0
    assert train(PAIRS) == 4
    assert train(PAIRS, reference_cache_dir=None) == 20


def test_weights_adapter_tokens_and_arithmetic_matter(train):
    from peft import LoraConfig

    assert train(PAIRS) == 20
    assert train(PAIRS, make_model(seed=1)) == 20
    assert train(PAIRS, peft_config=LoraConfig(target_modules=["q_proj"])) == 20
    assert train(PAIRS, peft_config=LoraConfig(target_modules=["q_proj"])) == 0
    assert train(PAIRS, lora(make_model())) == 20
    assert train(PAIRS, make_model(dtype=torch.bfloat16)) == 20
    assert train(PAIRS, bf16=True) == 20
    assert train(PAIRS, bf16=True) == 0
    changed = copy.deepcopy(PAIRS)
    changed[4]["prompt_ids"][0] += 1
    changed[5]["response_ids"][1][0] += 1
    assert (
        train(changed) == 2 + 2
    )  # if only the second row has changed, the row is recomputed entirely
    assert train(PAIRS) == 0
