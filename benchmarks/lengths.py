"""A random model whose responses have given lengths, whatever samples from it.

A response of a random model ends after about V tokens, and no two engines agree on a hook that could end it
earlier. Here the weights themselves count: each word of the vocabulary belongs to a class `r`, the number of
tokens that follow it, and after a word of class `r` comes one of class `r - 1`; class 0 is the end token. The
first word is drawn with the probabilities of the given lengths. The class is written in bits into the last
dimensions of the residual stream, which the layers read and leave as they are. A step costs what it costs in
any model of the shape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

END = 1  # common.make_tokenizer's end token; words begin at 2
_SIZE = 4.0  # of a bit in the residual stream: large beside all else that is in it
_NATS = 10.0  # by which a right bit is likelier than none; a wrong one costs twice that
_LAYERS = 1e-3  # scale of what the layers add to the residual stream


def geometric(mean: float, longest: int) -> list[float]:
    """Probabilities of the lengths 1, 2, ... `longest`, where whatever is longer is cut."""
    stop = 1.0 / mean
    found = [stop * (1 - stop) ** n for n in range(longest)]
    found[-1] += (1 - stop) ** longest
    return found


def empirical(lengths: Sequence[int], longest: int) -> list[float]:
    """Shares of the lengths 1, 2, ... `longest`, where whatever is longer is cut."""
    counts = Counter(min(n, longest) for n in lengths)
    return [counts[n] / len(lengths) for n in range(1, longest + 1)]


def prompt_words(vocabulary: int) -> range:
    """Ids of the words that a prompt may have; no response has one of them."""
    return range(2 + (vocabulary - 2) * 3 // 4, vocabulary)


@torch.no_grad()
def give_lengths(model: Any, shares: Sequence[float]) -> None:
    """Makes a model of `common.make_model` end its responses after 1, 2, ... tokens with these shares.

    A tied head becomes a matrix of its own, which is read as often.

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
            f"{longest} lengths need a --vocabulary of at least {longest * 4 // 3 + 4}"
        )
    bits = longest.bit_length()
    classes = torch.full((vocabulary,), -1)  # -1: of a prompt
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
    written[~spoken, bits] = _SIZE * math.sqrt(bits)  # all rows have one norm
    table[:, free:] = written.to(table)
    normed = math.sqrt(hidden / bits)  # what the last norm makes of a bit
    read = torch.zeros(vocabulary, bits + 1)
    read[spoken, :bits] = _NATS / normed * _code(classes[spoken] + 1, bits)
    each = torch.bincount(classes[spoken], minlength=longest)[classes.clamp(min=0)]
    first = torch.log(torch.tensor(shares)[classes.clamp(min=0)] / each)
    first = (first - first[spoken].max()).clamp(min=-30.0)
    first[~spoken] = -30.0
    read[:, bits] = first / (normed * math.sqrt(bits))
    head[:, free:] = read.to(head)


def _code(numbers: Tensor, bits: int) -> Tensor:
    """Numbers `[N]` as bits -1 and 1, `[N, bits]`."""
    return (numbers[:, None] >> torch.arange(bits) & 1) * 2.0 - 1.0
