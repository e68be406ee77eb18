"""Our configs have TRL's defaults, or a reason next to the field; the log lists the differences."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from rpo_trainer.trainers import DPOConfig, RewardConfig, RPOConfig, SFTConfig, SFTTrainer
from rpo_trainer.trainers.argument_status import by_name, defaults_of
from rpo_trainer.trainers.setup import _warn_once
from tests.trainers.plain import make_rows


def reasons(config: Any) -> dict[str, str]:
    found = {name: differs.reason for name, differs in config.trl_defaults.items()}
    assert found.keys() <= {field.name for field in dataclasses.fields(config)}
    return found


@pytest.mark.parametrize("ours", [SFTConfig, DPOConfig, RewardConfig])
def test_defaults_are_trls(ours: type) -> None:
    trl = pytest.importorskip("trl")
    own, theirs = defaults_of(ours), defaults_of(getattr(trl, ours.__name__))
    foreign = by_name(ours.trl_table)  # None by default
    assert {own[name] for name in foreign} == {None}
    own = {name: value for name, value in own.items() if name not in foreign}
    differ = {name for name in own.keys() & theirs.keys() if own[name] != theirs[name]}
    assert differ - reasons(ours).keys() == set()
    needless = {name for name in reasons(ours) if name in theirs and name not in differ}
    assert needless == set()


def test_rpo_follows_dpo() -> None:
    dpo, rpo = defaults_of(DPOConfig), defaults_of(RPOConfig)
    differ = {name for name in dpo.keys() & rpo.keys() if dpo[name] != rpo[name]}
    assert differ == {"loss_type"}


def test_what_differs_is_a_warning_once_where_it_has_its_default(
    start: Any,
    make_config: Any,
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    _warn_once.cache_clear()
    parsed = HfArgumentParser(SFTConfig)
    (from_parser,) = parsed.parse_args_into_dataclasses(
        ["--output_dir=x", "--use_cpu", "--report_to=none", "--max_steps=1", "--save_strategy=no"]
    )
    for args, truncation in (
        (make_config("sft"), True), (make_config("sft", truncation="truncate"), False), (from_parser, None),
    ):  # fmt: skip
        caplog.clear()
        SFTTrainer(
            copy.deepcopy(start), args, make_rows(0, (1,) * 4), processing_class=tokenizer
        ).train()
        said = [r for r in caplog.records if r.getMessage().startswith("defaults that")]
        assert len(said) == (truncation is not None)  # the third is like the first
        for record in said:
            assert record.levelno == logging.WARNING and "assistant turns" in record.message
            assert ("truncation=drop" in record.message) == truncation
            assert "logging_nan_inf_filter=False" in record.message
            assert "learning_rate" not in record.message
