"""Output that is one of a list of answers."""

from collections.abc import Sequence

import numpy as np

from jaxserve.grammar.token_automaton import TokenAutomaton, assemble, check_eos, check_num_states
from jaxserve.text.tokenizer import Tokenizer


def from_answers(
    answers: Sequence[str | Sequence[int]],
    *,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    tokenizer: Tokenizer | None = None,
) -> TokenAutomaton:
    """Returns the automaton of a list of answers: one of them token by token, then an end-of-sequence token.

    Args:
      answers: token ids, or texts. A text has one spelling: the tokens that the tokenizer makes of it alone, without special
        tokens. Some tokenizers put a blank before its first word.
      vocab_size: the size of the model's vocabulary.
      eos_token_ids: the end-of-sequence ids of the engine.
      tokenizer: needed for texts only.

    Raises:
      ValueError: if there is no answer or an empty one, if a token is not in the vocabulary or ends sequences, or if the
        answers need too many states.
    """
    check_eos(eos_token_ids, vocab_size)
    if not answers:
        raise ValueError("answers is empty: give at least one")
    children: list[dict[int, int]] = [{}]
    accepting: list[bool] = [False]
    for answer in answers:
        state = 0
        for token in _spelled(answer, tokenizer, vocab_size, eos_token_ids):
            if token not in children[state]:
                children[state][token] = len(children)
                children.append({})
                accepting.append(False)
            state = children[state][token]
        accepting[state] = True
        check_num_states("answers", len(children))
    edges = [(np.array(list(each), np.int32), np.array(list(each.values()), np.int32)) for each in children]
    return assemble(edges, accepting, vocab_size, eos_token_ids)


def _spelled(
    answer: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> list[int]:
    if isinstance(answer, str):
        if tokenizer is None:
            raise ValueError(f"answer {answer!r} is a text, and there is no tokenizer: give a tokenizer, or token ids")
        tokens = tokenizer.encode(answer, add_special_tokens=False)
    else:
        tokens = list(answer)
    if not tokens:
        raise ValueError(f"answer {answer!r} has no tokens: leave it out")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"answer {answer!r} has token {token}, which must lie in [0, vocab_size={vocab_size})")
        if token in eos_token_ids:
            raise ValueError(
                f"answer {answer!r} has token {token}, which ends sequences: leave it out, because it is added"
            )
    return tokens
