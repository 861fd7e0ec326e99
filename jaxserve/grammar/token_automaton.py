"""Automata over tokens: which tokens may follow in each state, as arrays on the host."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, UInt32

from jaxserve.core.logit_rules import BITS

_MAX_STATES = 20_000


@dataclasses.dataclass(frozen=True)
class TokenAutomaton:
    """An automaton over tokens; it starts in state 0, and from every state some tokens lead to an accepted text."""

    allowed: UInt32[np.ndarray, "N V/32"]  # bit i of word w: id 32 w + i may be drawn
    class_of: Int32[np.ndarray, " V"]  # tokens of one class lead to the same state from each state
    successor: Int32[np.ndarray, "N C"]  # by class; -1: not allowed


class EmptyLanguageError(ValueError):
    """Raised for an automaton that accepts no text."""


def assemble(
    edges: Sequence[tuple[np.ndarray, np.ndarray]], accepting: Sequence[bool], vocab_size: int, eos: Sequence[int]
) -> TokenAutomaton:
    """Makes an automaton of edges; edges that lead to no accepted text are left out.

    Args:
      edges: per state, token ids and the states that they lead to.
      accepting: per state, whether the tokens so far are an accepted text.
      vocab_size: the size of the model's vocabulary.
      eos: the end-of-sequence ids, which are allowed in accepting states.

    Raises:
      EmptyLanguageError: if no text is accepted.
    """
    useful = _useful(edges, accepting)
    if 0 not in useful:
        raise EmptyLanguageError
    number_of = np.full(len(edges), -1, np.int32)
    number_of[useful] = np.arange(len(useful))
    over = len(useful)  # the state after an end-of-sequence token, which allows only more of them (for ignore_eos)

    def column(state: int) -> Int32[np.ndarray, " V"]:
        following = np.full(vocab_size, -1, np.int32)
        if state < over:
            ids, targets = edges[useful[state]]
            following[ids] = number_of[targets]
        if state == over or accepting[useful[state]]:
            following[list(eos)] = over
        return following

    class_of, num_classes = np.zeros(vocab_size, np.int64), 1
    allowed = np.zeros((over + 1, -(-vocab_size // BITS)), np.uint32)
    for state in range(over + 1):
        following = column(state)
        bits = np.pad(following >= 0, (0, -vocab_size % BITS))
        allowed[state] = np.packbits(bits, bitorder="little").view("<u4")
        classes, class_of = np.unique(class_of * (over + 2) + following + 1, return_inverse=True)
        num_classes = len(classes)
    example = np.zeros(num_classes, np.int64)
    example[class_of] = np.arange(vocab_size)
    successor = np.stack([column(state)[example] for state in range(over + 1)])
    return TokenAutomaton(allowed, class_of.astype(np.int32), successor)


def _useful(edges: Sequence[tuple[np.ndarray, np.ndarray]], accepting: Sequence[bool]) -> list[int]:
    """Returns the states from which an accepting one can be reached, in order."""
    before: list[list[int]] = [[] for _ in edges]
    for state, (_, targets) in enumerate(edges):
        for target in np.unique(targets).tolist():
            before[target].append(state)
    useful = {state for state, accepts in enumerate(accepting) if accepts}
    waiting = list(useful)
    while waiting:
        new = set(before[waiting.pop()]) - useful
        useful |= new
        waiting += new
    return sorted(useful)


def check_eos(eos_token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError if there is no end-of-sequence id, or one is not in the vocabulary."""
    if not eos_token_ids:
        raise ValueError("eos_token_ids is empty: without one a constrained sequence cannot end; give the model's")
    for token in eos_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_ids has {token}, which must lie in [0, vocab_size={vocab_size})")


def check_num_states(what: str, number: int) -> None:
    """Raises ValueError if an automaton has too many states; `what` names it in the message."""
    if number > _MAX_STATES:
        raise ValueError(
            f"{what} needs more than {_MAX_STATES} states, and each costs V/8 bytes on the device: make it smaller"
        )
