"""Trains the demo model's byte-level BPE tokenizer and encodes the corpus with it.

    python scripts/demo/tokenizer.py --work_dir=../demo_work

reads the files of `corpus.py`, and writes `<work_dir>/tokenizer/` (Hugging Face layout), `<work_dir>/train.npy` and
`<work_dir>/heldout.npy` (uint16 token ids, `<|endoftext|>` before every file), and `<work_dir>/sizes.json` (bytes of text).
"""

import json
import pathlib
from collections.abc import Iterable

import numpy as np
import tokenizers
from absl import app, flags, logging
from demo import corpus as demo_corpus
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
VOCAB_SIZE = 2048

# A token never crosses one of these pieces. Line ends take the indentation that follows, so "newline, eight spaces"
# is one token; a word takes one blank or mark before it (" def", ".append", "_name"); digits stand alone.
_PIECES = r"(?:\r?\n)+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?!\S)|[ \t]+|\s+"


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE (Sennrich et al., 2016); its vocabulary has all 256 bytes, so any text comes back unchanged."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path, context: int = 512) -> None:
    """Writes the three files that `transformers.AutoTokenizer` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load(directory: pathlib.Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> np.ndarray:
    """Returns the ids of all texts, with `<|endoftext|>` before each and at the end."""
    pieces = [np.array([END_OF_TEXT_ID, *encoding.ids], np.uint16) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([*pieces, np.array([END_OF_TEXT_ID], np.uint16)])


def main(_) -> None:
    work_dir = pathlib.Path(WORK_DIR.value)
    corpus = {name: demo_corpus.load(work_dir / f"{name}.jsonl") for name in ("train", "heldout")}
    tokenizer = train(text for _, text in corpus["train"])
    save(tokenizer, work_dir / "tokenizer")
    sizes = {}
    for name, sources in corpus.items():
        texts = [text for _, text in sources]
        tokens = encode(tokenizer, texts)
        np.save(work_dir / f"{name}.npy", tokens)
        num_bytes = sizes[name] = sum(len(text.encode()) for text in texts)
        logging.info("%s: %d tokens, %.3f bytes per token", name, len(tokens), num_bytes / len(tokens))
    (work_dir / "sizes.json").write_text(json.dumps(sizes) + "\n")


if __name__ == "__main__":
    WORK_DIR = flags.DEFINE_string("work_dir", None, "Folder of the corpus, and for the tokens.", required=True)
    app.run(main)
