"""Text to tokens and back: a thin layer over Hugging Face tokenizers, and decoding token by token.

transformers is imported when a tokenizer is loaded. Files are read from a local directory only, and no code that comes with a
checkpoint is run: transformers renders chat templates in the ImmutableSandboxedEnvironment of jinja
(`transformers.utils.chat_template_utils`, read in version 5.24; a test checks that it is so).
"""

import codecs
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import tokenizers
    import transformers

# Tokens that are decoded again with each new one: more than a character has bytes, and more than the blanks a decoder strips.
_NUM_CONTEXT = 4


class Tokenizer:
    """A tokenizer of a checkpoint; made by `load_tokenizer`."""

    def __init__(self, inner: "transformers.PreTrainedTokenizerFast") -> None:
        self._inner = inner
        self.backend: tokenizers.Tokenizer = inner.backend_tokenizer
        self.backend.no_truncation()  # a tokenizer.json may switch on both
        self.backend.no_padding()
        self.vocab_size: int = len(inner)  # added tokens included
        self.eos_token_id = cast("int | None", inner.eos_token_id)
        added = inner.added_tokens_decoder
        self.added_tokens: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self.special_token_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text, after the beginning-of-sequence token if the model uses one."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Returns the text of token ids, as transformers does with clean_up_tokenization_spaces=False.

        That clean-up is always off, because it changes the text of a token depending on the tokens after it. Ids that are not
        in the vocabulary are left out. With `spaces_between_special_tokens=False` there is no space between adjacent added
        tokens, as in vLLM; the fast tokenizers of transformers ignore that argument.
        """
        if skip_special_tokens or spaces_between_special_tokens:
            return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        decoder = IncrementalDecoder(self, skip_special_tokens=False, spaces_between_special_tokens=False)
        return "".join([*map(decoder.push, token_ids), decoder.flush()])

    def decode_token(self, token_id: int) -> str:
        """Returns the text of one token alone, even of a special token; a part of a character becomes U+FFFD."""
        return self.backend.decode([token_id], skip_special_tokens=False)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Returns the prompt that the chat template makes of messages, which have a `role` and a `content`.

        The template writes special tokens itself, so encode the result with add_special_tokens=False.

        Raises:
          ValueError: if there is no chat template, or the template refuses the messages.
        """
        if not self._inner.chat_template:
            raise ValueError(
                f"the tokenizer in {self._inner.name_or_path!r} has no chat template: "
                "add chat_template.jinja to the directory, or pass a plain prompt"
            )
        try:
            text = self._inner.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
            return cast("str", text)
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(f"the chat template refuses these messages: {error}") from error


def load_tokenizer(directory: str | pathlib.Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint directory.

    Raises:
      ValueError: if the directory or its tokenizer files are missing, malformed, or need code that is not in
        transformers.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"tokenizer directory {str(directory)!r} does not exist: give a directory with tokenizer.json")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{str(directory)!r} has no tokenizer files: tokenizer.json is missing")
    import transformers

    try:
        inner = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and tokenizers raise bare Exception, OSError, KeyError and more
        raise ValueError(f"cannot load the tokenizer in {str(directory)!r}: {_one_line(error)}") from error
    if not isinstance(inner, transformers.PreTrainedTokenizerFast):
        raise ValueError(
            f"the tokenizer in {str(directory)!r} is not a fast tokenizer: add tokenizer.json to the directory"
        )
    return Tokenizer(inner)


def load_eos_token_ids(directory: str | pathlib.Path) -> tuple[int, ...]:
    """Reads the end-of-sequence ids of a checkpoint from generation_config.json, or else from config.json.

    Nothing else is read from generation_config.json: sampling defaults are those of `SamplingParams` for every checkpoint, so
    that a request means the same everywhere. The result is empty if neither file has an id.

    Raises:
      ValueError: if a file is malformed.
    """
    for name in ("generation_config.json", "config.json"):
        path = pathlib.Path(directory) / name
        if not path.is_file():
            continue
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path} must be a JSON object")
        value = fields.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token_id) is not int or token_id < 0 for token_id in ids):
            raise ValueError(f"{path}: eos_token_id={value!r} must be a token id or a list of token ids")
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


class IncrementalDecoder:
    """A decoder that turns a sequence into text token by token, in O(1) amortised time per token.

    The text that `push` returns is final: it never ends within a character, and no later token changes it. Together with the
    result of `flush` it is the text of the whole sequence, with U+FFFD for invalid bytes.

    If characters without a token are spelled in byte tokens (`<0xE4>`, SentencePiece), the decoder holds back a run of them
    until it ends, since one invalid byte makes the whole run invalid.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        """Starts a sequence.

        Args:
          tokenizer: the tokenizer of the sequence.
          skip_special_tokens: whether special tokens are left out.
          spaces_between_special_tokens: see `Tokenizer.decode`; it has no effect if special tokens are left out.
          context: tokens before the sequence, such as the prompt. Their text is not returned, but without them a decoder may
            drop the blank with which the first word starts.
        """
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        raw = {} if skip_special_tokens or spaces_between_special_tokens else tokenizer.added_tokens
        kinds = [part["type"] for part in decoder_parts(tokenizer.backend)]
        if kinds == ["ByteLevel"]:
            self._stream: _Stream = _ByteStream(tokenizer.backend)
        else:
            self._stream = _WindowStream(tokenizer.backend, kinds, raw)
        for token_id in self._tail(tokenizer, context):
            self._stream.push(token_id)

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that becomes final, which may be empty."""
        return "" if token_id in self._skipped else self._stream.push(token_id)

    def flush(self) -> str:
        """Ends the sequence; returns the text that was held back."""
        return self._stream.flush()

    def _tail(self, tokenizer: Tokenizer, context: Sequence[int]) -> list[int]:
        """Returns the end of the context: its last few tokens that are no byte tokens, and all tokens between them."""
        tail: list[int] = []
        num_whole = 0
        for token_id in reversed(context):
            if num_whole == _NUM_CONTEXT:
                break
            if token_id not in self._skipped:
                tail.append(token_id)
                num_whole += not is_byte_token(tokenizer.backend.id_to_token(token_id))
        return tail[::-1]


def spell(words: Sequence[str | tuple[int, ...]], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Returns the token sequences that spell words: at the start of a text, and after a blank if that differs.

    The spelling after a blank is left out if it ends with the other one, which is then completed with it. Lists of token ids
    stay as they are.

    Raises:
      ValueError: if the tokenizer makes no tokens of a word.
    """
    spellings: list[tuple[int, ...]] = []
    for word in words:
        if not isinstance(word, str):
            spellings.append(word)
            continue
        alone = tuple(tokenizer.encode(word, add_special_tokens=False))
        if not alone:
            raise ValueError(f"bad_words has {word!r}, of which the tokenizer makes no tokens: leave it out")
        after_blank = tuple(tokenizer.encode(word if word[0] == " " else f" {word}", add_special_tokens=False))
        spellings += [alone] if after_blank[-len(alone) :] == alone else [alone, after_blank]
    return tuple(dict.fromkeys(spellings))


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class _ByteStream:
    """A stream of tokens that are bytes (byte-level BPE). It decodes UTF-8 and holds back at most three bytes."""

    def __init__(self, backend: "tokenizers.Tokenizer") -> None:
        self._backend = backend
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(byte_level_bytes(self._backend.id_to_token(token_id) or ""))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """A stream for any other decoder. It decodes the last few tokens again and returns the text that is new."""

    def __init__(self, backend: "tokenizers.Tokenizer", kinds: list[str], raw: Mapping[int, str]) -> None:
        self._backend = backend
        self._has_byte_tokens = "ByteFallback" in kinds
        self._may_split_characters = "ByteLevel" in kinds  # among other decoders
        self._raw = raw  # added tokens whose text is joined without a space
        self._after_raw = False
        self._window: list[int] = []
        self._num_settled = (
            0  # characters at the start of the window's text that were returned, or belong to the context
        )

    def push(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return ""
        self._window.append(token_id)
        after_raw, self._after_raw = self._after_raw, token_id in self._raw
        if after_raw and self._after_raw:
            self._settle(self._may_split_characters)
            return self._raw[token_id]
        if self._has_byte_tokens and is_byte_token(token):
            return ""
        return self._settle(self._may_split_characters)

    def flush(self) -> str:
        return self._settle(may_end_within_character=False)

    def _settle(self, may_end_within_character: bool) -> str:
        def settled(token_ids: list[int]) -> str:
            text = self._backend.decode(token_ids, skip_special_tokens=False)
            return text.removesuffix("\ufffd") if may_end_within_character else text

        new = settled(self._window)[self._num_settled :]
        self._window = self._window[-_NUM_CONTEXT:]
        self._num_settled = len(settled(self._window))
        return new


def decoder_parts(backend: "tokenizers.Tokenizer") -> list[dict[str, Any]]:
    """Returns the descriptions, as in tokenizer.json, of the decoders that run one after the other."""
    if backend.decoder is None:
        return []
    described = json.loads(backend.decoder.__getstate__())
    return described.get("decoders", [described])


def is_byte_token(token: str | None) -> bool:
    """Returns whether a token stands for one byte, such as <0xE4>."""
    return token is not None and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) is not None


def byte_level_bytes(token: str) -> bytes:
    """Returns the bytes that a byte-level token stands for; for an added token with other characters, its UTF-8."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Returns the alphabet of GPT-2 (Radford et al., 2019), which has a printable character for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _one_line(error: Exception) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), type(error).__name__)
