"""Constrained output: a `LogitsFn` that lets a sequence say only what an automaton over tokens accepts.

    automata = {"date": from_regex(r"\\d{4}-\\d\\d-\\d\\d", ...), "verdict": from_answers(["yes", "no"], ...)}
    constraints, starts = combine(automata)
    engine = Engine(..., logits_fn=functools.partial(constrain, constraints), aux=FREE)
    engine.add_request(Request("1", prompt="When? ", aux=starts["date"]))

Automata are compiled to arrays on the host; following one is a few lookups on the device, also inside `run` in a caller's jit.
What a sequence remembers, its aux, is one int32: the state in which it draws its next token; `FREE` is no constraint.

A text is complete when it ends with "stop": an end-of-sequence token may be drawn exactly where the automaton accepts. One that
ends for its length is the beginning of an accepted text. The rules of `SamplingParams` come first: together with a constraint
they may leave no token (min_tokens longer than any accepted text, say), and the sequence ends with "error".

Memory, for N states and a vocabulary of V: N * V / 8 bytes of masks, 4 * V bytes of classes per automaton, and 4 bytes per
state and class of tokens. V = 151,936: 19 kB per state, 0.6 MB per automaton. Classes are what keeps a dense table of next
states (0.6 MB per state) away: tokens that lead from every state to the same one share a column.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from jaxserve.core.logit_rules import BITS, Context
from jaxserve.core.optional import if_any
from jaxserve.core.pytree import Record, record
from jaxserve.grammar.regex import ByteAutomaton, compile_regex
from jaxserve.text.tokenizer import Tokenizer, byte_level_bytes, decoder_parts, is_byte_token

FREE = np.int32(0)  # the aux of a sequence that is not constrained
_NOWHERE = 1  # the state after a token that was not allowed: allows none
_MAX_STATES = 20_000


@dataclasses.dataclass(frozen=True)
class TokenAutomaton:
    """Which tokens may follow, on the host; it starts in state 0, and every state leads to an accepted text."""

    allowed: UInt32[np.ndarray, "N V/32"]  # bit i of word w: id 32 w + i may be drawn
    class_of: Int32[np.ndarray, " V"]  # tokens of one class lead from each state to the same one
    successor: Int32[np.ndarray, "N C"]  # by class; -1: not allowed


@record
class Constraints(Record):
    """Some automata in one table of states. Made by `combine`; may be a constant of a program or an argument of it."""

    allowed: UInt32[Array, "N V/32"]  # all, of state FREE
    automaton: Int32[Array, " N"]  # to which a state belongs
    class_of: Int32[Array, "A V"]
    first: Int32[Array, " N"]  # where in `successor` the state's classes begin
    successor: Int32[Array, " X"]


def constrain(
    constraints: Constraints, state: Int32[Array, " R"], logits: Float32[Array, "R V"], context: Context
) -> tuple[Int32[Array, " R"], Float32[Array, "R V"]]:
    """A `LogitsFn` once `constraints` is bound: follows the token drawn last, and rules out what the automaton does not allow.

    Args:
      constraints: host arrays become constants of the program; as an argument of a caller's jit they are data, and others of
        the same shapes (see `combine`) compile nothing.
      state: the aux: where the sequence drew its last token, or its start.

    Raises:
      ValueError: while tracing, if the constraints were made for another vocabulary.
    """
    vocab_size = constraints.class_of.shape[1]
    if vocab_size != logits.shape[1]:
        raise ValueError(
            f"the constraints were made for vocab_size={vocab_size}, but the model has {logits.shape[1]}: "
            "give that number to from_regex and from_answers"
        )
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)
    token = context.tokens.at[row, context.num_tokens - 1].get(mode="clip")
    state = jnp.where((context.num_generated > 0) & (state != FREE), _follow(constraints, state, token), state)

    def keep_allowed(logits: Float32[Array, "R V"], state: Int32[Array, " R"]) -> Float32[Array, "R V"]:
        bits = jnp.asarray(constraints.allowed)[state][:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)[None, None, :]
        may = (bits & jnp.uint32(1)).astype(bool).reshape(logits.shape[0], -1)[:, :vocab_size]
        return jnp.where(may, logits, -jnp.inf)

    # Padding rows have no tokens, and some sequence's state.
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
    """One table of several automata, as host arrays, and the state in which each starts: the aux of its requests.

    Args:
      automata: by name, for one vocabulary.
      max_automata, max_states, max_entries: sizes of the arrays, where programs take them as an argument and others are to
        fit them later: automata, states with 2 of `constrain`'s own, entries of `successor`. None: as many as there are.

    Raises:
      ValueError: if there is no automaton, if they are for different vocabularies, or if they do not fit.
    """
    parts = list(automata.values())
    vocab_sizes = {part.class_of.size for part in parts}
    if len(vocab_sizes) != 1:
        raise ValueError(f"the automata are for vocabularies of {sorted(vocab_sizes)} tokens: give automata for one")
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


def from_answers(
    answers: Sequence[str | Sequence[int]],
    *,
    vocab_size: int,
    eos_token_ids: Sequence[int],
    tokenizer: Tokenizer | None = None,
) -> TokenAutomaton:
    """One of a list of answers, token by token, then an end-of-sequence token.

    Args:
      answers: token ids, or texts. A text is spelled in the one way in which the tokenizer encodes it on its own, without
        special tokens; whether that includes a blank before its first word is the tokenizer's affair.
      vocab_size: the model's.
      eos_token_ids: as the engine has them.
      tokenizer: for texts.

    Raises:
      ValueError: if there is no answer or an empty one, if a token is not in the vocabulary or ends sequences, or if the
        answers need too many states.
    """
    _check_eos(eos_token_ids, vocab_size)
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
        _check_number("answers", len(children))
    edges = [(np.array(list(each), np.int32), np.array(list(each.values()), np.int32)) for each in children]
    return _assemble(edges, accepting, vocab_size, eos_token_ids)


def _spelled(
    answer: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> list[int]:
    if isinstance(answer, str):
        if tokenizer is None:
            raise ValueError(f"answer {answer!r} is a text, and there is no tokenizer: give one, or token ids")
        tokens = tokenizer.encode(answer, add_special_tokens=False)
    else:
        tokens = list(answer)
    if not tokens:
        raise ValueError(f"answer {answer!r} has no tokens: leave it out")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"answer {answer!r} has token {token}, which must lie in [0, vocab_size={vocab_size})")
        if token in eos_token_ids:
            raise ValueError(f"answer {answer!r} has token {token}, which ends sequences: leave it out, it is added")
    return tokens


def from_regex(pattern: str, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]) -> TokenAutomaton:
    """Texts that a regular expression matches as a whole, in every spelling that the vocabulary has.

    The text is what continues the prompt, `CompletionOutput.text`: a token that stands for a word with a blank before it
    brings that blank along, as the first one too, and the pattern must allow for it or such tokens are not drawn. A prompt
    should end with a whole character. Special tokens are never allowed, but for the end of the sequence.

    Args:
      pattern: see `jaxserve.grammar.regex`.
      tokenizer: of the byte-level or of the SentencePiece kind.
      vocab_size: the model's; ids that the tokenizer does not have are not allowed.
      eos_token_ids: as the engine has them.

    Raises:
      ValueError: as `compile_regex`; or if the tokenizer is of another kind, if its tokens cannot spell any matching text,
        or if too many states are needed.
    """
    _check_eos(eos_token_ids, vocab_size)
    automaton = compile_regex(pattern)
    tokens = _Vocabulary(token_bytes(tokenizer)[:vocab_size], eos_token_ids)
    numbers, waiting = {0: 0}, collections.deque([0])  # states of the DFA: those between two tokens
    edges: list[tuple[np.ndarray, np.ndarray]] = []
    while waiting:
        ids, targets = tokens.walk(automaton, waiting.popleft())
        for target in np.unique(targets).tolist():
            if target not in numbers:
                numbers[target] = len(numbers)
                waiting.append(target)
        _check_number(f"regular expression {pattern!r}", len(numbers))
        number_of = np.full(len(automaton.accepting), -1, np.int32)
        number_of[list(numbers)] = list(numbers.values())
        edges.append((ids, number_of[targets]))
    accepting = [bool(automaton.accepting[state]) for state in numbers]
    try:
        return _assemble(edges, accepting, vocab_size, eos_token_ids)
    except _Unspellable:
        raise ValueError(
            f"regular expression {pattern!r} matches no text that this tokenizer's tokens can spell: check its characters"
        ) from None


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The UTF-8 bytes that each token adds to a text, by id; none for special tokens and ids without a token.

    Raises:
      ValueError: if the tokenizer is neither byte-level nor of the SentencePiece kind.
    """
    parts = decoder_parts(tokenizer.backend)
    kinds = [part["type"] for part in parts]
    blanks = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    blanks += [part["pattern"].get("String") for part in parts if part["type"] == "Replace" and part["content"] == " "]
    of_sentence_piece = set(kinds) <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"} and len(blanks) == 1
    if kinds != ["ByteLevel"] and (not of_sentence_piece or blanks[0] is None):
        raise ValueError(
            f"the tokenizer's decoder is {' + '.join(kinds) or 'none'}, and regular expressions need a byte-level or a "
            "SentencePiece one, where a token is always the same bytes: use from_answers"
        )

    def one(token_id: int) -> bytes:
        token = tokenizer.backend.id_to_token(token_id)
        if token is None or token_id in tokenizer.special_token_ids:
            return b""
        if kinds == ["ByteLevel"]:
            return byte_level_bytes(token)
        if "ByteFallback" in kinds and is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(blanks[0], " ").encode()

    return [one(token_id) for token_id in range(tokenizer.vocab_size)]


class _Vocabulary:
    """The bytes of all tokens that may be allowed, one after the other."""

    def __init__(self, tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        usable = [i for i, token in enumerate(tokens) if token and i not in eos_token_ids]
        self._ids = np.array(usable, np.int32)
        self._length = np.array([len(tokens[i]) for i in usable], np.int32)
        self._first = np.cumsum(self._length) - self._length
        self._bytes = np.frombuffer(b"".join(tokens[i] for i in usable), np.uint8)

    def walk(self, automaton: ByteAutomaton, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that may come in a state, and the states that they lead to."""
        alive, state = np.arange(len(self._ids)), np.full(len(self._ids), start, np.int32)
        ids, targets, position = [self._ids[:0]], [state[:0]], 0
        while len(alive):
            state = automaton.successor[state, self._bytes[self._first[alive] + position]]
            alive, state, position = alive[state >= 0], state[state >= 0], position + 1
            ended = self._length[alive] == position
            ids.append(self._ids[alive[ended]])
            targets.append(state[ended])
            alive, state = alive[~ended], state[~ended]
        return np.concatenate(ids), np.concatenate(targets)


class _Unspellable(ValueError):
    pass


def _assemble(
    edges: Sequence[tuple[np.ndarray, np.ndarray]], accepting: Sequence[bool], vocab_size: int, eos: Sequence[int]
) -> TokenAutomaton:
    """The automaton with these edges (ids, targets) per state, without those that lead to no accepted text."""
    useful = _useful(edges, accepting)
    if 0 not in useful:
        raise _Unspellable
    number_of = np.full(len(edges), -1, np.int32)
    number_of[useful] = np.arange(len(useful))
    over = len(
        useful
    )  # the state after an end-of-sequence token, for requests that ignore it: nothing but more of them

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
        found, class_of = np.unique(class_of * (over + 2) + following + 1, return_inverse=True)
        num_classes = len(found)
    example = np.zeros(num_classes, np.int64)
    example[class_of] = np.arange(vocab_size)
    successor = np.stack([column(state)[example] for state in range(over + 1)])
    return TokenAutomaton(allowed, class_of.astype(np.int32), successor)


def _useful(edges: Sequence[tuple[np.ndarray, np.ndarray]], accepting: Sequence[bool]) -> list[int]:
    """States from which an accepting one can be reached, in order."""
    before: list[list[int]] = [[] for _ in edges]
    for state, (_, targets) in enumerate(edges):
        for target in np.unique(targets).tolist():
            before[target].append(state)
    found = {state for state, accepts in enumerate(accepting) if accepts}
    waiting = list(found)
    while waiting:
        new = set(before[waiting.pop()]) - found
        found |= new
        waiting += new
    return sorted(found)


def _check_eos(eos_token_ids: Sequence[int], vocab_size: int) -> None:
    if not eos_token_ids:
        raise ValueError("eos_token_ids is empty: without one a constrained sequence cannot end; give the model's")
    for token in eos_token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_ids has {token}, which must lie in [0, vocab_size={vocab_size})")


def _check_number(what: str, number: int) -> None:
    if number > _MAX_STATES:
        raise ValueError(
            f"{what} needs more than {_MAX_STATES} states: each costs V/8 bytes on the device; ask for less"
        )
