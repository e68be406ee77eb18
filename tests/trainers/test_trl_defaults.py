"""Our configs have TRL's defaults, or a reason beside the field; the log says what differs."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any

import pytest

from rpo_trainer.trainers import DPOConfig, RewardConfig, RPOConfig, SFTConfig, SFTTrainer
from rpo_trainer.trainers.settings import defaults_of
from tests.trainers.plain import make_rows


def reasons(config: type) -> dict[str, str]:
    return {
        field.name: field.metadata["reason"]
        for field in dataclasses.fields(config)
        if field.metadata.get("reason")
    }


@pytest.mark.parametrize("ours", [SFTConfig, DPOConfig, RewardConfig])
def test_defaults_are_trls(ours: type) -> None:
    trl = pytest.importorskip("trl")
    own, theirs = defaults_of(ours), defaults_of(getattr(trl, ours.__name__))
    differ = {name for name in own.keys() & theirs.keys() if own[name] != theirs[name]}
    assert differ - reasons(ours).keys() == set()
    needless = {name for name in reasons(ours) if name in theirs and name not in differ}
    assert needless == set()


def test_rpo_follows_dpo() -> None:
    dpo, rpo = defaults_of(DPOConfig), defaults_of(RPOConfig)
    differ = {name for name in dpo.keys() & rpo.keys() if dpo[name] != rpo[name]}
    assert differ == {"loss_type"}


def test_what_differs_is_said_once_where_the_caller_has_not_set_it(
    start: Any, make_config: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    said = []
    for settings in ({}, {"truncation": "drop", "logging_nan_inf_filter": False}):
        caplog.clear()
        args = make_config("sft", **settings)
        rows = make_rows(0, (1,) * 4)
        with caplog.at_level(logging.INFO, logger="rpo_trainer"):
            SFTTrainer(copy.deepcopy(start), args, rows, processing_class=tokenizer).train()
        (line,) = [r.message for r in caplog.records if r.message.startswith("defaults that")]
        said.append(line)
    assert "truncation=drop" in said[0] and "logging_nan_inf_filter=False" in said[0]
    assert "truncation" not in said[1] and "assistant turns" in said[1]
    assert "learning_rate" not in said[0]
