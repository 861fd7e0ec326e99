"""Interpolated modified Kneser-Ney n-grams (Chen and Goodman, 1999, section 3) over token ids, in NumPy.

An n-gram of token ids is packed into one uint64, its first token in the highest place, so that the n-grams of one
context are neighbours in sorted order, dropping the last token is a division and dropping the first a remainder.
"""

import dataclasses

import numpy as np

NUM_DISCOUNTS = 3  # Counts of one, two, three and more.


@dataclasses.dataclass(frozen=True)
class Level:
    """The n-grams of one order n; arrays are sorted by the packed n-grams.

    Attributes:
      grams: packed n-grams [G].
      discounted: (count - discount) / count of the context [G].
      contexts: packed contexts of n - 1 tokens [C].
      backoff: weight of the next lower order after each context [C].
    """

    grams: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    backoff: np.ndarray


@dataclasses.dataclass(frozen=True)
class KneserNey:
    """A trained model: the orders 1 to n over a vocabulary."""

    levels: tuple[Level, ...]
    vocab_size: int

    @property
    def order(self) -> int:
        return len(self.levels)


def fit(tokens: np.ndarray, order: int, vocab_size: int) -> KneserNey:
    """Trains on a sequence of token ids.

    The highest order counts occurrences, every lower one the distinct tokens seen to its left.
    """
    if vocab_size**order > 2**64:
        raise ValueError(f"{order}-grams of {vocab_size} token ids do not fit 64 bits: lower the order")
    grams, counts = np.unique(pack(windows(tokens, order), vocab_size), return_counts=True)
    levels = [_level(grams, counts, vocab_size)]
    for n in range(order - 1, 0, -1):
        grams, counts = np.unique(grams % np.uint64(vocab_size**n), return_counts=True)
        levels.append(_level(grams, counts, vocab_size))
    return KneserNey(tuple(reversed(levels)), vocab_size)


def probabilities(model: KneserNey, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns P(tokens[i] | contexts[i]) for contexts [N, order - 1], oldest token first."""
    result = np.full(len(tokens), 1.0 / model.vocab_size)
    for n, level in enumerate(model.levels, start=1):
        context = contexts[:, contexts.shape[1] - (n - 1) :]
        keys = pack(context, model.vocab_size)
        grams = keys * np.uint64(model.vocab_size) + tokens.astype(np.uint64)
        # A context that was never seen gives all its weight to the lower order.
        result = _look_up(level.grams, level.discounted, grams, 0.0) + result * _look_up(
            level.contexts, level.backoff, keys, 1.0
        )
    return result


def bits(model: KneserNey, tokens: np.ndarray, block: int = 1 << 18) -> float:
    """Returns the total bits of `tokens` after the first `order - 1`."""
    total = 0.0
    ngrams = windows(tokens, model.order)
    for start in range(0, len(ngrams), block):
        part = ngrams[start : start + block]
        total -= float(np.log2(probabilities(model, part[:, :-1], part[:, -1])).sum())
    return total


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Returns all runs of `length` tokens, [N - length + 1, length]."""
    return np.lib.stride_tricks.sliding_window_view(tokens, length)


def pack(ngrams: np.ndarray, vocab_size: int) -> np.ndarray:
    """Packs n-grams of token ids [N, n] into one uint64 each; empty n-grams give 0."""
    keys = np.zeros(len(ngrams), np.uint64)
    for column in range(ngrams.shape[1]):
        keys = keys * np.uint64(vocab_size) + ngrams[:, column].astype(np.uint64)
    return keys


def _level(grams: np.ndarray, counts: np.ndarray, vocab_size: int) -> Level:
    contexts, starts = np.unique(grams // np.uint64(vocab_size), return_index=True)
    lengths = np.diff(np.append(starts, len(grams)))
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    discount = _discounts(counts)[np.minimum(counts, NUM_DISCOUNTS)]
    return Level(
        grams=grams,
        discounted=(counts - discount) / np.repeat(totals, lengths),
        contexts=contexts,
        backoff=np.add.reduceat(discount, starts) / totals,
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns [0, D1, D2, D3+] from the numbers of n-grams seen once to four times; 0.75 each if one of them is 0."""
    seen = np.bincount(np.minimum(counts, NUM_DISCOUNTS + 2), minlength=NUM_DISCOUNTS + 3).astype(np.float64)
    fallback = np.array([0.0, 0.75, 0.75, 0.75])
    if np.any(seen[1 : NUM_DISCOUNTS + 2] == 0):
        return fallback
    y = seen[1] / (seen[1] + 2 * seen[2])
    discounts = np.array([0.0, *(n - (n + 1) * y * seen[n + 1] / seen[n] for n in range(1, NUM_DISCOUNTS + 1))])
    return np.where((discounts >= 0) & (discounts <= np.arange(NUM_DISCOUNTS + 1)), discounts, fallback)


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray, missing: float) -> np.ndarray:
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], missing)
