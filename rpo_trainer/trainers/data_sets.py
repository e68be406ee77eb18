"""The data sets of a trainer, tokenized and checked against its model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from rpo_trainer.errors import DataError
from rpo_trainer.models.unwrap import transformers_model
from rpo_trainer.step.batch import Layout
from rpo_trainer.step.router_loss import configured_coefficients
from rpo_trainer.trainers import fits
from rpo_trainer.trainers.argument_checks import require_best_metric
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.given_rows import is_plain_text, tokenized_rows

if TYPE_CHECKING:
    from rpo_trainer.data import Audit

logger = logging.getLogger(__name__)


class DataSets:
    """The data sets passed to a trainer's constructor; `evaluate` may get others.

    Args:
        model: the model that is trained.
        train, evaluation: rows or examples; `evaluation` may be a dict of several by name.
        prepare: maps rows and a name (`train`, `eval` or `eval_NAME`) to examples, and None to None.

    Attributes:
        train, evaluation: the examples.
        longest: tokens of the longest text; None if the layout of the model does not depend on it.

    Raises:
        DataError: see `tokenized`.
        ModelError: the model has no weights for a token or position of the examples.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        evaluation: Any,
        prepare: Callable[[Any, str], Examples | None],
    ) -> None:
        self.train = prepare(train, "train")
        self.evaluation: Any = (
            {name: prepare(rows, f"eval_{name}") for name, rows in evaluation.items()}
            if isinstance(evaluation, dict)
            else prepare(evaluation, "eval")
        )
        fits.check_all_fit(model, self.train, self.evaluation)
        self.longest = fits.longest_text(model, self.train, self.evaluation)

    def require_best_metric(
        self, model: nn.Module, args: Any, names: Callable[[Any, Examples], set[str]]
    ) -> None:
        """Raise RecipeError if `metric_for_best_model` is not a metric of the evaluation.

        Args:
            names: maps config and examples to the names of their metrics.
        """
        if self.evaluation is None:
            return
        sets = self.evaluation if isinstance(self.evaluation, dict) else {None: self.evaluation}
        metrics = {name: names(args, examples) for name, examples in sets.items()}
        coefficients = configured_coefficients(transformers_model(model).config)
        require_best_metric(args, metrics, router_loss=bool(coefficients))

    def require_fit(
        self, model: nn.Module, examples: Examples, layout: Layout, *, checked: bool
    ) -> None:
        """Check evaluation examples against the model and the layout.

        Args:
            checked: whether they were checked against the weights of the model before.
        """
        if not checked:
            fits.check_fit(model, examples, "eval")
        fits.check_layout(model, examples, layout, self.longest)


def tokenized(
    dataset: Any,
    tokenizer: Any,
    args: BaseConfig,
    *,
    name: str,
    kind: Literal["sft", "pair", "rating"],
    audits: dict[str, Audit],
    **options: Any,
) -> Examples:
    """Tokenize the rows of a data set; dropped rows are counted and logged.

    Args:
        name: `train`, `eval` or `eval_NAME`, for messages.
        kind: kind of the rows.
        audits: the audit is added under `name`.
        options: further arguments of `prepare_dataset`.

    Raises:
        DataError: a row is invalid, or no rows are left.
    """
    from rpo_trainer.data import Audit
    from rpo_trainer.trainers.stored_examples import stored_examples

    audit = audits[name] = Audit()
    max_length = sys.maxsize if args.max_length is None else args.max_length
    rows = tokenized_rows(
        dataset, kind, max_length=max_length, truncation=args.truncation, audit=audit
    )
    if rows is None:
        special_tokens = args.special_tokens
        if special_tokens is None and kind == "sft" and is_plain_text(dataset):
            special_tokens = "parse"
        rows = stored_examples(
            dataset,
            tokenizer,
            name=name,
            audit=audit,
            kind=kind,
            max_length=max_length,
            truncation=args.truncation,
            special_tokens=special_tokens,
            chat_template_kwargs=args.chat_template_kwargs,
            **options,
        )
    if args.process_index == 0:
        audit.log(logger, f"{name}_dataset", f"{name} data: ")
    if not len(rows):
        raise DataError(
            f"no example of the {name} data is left",
            code="data.empty",
            why="; ".join(audit.summary_lines()) or "the data set is empty",
            fix="correct the rows that were dropped, or change what drops them (max_length, truncation)",
        )
    return Examples(rows)
