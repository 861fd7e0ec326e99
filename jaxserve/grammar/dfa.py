"""Makes nondeterministic automata deterministic (subset construction), and finds which states are equivalent."""

import collections
import dataclasses

import numpy as np
from jaxtyping import Int32

from jaxserve.grammar.budget import Budget, shown
from jaxserve.grammar.nfa import Nfa

_MAX_STATES = 10_000


@dataclasses.dataclass(frozen=True)
class Dfa:
    """A complete automaton; it starts in state 0, and its last state is dead: no text leads from there to an accepting one."""

    moves: list[list[int]]  # per state and class of bytes, the next state
    accepting: set[int]
    class_of: Int32[np.ndarray, " 256"]  # per byte


def determinise(nfa: Nfa, pattern: str, budget: Budget) -> Dfa:
    """Makes an automaton deterministic.

    Raises:
      ValueError: naming the pattern, if it needs too many states or exceeds the budget.
    """
    edges = [edge for edges in nfa.edges for edge in edges]
    firsts = sorted({0, *(low for low, _, _ in edges), *(high + 1 for _, high, _ in edges)} - {256})
    class_of = np.searchsorted(firsts, np.arange(256), side="right").astype(np.int32) - 1
    classes: list[int] = class_of.tolist()
    start = nfa.closure([0])
    numbers, waiting = {start: 0}, collections.deque([start])
    moves: list[list[int]] = []
    while waiting:
        targets: list[set[int]] = [set() for _ in firsts]
        num_targets = 0
        for state in waiting.popleft():
            for low, high, target in nfa.edges[state]:
                num_targets += classes[high] + 1 - classes[low]
                for index in range(classes[low], classes[high] + 1):
                    targets[index].add(target)
        budget.spend(len(firsts) + num_targets)
        closures: dict[frozenset[int], frozenset[int]] = {}  # many classes have the same targets
        moves.append([])
        for target in map(frozenset, targets):
            if target not in closures:
                closures[target] = nfa.closure(target)
            following = closures[target]
            if following and following not in numbers:
                numbers[following] = len(numbers)
                waiting.append(following)
            moves[-1].append(numbers.get(following, -1))
        if len(numbers) > _MAX_STATES:
            raise ValueError(
                f"regular expression {shown(pattern)} needs more than {_MAX_STATES} states: "
                "use smaller numbers in {...}, or * for them"
            )
    dead = len(moves)
    moves = [[dead if target < 0 else target for target in each] for each in [*moves, [dead] * len(firsts)]]
    return Dfa(moves, {number for states, number in numbers.items() if nfa.end in states}, class_of)


def equivalent_states(dfa: Dfa, budget: Budget) -> list[int]:
    """Returns for each state the number of its block of equivalent states (Hopcroft, 1971).

    Raises:
      ValueError: if that exceeds the budget.
    """
    sources_of: list[dict[int, list[int]]] = [
        collections.defaultdict(list) for _ in dfa.moves[0]
    ]  # by class and target
    for state, targets in enumerate(dfa.moves):
        for sources, target in zip(sources_of, targets, strict=True):
            sources[target].append(state)
    block_of = [int(state in dfa.accepting) for state in range(len(dfa.moves))]
    blocks = [{state for state, block in enumerate(block_of) if block == index} for index in range(2)]
    waiting = {0, 1}
    while waiting:
        splitter = list(blocks[waiting.pop()])
        # Most of these look-ups are quick, because they have no result.
        budget.spend(1 + len(sources_of) * len(splitter) // 8)
        for sources in sources_of:
            parts: dict[int, set[int]] = collections.defaultdict(set)  # by block: its states that lead to the splitter
            for target in splitter:
                for state in sources.get(target, ()):
                    parts[block_of[state]].add(state)
            for block, part in parts.items():
                if len(part) == len(blocks[block]):
                    continue
                blocks[block] -= part
                for state in part:
                    block_of[state] = len(blocks)
                smaller = len(blocks) if block in waiting or len(part) <= len(blocks[block]) else block
                blocks.append(part)
                waiting.add(smaller)
    return block_of
