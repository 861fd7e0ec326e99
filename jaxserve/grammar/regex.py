"""Regular expressions over text as deterministic automata over its UTF-8 bytes.

    pattern --syntax--> syntax tree --nfa--> NFA --dfa--> DFA, whose equivalent states are merged here

`jaxserve.grammar.syntax` lists the expressions that are supported.
"""

import collections
import dataclasses

import numpy as np
from jaxtyping import Bool, Int32

from jaxserve.grammar.budget import MAX_WORK, Budget, shown
from jaxserve.grammar.dfa import determinise, equivalent_states
from jaxserve.grammar.nfa import Nfa
from jaxserve.grammar.syntax import parse


@dataclasses.dataclass(frozen=True)
class ByteAutomaton:
    """A DFA over bytes; it starts in state 0, and from every state some text leads to an accepting one."""

    successor: Int32[np.ndarray, "N 256"]  # -1: no text goes on with this byte
    accepting: Bool[np.ndarray, " N"]


def compile_regex(pattern: str, *, max_work: int = MAX_WORK) -> ByteAutomaton:
    """Returns the smallest automaton that accepts exactly the texts which the whole pattern matches.

    Args:
      pattern: see `jaxserve.grammar.syntax`.
      max_work: the most units of work, see `jaxserve.grammar.budget`.

    Raises:
      ValueError: if the pattern is malformed, uses what is not supported, matches no text, or needs too many states or too much
        work.
    """
    budget = Budget(pattern, max_work)
    dfa = determinise(Nfa(parse(pattern, budget), pattern, budget), pattern, budget)
    block_of = equivalent_states(dfa, budget)
    dead, waiting = block_of[-1], collections.deque([0])
    if block_of[0] == dead:
        raise ValueError(f"regular expression {shown(pattern)} matches no text: nothing could be generated")
    numbers = {block_of[0]: 0}  # numbers of blocks, in the order of a breadth-first search
    successor: list[list[int]] = []
    accepting: list[bool] = []
    while waiting:
        state = waiting.popleft()
        accepting.append(state in dfa.accepting)
        successor.append([])
        for target in dfa.moves[state]:
            block = block_of[target]
            if block != dead and block not in numbers:
                numbers[block] = len(numbers)
                waiting.append(target)
            successor[-1].append(-1 if block == dead else numbers[block])
    return ByteAutomaton(np.asarray(successor, np.int32)[:, dfa.class_of], np.asarray(accepting))
