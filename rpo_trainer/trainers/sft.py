"""Supervised fine-tuning on assistant turns only."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from rpo_trainer.errors import DataError
from rpo_trainer.step.batch import PackedBatch
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.config import SFTConfig
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.neftune import Noise, example_lengths
from rpo_trainer.trainers.terms import StepResult, Term


class SFTTrainer(BaseTrainer):
    """−log π of the trained tokens, averaged over all of them in the global batch.

    Rows: `messages`, or `prompt` and `response` (or `completion`), or tokenised already. Every assistant
    turn is trained, its end token included, and nothing else.

    Args:
        model: a causal language model, or a name or path to load one from.
        args: an `SFTConfig`.
        train_dataset: a `datasets.Dataset` or a list of rows.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer; None: the one the model was loaded with.
        peft_config: trains an adapter in place of the weights.
        callbacks: `transformers.TrainerCallback`s.
        optimizers: (optimizer, scheduler) in place of those of `args`.
    """

    config_class = SFTConfig
    row_kind: Literal["sft", "pair"] = "sft"
    _noise: Noise | None = None

    def _examples(
        self, dataset: Any, tokenizer: Any, args: BaseConfig, name: str
    ) -> Examples | None:
        examples = super()._examples(dataset, tokenizer, args, name)
        if examples is not None and (wrong := int((examples.response_counts() != 1).sum())):
            raise DataError(
                f"{wrong} rows of the {name} data have more or less than one response",
                why="supervised fine-tuning takes one response a row",
                fix="give rows with messages, or with prompt and response",
            )
        return examples

    @classmethod
    def metric_names(cls, args: Any, examples: Examples | None = None) -> set[str]:
        """The metrics of an evaluation."""
        return {"loss", "loss/sft"}

    def before_forward(self, inputs: PackedBatch) -> None:
        """Noise on the embeddings is scaled by the examples of this forward."""
        if self._noise is not None:
            self._noise.lengths = example_lengths(inputs.model_inputs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`BaseTrainer.train`, with NEFTune's noise where `neftune_noise_alpha` is set."""
        alpha = self.args.neftune_noise_alpha
        if alpha is None:
            return super().train(*args, **kwargs)
        self._noise = Noise(alpha)
        with self._noise.on(self.model.get_input_embeddings()):
            return super().train(*args, **kwargs)

    def losses(self, sums: Tensor, batch: PackedBatch) -> StepResult:
        """The negative log-likelihood of each example, per trained token of the global batch."""
        return StepResult(terms={"sft": Term(-sums, per="tokens")}, metrics={})
