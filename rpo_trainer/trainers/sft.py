"""Supervised fine-tuning on assistant turns, optionally with NEFTune noise.

NEFTune (arXiv 2310.05914) adds U(−1, 1) · α / √(L·H) to the embedding of a token, where L is the length of
its example and H the hidden size. transformers uses the length of the row for L, which is wrong for packed
rows.

Shapes: `T` tokens of a packed row, `R` rows of length `L` when padded, `H` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rpo_trainer.errors import DataError
from rpo_trainer.step.batch import ModelInputs, PackedBatch
from rpo_trainer.trainers.base import BaseTrainer
from rpo_trainer.trainers.base_config import BaseConfig
from rpo_trainer.trainers.config import SFTConfig
from rpo_trainer.trainers.examples import Examples
from rpo_trainer.trainers.given_rows import formatted_rows, text_rows
from rpo_trainer.trainers.step_result import StepResult, Term


class SFTTrainer(BaseTrainer):
    """Minimizes −log π of the trained tokens, averaged over all of them in the global batch.

    Rows: `messages`, or `prompt` and `response` (or `completion`), or tokenized rows. All assistant turns are
    trained, with their end tokens, and nothing else.

    Args:
        model: a causal language model, or its name or path.
        args: an `SFTConfig`.
        train_dataset: a `datasets.Dataset` or a list of rows.
        eval_dataset: the same, or a dict of them by name.
        processing_class: the tokenizer; None: the tokenizer of the model's name or path.
        peft_config: trains an adapter instead of the weights.
        callbacks: `transformers.TrainerCallback`s.
        optimizers: (optimizer, scheduler) instead of those of `args`.
        optimizer_cls_and_kwargs: class and arguments of an optimizer instead of that of `args`.
        formatting_func: called with each row of the data sets; returns a text to train on, a list of
            messages, or a row in any format.
    """

    config_class = SFTConfig
    row_kind: Literal["sft", "pair"] = "sft"
    token_metrics: Literal["tokens", "preferences"] | None = "tokens"
    _noise: NeftuneNoise | None = None
    _formatting: Callable[[Any], Any] | None = None

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
    ) -> None:
        self._formatting = formatting_func
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def _examples(
        self, dataset: Any, tokenizer: Any, args: BaseConfig, name: str
    ) -> Examples | None:
        if dataset is not None and not isinstance(dataset, Examples):
            assert isinstance(args, SFTConfig)
            dataset = text_rows(dataset, args.dataset_text_field)
            if self._formatting is not None:
                dataset = formatted_rows(dataset, self._formatting)
        examples = super()._examples(dataset, tokenizer, args, name)
        if examples is not None and (wrong := int((examples.response_counts() != 1).sum())):
            raise DataError(
                f"{wrong} rows of the {name} data do not have exactly one response",
                code="data.response-count",
                details={"data": name, "rows": wrong},
                why="supervised fine-tuning uses one response per row",
                fix="use rows with messages, or with prompt and response",
            )
        return examples

    @classmethod
    def metric_names(cls, args: Any, examples: Examples | None = None) -> set[str]:
        """Return the metrics of an evaluation."""
        return super().metric_names(args, examples) | {"loss/sft"}

    def before_forward(self, inputs: PackedBatch) -> None:
        """Set the lengths of the examples for NEFTune noise."""
        if self._noise is not None:
            self._noise.lengths = example_lengths(inputs.model_inputs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `BaseTrainer` does, with NEFTune noise if `neftune_noise_alpha` is set."""
        alpha = self.args.neftune_noise_alpha
        if alpha is None:
            return super().train(*args, **kwargs)
        self._noise = NeftuneNoise(alpha)
        with self._noise.on(self.model.get_input_embeddings()):
            return super().train(*args, **kwargs)

    def losses(self, sums: Tensor, batch: PackedBatch) -> StepResult:
        """Return the negative log-likelihood of each example, per trained token of the global batch."""
        return StepResult(terms={"sft": Term(-sums, per="tokens")}, metrics={})


# --- noise on the embeddings ---


def example_lengths(inputs: ModelInputs) -> Tensor | None:
    """Return the length of the example of each position, `[1, T]` or `[R, L]`; rows have one response.

    None: each forward of the model is one example (layout `single`).
    """
    ids = inputs.input_ids
    if inputs.rows is not None:
        return None
    if inputs.plan is None:
        assert inputs.attention_mask is not None
        return inputs.attention_mask.sum(-1, keepdim=True).expand(ids.shape)
    counts = torch.tensor([s.stop - s.start for s in inputs.plan.segments])
    counts = counts.to(ids.device, non_blocking=True)
    # `output_size` avoids a host sync.
    return counts.repeat_interleave(counts, output_size=ids.shape[1])[None]


class NeftuneNoise:
    """Adds NEFTune noise to the output of an embedding in train mode.

    Args:
        alpha: α of the paper, which uses 5, 10 and 15.

    Attributes:
        lengths: of the rows of the next forward, see `example_lengths`.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: Tensor | None = None

    @contextmanager
    def on(self, embeddings: nn.Module) -> Iterator[None]:
        """Add the noise inside this context."""
        handle = embeddings.register_forward_hook(self._add)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        noise = torch.empty_like(output).uniform_(-1, 1)
        if self.lengths is None:
            length, width = output.shape[-2:]
            return output + noise * (self.alpha / math.sqrt(length * width))
        size = (
            self.alpha / (self.lengths * output.shape[-1]).float().sqrt()
        )  # too large for float16
        return output + noise * size[..., None].to(output.dtype)
