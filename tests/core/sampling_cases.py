"""Requests in the middle of their generation, and what the documentation says about their next token, in float64 NumPy.

Written from the order of operations in words: loops over tokens for the rules, sorted vocabularies for the limits.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve import EngineConfig, ModelConfig, SamplingParams
from jaxserve.core.logit_rules import Context, LogitRules
from jaxserve.core.make_submission import make_submission
from jaxserve.core.sampling import SamplingArrays

EOS = 3
AMBIGUOUS = 1e-6  # closer to a threshold than this, float32 may round to either side
CONFIG = EngineConfig(
    max_slots=1,
    max_model_len=24,
    max_logprobs=5,
    max_stop_token_ids=3,
    max_logit_bias=4,
    max_bad_words=3,
    max_bad_word_len=4,
    max_stop_sequences=0,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, and the tokens of its sequence so far."""

    params: SamplingParams
    prompt: tuple[int, ...]
    generated: tuple[int, ...]


def ruled(logits: np.ndarray, case: Case) -> np.ndarray:
    """Logits of one row after allowed ids, bad words, minimum length, bias and penalties, in this order."""
    params, history = case.params, [*case.prompt, *case.generated]
    logits = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        logits[[token not in params.allowed_token_ids for token in range(len(logits))]] = -np.inf
    for *before, last in params.bad_words:
        if history[len(history) - len(before) :] == before and len(before) <= len(history):
            logits[last] = -np.inf
    if len(case.generated) < params.min_tokens:
        for token in (*([] if params.ignore_eos else [EOS]), *params.stop_token_ids):
            logits[token] = -np.inf
    for token, bias in dict(params.logit_bias).items():
        logits[token] += bias
    for token in set(history):
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token, count in collections.Counter(case.generated).items():
        logits[token] -= params.frequency_penalty * count
        logits[token] -= params.presence_penalty
    return logits


@dataclasses.dataclass(frozen=True)
class Support:
    """The tokens that may be drawn, per row."""

    probs: np.ndarray  # renormalised; 0 for dropped tokens
    ambiguous: np.ndarray  # whether rounding could move a threshold
    widest: np.ndarray  # tokens kept if rounding moves every threshold so as to keep more

    @property
    def kept(self) -> np.ndarray:
        return self.probs > 0


def support_of(logits: np.ndarray, rows: SamplingArrays) -> Support:
    """Support of rows that draw at random."""
    limits = rows.temperature, rows.top_k, rows.top_p, rows.min_p
    probs, ambiguous = _limited(logits, *limits, slack=0.0)
    return Support(probs, ambiguous, _limited(logits, *limits, slack=AMBIGUOUS)[0] > 0)


def _limited(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray, slack: float
) -> tuple[np.ndarray, np.ndarray]:
    """temperature -> min_p -> top_k -> top_p on the renormalised distribution."""
    vocab_size = logits.shape[1]
    scaled = (logits.astype(np.float32) / temperature.astype(np.float32)[:, None]).astype(np.float64)
    min_p, allowed = min_p.astype(np.float64)[:, None], 1 - top_p.astype(np.float64)[:, None]
    ratio = softmax(scaled)
    ratio /= ratio.max(axis=1, keepdims=True)
    ambiguous = np.any((min_p > 0) & (min_p < 1) & (np.abs(ratio - min_p) < AMBIGUOUS * min_p), axis=1)
    scaled = np.where(ratio < min_p * (1 - slack), -np.inf, scaled)
    k = np.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size)
    scaled = np.where(scaled < np.take_along_axis(np.sort(scaled), vocab_size - k[:, None], 1), -np.inf, scaled)
    order = np.argsort(scaled, axis=1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(softmax(scaled), order, 1), axis=1)
    close = (allowed > 0) & (np.abs(cumulative - allowed) < AMBIGUOUS)
    dropped = (allowed > 0) & (cumulative <= allowed - slack)
    close[:, -1] = dropped[:, -1] = False
    by_token = np.zeros_like(dropped)
    np.put_along_axis(by_token, order, dropped, 1)
    return softmax(np.where(by_token, -np.inf, scaled)), ambiguous | close.any(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# Kinds of rules; a random case has some of them.
RULES = ("allowed_token_ids", "bad_words", "min_tokens", "logit_bias", "repetition", "frequency", "presence")


def random_case(rng: np.random.Generator, vocab_size: int, *rules: str, exact: bool, **params: Any) -> Case:
    """A request with given kinds of rules, on a history in which tokens repeat.

    With `exact` all numbers are such that rules are computed in float32 without rounding, if logits are multiples of 1/8.
    """
    prompt, generated = (
        tuple(rng.integers(0, min(vocab_size, 12), length).tolist())
        for length in (rng.integers(1, 13), rng.integers(0, 11))
    )
    history = prompt + generated

    def number(low: float, high: float) -> float:
        value = rng.uniform(low, high)
        return round(value * 4) / 4 if exact else float(value)

    def word() -> tuple[int, ...]:
        length = int(rng.integers(0, 4))  # tokens before the last; most of them as the history ends
        before = history[len(history) - length :] if rng.random() < 0.7 else rng.integers(0, 12, length).tolist()
        return (*before, int(rng.integers(vocab_size)))

    def ids(most: int) -> list[int]:
        return rng.choice(vocab_size, int(rng.integers(1, most + 1)), replace=False).tolist()

    choices: dict[str, Any] = {
        "allowed_token_ids": lambda: {"allowed_token_ids": ids(3 if rng.random() < 0.3 else vocab_size)},
        "bad_words": lambda: {"bad_words": [word() for _ in range(rng.integers(1, 4))]},
        "min_tokens": lambda: {"min_tokens": int(rng.integers(1, 12)), "stop_token_ids": ids(2)},
        "logit_bias": lambda: {"logit_bias": {token: number(-8, 8) for token in ids(4)}},
        "repetition": lambda: {"repetition_penalty": float(rng.choice([0.5, 2])) if exact else number(0.5, 2)},
        "frequency": lambda: {"frequency_penalty": number(-2, 2)},
        "presence": lambda: {"presence_penalty": number(-2, 2)},
    }
    for rule in rules:
        params |= choices[rule]()
    return Case(SamplingParams(max_tokens=12, **params), prompt, generated)


def random_rules(rng: np.random.Generator) -> list[str]:
    """None, one, or any of the kinds of rules."""
    probability = rng.choice([0.0, 0.2, 0.5, 1.0], p=[0.1, 0.4, 0.3, 0.2])
    return [rule for rule in RULES if rng.random() < probability]


def arrays_of(cases: Sequence[Case], vocab_size: int) -> tuple[SamplingArrays, LogitRules, Context]:
    """The rows of cases, one per case, each in a slot of another number; what is stale is random."""
    model = ModelConfig("llama", vocab_size, 2, 2, 1, 1, 1, 2)
    rows = make_submission(
        [case.prompt for case in cases],
        [case.params for case in cases],
        model=model,
        config=CONFIG,
        eos_token_ids=[EOS],
    )
    rng, number = np.random.default_rng(len(cases)), len(cases)
    tokens = rng.integers(0, vocab_size, (number, CONFIG.max_model_len)).astype(np.int32)
    slot = rng.permutation(number).astype(np.int32)
    seen = np.zeros((number, vocab_size), np.int32)
    for row, case in enumerate(cases):
        history = case.prompt + case.generated
        tokens[row, : len(history)] = history
        seen[slot[row], list(case.prompt)] = 1
        for token in case.generated:
            seen[slot[row], token] += 2
    context = Context(
        tokens=tokens,
        num_tokens=np.array([len(case.prompt) + len(case.generated) for case in cases], np.int32),
        prompt_length=np.array([len(case.prompt) for case in cases], np.int32),
        stop_token_ids=rows.stop_token_ids,
        slot=slot,
        seen=seen,
    )
    return rows.sampling, rows.rules, context


def grid(rng: np.random.Generator, number: int, vocab_size: int) -> np.ndarray:
    """Logits that are multiples of 1/8, with ties."""
    return (np.round(rng.standard_normal((number, vocab_size)) * rng.choice([4, 16], (number, 1))) / 8).astype(
        np.float32
    )
