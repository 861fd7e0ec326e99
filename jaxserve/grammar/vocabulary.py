"""The vocabulary of a tokenizer as bytes: what each token adds to a text, and which tokens an automaton over bytes accepts."""

from collections.abc import Sequence

import numpy as np

from jaxserve.grammar.regex import ByteAutomaton
from jaxserve.text.tokenizer import Tokenizer, byte_level_bytes, decoder_parts, is_byte_token


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Returns the UTF-8 bytes that each token adds to a text, by id. Special tokens and ids without a token add none.

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


class Vocabulary:
    """The bytes of all tokens that may be allowed, in one array."""

    def __init__(self, tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        usable = [i for i, token in enumerate(tokens) if token and i not in eos_token_ids]
        self._ids = np.array(usable, np.int32)
        self._length = np.array([len(tokens[i]) for i in usable], np.int32)
        self._first = np.cumsum(self._length) - self._length
        self._bytes = np.frombuffer(b"".join(tokens[i] for i in usable), np.uint8)

    def walk(self, automaton: ByteAutomaton, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of the tokens that may come in a state, and the states that they lead to."""
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
