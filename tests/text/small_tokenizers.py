"""Small tokenizers with every kind of decoder, trained or written on the spot, for tests."""

import functools
import tempfile

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxserve.text.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat, and the dog did not.",
    "  two  spaces\nand\n\nlines\t",
    "naïve café, Übergröße, señor",
    "日本語の文章です。中文字符也在这里。",
    "smiles 😀😃👩‍👩‍👧 and flags 🇩🇪🇫🇷",
]
SPECIAL = ["<s>", "</s>", "<|end|>"]


def _byte_level(may_split: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if may_split:
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _byte_fallback() -> tokenizers.Tokenizer:
    """Makes a tokenizer like that of Llama 2: pieces with U+2581 for a blank, and bytes for characters without a piece."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", *"abcdehnorstu,.", "é", "日", "▁t", "▁th", "▁the", "▁c", "at"]
    merges = [("▁", "▁"), ("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "c"), ("a", "t")]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def _metaspace() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<s>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _word_piece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _suffix() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _no_decoder() -> tokenizers.Tokenizer:
    words = {word: i for i, word in enumerate([*SPECIAL, "the", "cat", "日本"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {
    "byte level": _byte_level,
    "byte level, then another": functools.partial(_byte_level, may_split=True),
    "byte fallback": _byte_fallback,
    "metaspace": _metaspace,
    "word piece": _word_piece,
    "suffix": _suffix,
    "no decoder": _no_decoder,
}


@functools.cache
def hugging_face_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer of transformers, loaded from files."""
    with tempfile.TemporaryDirectory() as directory:
        backend = KINDS[kind]()
        backend.add_tokens(["addéd", "[plain]"])
        inner = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        inner.save_pretrained(directory)
        return transformers.AutoTokenizer.from_pretrained(directory)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Returns the tokenizer of the package around it."""
    return Tokenizer(hugging_face_tokenizer(kind))
