"""Output that matches a regular expression."""

import collections
from collections.abc import Sequence

import numpy as np

from jaxserve.grammar.regex import compile_regex
from jaxserve.grammar.token_automaton import EmptyLanguageError, TokenAutomaton, assemble, check_eos, check_num_states
from jaxserve.grammar.vocabulary import Vocabulary, token_bytes
from jaxserve.text.tokenizer import Tokenizer


def from_regex(pattern: str, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> TokenAutomaton:
    """Returns the automaton of all texts that a regular expression matches as a whole, in every spelling of the vocabulary.

    The pattern describes the text that continues the prompt, `CompletionOutput.text`. A token that stands for a blank and a
    word adds the blank too, even as the first token, so the pattern must allow for the blank if such a token may come first. A
    prompt should end with a complete character. No special token is allowed, except an end-of-sequence token at the end.

    Args:
      pattern: see `jaxserve.grammar.syntax`.
      tokenizer: a byte-level tokenizer or one of SentencePiece.
      vocab_size: the size of the model's vocabulary; ids that the tokenizer does not have are not allowed.
      eos_token_ids: the end-of-sequence ids of the engine.

    Raises:
      ValueError: if `compile_regex` refuses the pattern, the tokenizer is of another kind, its tokens cannot spell any matching
        text, or the automaton needs too many states.
    """
    check_eos(eos_token_ids, vocab_size)
    automaton = compile_regex(pattern)
    tokens = Vocabulary(token_bytes(tokenizer)[:vocab_size], eos_token_ids)
    numbers, waiting = {0: 0}, collections.deque([0])  # the states of the DFA in which a token begins
    edges: list[tuple[np.ndarray, np.ndarray]] = []
    while waiting:
        ids, targets = tokens.walk(automaton, waiting.popleft())
        for target in np.unique(targets).tolist():
            if target not in numbers:
                numbers[target] = len(numbers)
                waiting.append(target)
        check_num_states(f"regular expression {pattern!r}", len(numbers))
        number_of = np.full(len(automaton.accepting), -1, np.int32)
        number_of[list(numbers)] = list(numbers.values())
        edges.append((ids, number_of[targets]))
    accepting = [bool(automaton.accepting[state]) for state in numbers]
    try:
        return assemble(edges, accepting, vocab_size, eos_token_ids)
    except EmptyLanguageError:
        raise ValueError(
            f"regular expression {pattern!r} matches no text that this tokenizer's tokens can spell: check its characters"
        ) from None
