"""Gives a random model a distribution of response lengths, for every sampling engine.

A random model would end a response after about V tokens, and engines share no hook to end it earlier. So
the weights do the counting: each word of the vocabulary belongs to a class `r`, the number of tokens that
follow it; a word of class `r` is followed by one of class `r - 1`, and class 0 is the end token. The first
word is drawn with the probabilities of the given lengths. The class is encoded in bits in the last
dimensions of the residual stream, which the layers read but do not change. A step costs as much as with any
model of the same shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

END = 1  # common.make_tokenizer's end token; words begin at 2
_SIZE = 4.0  # size of a bit in the residual stream: large compared with everything else in it
_NATS = 10.0  # log-prob that a correct bit adds; a wrong one costs twice as much
_LAYERS = 1e-3  # scale of the layers' contribution to the residual stream


def geometric(mean: float, longest: int) -> list[float]:
    """Return the probabilities of the lengths 1, 2, ... `longest`; longer responses are truncated."""
    stop = 1.0 / mean
    found = [stop * (1 - stop) ** n for n in range(longest)]
    found[-1] += (1 - stop) ** longest
    return found


def empirical(lengths: Sequence[int], longest: int) -> list[float]:
    """Return the fractions of the lengths 1, 2, ... `longest`; longer responses are truncated."""
    counts = Counter(min(n, longest) for n in lengths)
    return [counts[n] / len(lengths) for n in range(1, longest + 1)]


def prompt_words(vocabulary: int) -> range:
    """Return the ids of the words for prompts, which do not occur in responses."""
    return range(2 + (vocabulary - 2) * 3 // 4, vocabulary)


@torch.no_grad()
def give_lengths(model: Any, shares: Sequence[float]) -> None:
    """Make a model of `common.make_model` end its responses after 1, 2, ... tokens with these probabilities.

    A tied head becomes a separate matrix, which does not change the cost.

    Raises:
        ValueError: the vocabulary has fewer words than there are lengths.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if head is table:
        model.config.tie_word_embeddings = False
        head = nn.Parameter(table.detach().clone())
        model.get_output_embeddings().weight = head
    vocabulary, hidden = table.shape
    words, longest = prompt_words(vocabulary).start - 2, len(shares)
    if words < longest - 1:
        raise ValueError(
            f"{longest} lengths require a --vocabulary of at least {longest * 4 // 3 + 4}"
        )
    bits = longest.bit_length()
    classes = torch.full((vocabulary,), -1)  # -1: prompt words
    classes[END] = 0
    if longest > 1:
        classes[2 : 2 + words] = 1 + torch.arange(words) % (longest - 1)
    free = hidden - bits - 1
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_(_LAYERS)[free:] = 0
    spoken = classes >= 0
    written = torch.zeros(vocabulary, bits + 1)
    written[spoken, :bits] = _SIZE * _code(classes[spoken], bits)
    written[~spoken, bits] = _SIZE * math.sqrt(bits)  # all rows have the same norm
    table[:, free:] = written.to(table)
    normed = math.sqrt(hidden / bits)  # size of a bit after the final norm
    read = torch.zeros(vocabulary, bits + 1)
    read[spoken, :bits] = _NATS / normed * _code(classes[spoken] + 1, bits)
    each = torch.bincount(classes[spoken], minlength=longest)[classes.clamp(min=0)]
    first = torch.log(torch.tensor(shares)[classes.clamp(min=0)] / each)
    first = (first - first[spoken].max()).clamp(min=-30.0)
    first[~spoken] = -30.0
    read[:, bits] = first / (normed * math.sqrt(bits))
    head[:, free:] = read.to(head)


def _code(numbers: Tensor, bits: int) -> Tensor:
    """Return the bits of the numbers `[N]` as -1 and 1, `[N, bits]`."""
    return (numbers[:, None] >> torch.arange(bits) & 1) * 2.0 - 1.0
