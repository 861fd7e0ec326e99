"""Constrained output: a `LogitsFn` that lets a sequence draw only tokens which an automaton accepts.

    automata = {"date": from_regex(r"\\d{4}-\\d\\d-\\d\\d", ...), "verdict": from_answers(["yes", "no"], ...)}
    constraints, starts = combine(automata)
    engine = Engine(..., logits_fn=functools.partial(constrain, constraints), aux=FREE)
    engine.add_request(Request("1", prompt="When? ", aux=starts["date"]))

Automata are compiled to arrays on the host. The device follows one with a few look-ups, also inside `run` in a caller's jit.
The aux of a sequence is one int32: the state in which it draws its next token, or `FREE` if it is not constrained.

A text that ends with the reason "stop" is complete: an end-of-sequence token may be drawn exactly where the automaton accepts.
A text that ends with "length" is the beginning of an accepted one. The rules of `SamplingParams` are applied first. If they and
the constraint together leave no token (for example, min_tokens is longer than any accepted text), the sequence ends with
"error".

Memory, for N states and a vocabulary of V: N * V / 8 bytes of masks, 4 * V bytes of classes per automaton, and 4 bytes per
state and class of tokens. With V = 151,936 these are 19 kB per state and 0.6 MB per automaton. Tokens that lead to the same
state from every state are one class and share a column; a table of next states without classes would take 0.6 MB per state.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from jaxserve.core.logit_rules import BITS, Context
from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record
from jaxserve.grammar.token_automaton import TokenAutomaton

FREE = np.int32(0)  # the aux of a sequence that is not constrained
_NOWHERE = 1  # the state after a token that was not allowed; it allows none


@record
class Constraints(Record):
    """Several automata in one table of states, made by `combine`. It may be a constant of a program or an argument of it."""

    allowed: UInt32[Array, "N V/32"]  # all bits are set in state FREE
    automaton: Int32[Array, " N"]  # the automaton that a state belongs to
    class_of: Int32[Array, "A V"]
    first: Int32[Array, " N"]  # where in `successor` the state's classes begin
    successor: Int32[Array, " X"]


def constrain(
    constraints: Constraints, state: Int32[Array, " R"], logits: Float32[Array, "R V"], context: Context
) -> tuple[Int32[Array, " R"], Float32[Array, "R V"]]:
    """Follows the last token and rules out what the automaton does not allow; a `LogitsFn` once `constraints` is bound.

    Args:
      constraints: host arrays become constants of the program. As an argument of a caller's jit they are data, and other
        constraints of the same shapes (see `combine`) compile nothing.
      state: the aux of each logits row: the state in which the sequence drew its last token, or its start.
      logits, context: see `LogitsFn`.

    Raises:
      ValueError: while tracing, if the constraints were made for another vocabulary.
    """
    vocab_size = constraints.class_of.shape[1]
    if vocab_size != logits.shape[1]:
        raise ValueError(
            f"the constraints were made for vocab_size={vocab_size}, but the model has {logits.shape[1]}: "
            "give that number to from_regex and from_answers"
        )
    logits_row = jnp.arange(logits.shape[0], dtype=jnp.int32)
    token = context.tokens.at[logits_row, context.num_tokens - 1].get(mode="clip")
    state = jnp.where((context.num_generated > 0) & (state != FREE), _follow(constraints, state, token), state)

    def keep_allowed(logits: Float32[Array, "R V"], state: Int32[Array, " R"]) -> Float32[Array, "R V"]:
        bits = jnp.asarray(constraints.allowed)[state][:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)[None, None, :]
        allowed = (bits & jnp.uint32(1)).astype(bool).reshape(logits.shape[0], -1)[:, :vocab_size]
        return jnp.where(allowed, logits, -jnp.inf)

    # Logits rows of padding have no tokens, and the state of some sequence.
    return state, if_any((state != FREE) & (context.num_tokens > 0), keep_allowed, logits, state)


def _follow(constraints: Constraints, state: Int32[Array, " R"], token: Int32[Array, " R"]) -> Int32[Array, " R"]:
    which = jnp.asarray(constraints.automaton)[state]
    entry = jnp.asarray(constraints.first)[state] + jnp.asarray(constraints.class_of)[which, token]
    return jnp.where(state == _NOWHERE, state, jnp.asarray(constraints.successor)[entry])


def combine(
    automata: Mapping[str, TokenAutomaton],
    *,
    max_automata: int | None = None,
    max_states: int | None = None,
    max_entries: int | None = None,
) -> tuple[Constraints, dict[str, np.int32]]:
    """Puts automata into one table, as host arrays; returns it with the start of each one, which is the aux of its requests.

    Args:
      automata: automata by name, all for the same vocabulary.
      max_automata, max_states, max_entries: the sizes of the arrays, for programs that take other constraints of the same sizes
        later: the number of automata, of states (with two more than the automata have), and of entries of `successor`. None:
        as many as there are.

    Raises:
      ValueError: if there is no automaton, the automata are for different vocabularies, or they do not fit.
    """
    parts = list(automata.values())
    vocab_sizes = {part.class_of.size for part in parts}
    if len(vocab_sizes) != 1:
        raise ValueError(
            f"the automata are for vocabularies of {sorted(vocab_sizes)} tokens: give automata for the same one"
        )
    sizes = [len(part.allowed) for part in parts]
    starts = np.cumsum([2, *sizes])  # FREE and _NOWHERE come first
    entries = np.cumsum([0, *(part.successor.size for part in parts)])
    allowed = np.zeros((2, parts[0].allowed.shape[1]), np.uint32)
    allowed[FREE] = ~np.uint32(0)
    first = [
        start + part.successor.shape[1] * np.arange(size)
        for start, part, size in zip(entries, parts, sizes, strict=False)
    ]
    successor = [
        np.where(part.successor < 0, _NOWHERE, part.successor + start)
        for part, start in zip(parts, starts, strict=False)
    ]
    table = Constraints(
        allowed=_padded("max_states", max_states, np.concatenate([allowed, *(part.allowed for part in parts)])),
        automaton=_padded("max_states", max_states, np.repeat(np.arange(-1, len(parts)), [2, *sizes]).clip(0)),
        class_of=_padded("max_automata", max_automata, np.stack([part.class_of for part in parts])),
        first=_padded("max_states", max_states, np.concatenate([np.zeros(2, int), *first])),
        successor=_padded("max_entries", max_entries, np.concatenate([table.ravel() for table in successor])),
    )
    return table, dict(zip(automata, map(np.int32, starts), strict=False))


def _padded(name: str, capacity: int | None, values: np.ndarray) -> Any:
    capacity = len(values) if capacity is None else capacity
    if len(values) > capacity:
        raise ValueError(f"the automata need {name}={len(values)}, but it is {capacity}: raise it, or give fewer")
    values = np.pad(values, [(0, capacity - len(values)), *[(0, 0)] * (values.ndim - 1)])
    return values if values.dtype == np.uint32 else values.astype(np.int32)
