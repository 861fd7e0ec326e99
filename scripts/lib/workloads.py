"""Workloads of benchmarks: prompts as token ids and an output length for each, made from flags and a seed.

    --dataset=random   random tokens
    --dataset=prefix   random tokens behind one of a few shared prefixes, such as system prompts
    --dataset=jsonl    the lines of a file, as `python -m jaxserve.generate --prompts_file` reads them

Every request is greedy and goes on past end-of-sequence tokens, so that each engine does the same work. Without flags the
workload is W48: 48 requests, prompts uniform from 16 to 128 tokens, outputs log-uniform from 16 to 256, seed 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from jaxserve import SamplingParams
from jaxserve.commands.prompts import ChatRequest, PromptError, read_prompts
from jaxserve.text.tokenizer import Tokenizer

DATASETS = ("random", "prefix", "jsonl")
LENGTHS = ("fixed", "uniform", "loguniform", "geometric", "heavy", "bimodal")
WORKLOAD = "Workload"  # heading of the flags in --help
_LONG_SHARE = 1 / 8  # share of long lengths in the bimodal distribution
_MAX_SEED = 2**31 - 1
_UNSET = 2**31 - 1  # stands for a line without max_tokens
_FLAGS_OF = {
    "prefix_len": ("prefix",),
    "num_prefixes": ("prefix",),
    "prompts_file": ("jsonl",),
    "prompt_lengths": ("random", "prefix"),
    "shortest_prompt": ("random", "prefix"),
    "longest_prompt": ("random", "prefix"),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests in a form that every engine can serve.

    Attributes:
      prompts: token ids.
      output_lengths: exact number of tokens to generate for each prompt.
    """

    prompts: list[list[int]]
    output_lengths: list[int]

    @property
    def params(self) -> list[SamplingParams]:
        """Sampling parameters: greedy, exactly the output length, no text."""
        return [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in self.output_lengths
        ]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.output_lengths, strict=True))

    def __len__(self) -> int:
        return len(self.prompts)


def draw_lengths(distribution: str, low: int, high: int, count: int, rng: np.random.Generator) -> list[int]:
    """Draws lengths from `low` to `high`, both included.

        fixed       all are equal: low must be high
        uniform     mean (low + high) / 2
        loguniform  every octave is equally likely; mean near (high - low) / ln(high / low)
        geometric   an exponential tail cut at high; mean near low + (high - low) / 5
        heavy       bounded Pareto, density as 1 / length^2; mean near ln(high / low) low high / (high - low): the longest are
                    many times the mean
        bimodal     high with probability 1/8, else low; mean (7 low + high) / 8

    Raises:
      ValueError: if the distribution is unknown, or the bounds are out of order.
    """
    if not 1 <= low <= high:
        raise ValueError(f"lengths from {low} to {high}: the shortest must be at least 1 and at most the longest")
    if distribution == "fixed":
        if low != high:
            raise ValueError(f"fixed lengths from {low} to {high}: the shortest must be the longest")
        return [low] * count
    if distribution == "uniform":
        drawn = rng.integers(low, high + 1, count)
    elif distribution == "loguniform":
        drawn = np.exp(rng.uniform(np.log(low), np.log(high), count))
    elif distribution == "geometric":
        mean, room = max(high - low, 1) / 5, high + 1 - low
        drawn = low - mean * np.log1p(-rng.random(count) * -np.expm1(-room / mean))
    elif distribution == "heavy":
        drawn = 1 / (1 / low - rng.random(count) * (1 / low - 1 / (high + 1)))
    elif distribution == "bimodal":
        drawn = np.where(rng.random(count) < _LONG_SHARE, high, low)
    else:
        raise ValueError(f"lengths {distribution!r} are unknown: use {', '.join(LENGTHS)}")
    return np.clip(drawn.astype(int), low, high).tolist()


def define_flags(values: flags.FlagValues, **defaults: Any) -> None:
    """Defines the flags that `workload_from_flags` reads; `defaults` replace those of W48."""
    to: dict[str, Any] = {"flag_values": values, "module_name": WORKLOAD}

    def default(name: str, value: Any) -> Any:
        return defaults.pop(name, value)

    flags.DEFINE_enum("dataset", default("dataset", "random"), list(DATASETS), "Where prompts come from.", **to)
    flags.DEFINE_integer("num_requests", default("num_requests", 48), "Number of requests.", lower_bound=1, **to)
    for kind, lengths, low, high in (("prompt", "uniform", 16, 128), ("output", "loguniform", 16, 256)):
        flags.DEFINE_enum(
            f"{kind}_lengths",
            default(f"{kind}_lengths", lengths),
            list(LENGTHS),
            f"Distribution of {kind} lengths.",
            **to,
        )
        for end, bound in (("shortest", low), ("longest", high)):
            name = f"{end}_{kind}"
            flags.DEFINE_integer(name, default(name, bound), f"Tokens of the {end} {kind}.", lower_bound=1, **to)
    flags.DEFINE_integer(
        "prefix_len", default("prefix_len", 64), "prefix: tokens of each shared prefix.", lower_bound=1, **to
    )
    flags.DEFINE_integer("num_prefixes", default("num_prefixes", 1), "prefix: number of prefixes.", lower_bound=1, **to)
    flags.DEFINE_string("prompts_file", default("prompts_file", None), "jsonl: a file of prompts.", **to)
    flags.DEFINE_integer(
        "seed", default("seed", 0), "Seed of the workload.", lower_bound=0, upper_bound=_MAX_SEED, **to
    )
    if defaults:
        raise TypeError(f"no flags of the workload: {', '.join(defaults)}")


def workload_from_flags(values: flags.FlagValues, vocab_size: int, tokenizer: Tokenizer | None = None) -> Workload:
    """Makes the workload that the flags describe.

    Args:
      values: parsed flags.
      vocab_size: size of the model's vocabulary; random tokens are below it.
      tokenizer: encodes the texts of a file; None: the file must have token ids.

    Raises:
      ValueError: if a flag's value is not valid or has no effect on the dataset, or the file is not valid.
    """
    for name, datasets in _FLAGS_OF.items():
        if values[name].present and values.dataset not in datasets:
            raise ValueError(f"--{name} has no effect on --dataset={values.dataset}: leave it out")
    rng = np.random.default_rng(values.seed)
    if values.dataset == "jsonl":
        return _from_file(values, vocab_size, tokenizer, rng)
    lengths = _draw(values, "prompt", rng)
    outputs = _draw(values, "output", rng)
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
    if values.dataset == "prefix":
        prefixes = rng.integers(0, vocab_size, (values.num_prefixes, values.prefix_len)).tolist()
        prompts = [prefixes[index % len(prefixes)] + prompt for index, prompt in enumerate(prompts)]
    return Workload(prompts, outputs)


def describe_workload(values: flags.FlagValues) -> dict[str, Any]:
    """Returns the flags that matter for the dataset, for records."""
    names = (flag.name for flag in values.flags_by_module_dict()[WORKLOAD])
    return {name: values[name].value for name in names if values.dataset in _FLAGS_OF.get(name, DATASETS)}


def _draw(values: flags.FlagValues, kind: str, rng: np.random.Generator) -> list[int]:
    distribution: Any = values[f"{kind}_lengths"].value
    low, high = (int(values[f"{end}_{kind}"].value or 0) for end in ("shortest", "longest"))
    try:
        return draw_lengths(distribution, low, high, values.num_requests, rng)
    except ValueError as error:
        raise ValueError(f"--{kind}_lengths: {error} (--shortest_{kind}, --longest_{kind})") from None


def _from_file(
    values: flags.FlagValues, vocab_size: int, tokenizer: Tokenizer | None, rng: np.random.Generator
) -> Workload:
    """Reads the first lines of the file; those without max_tokens get drawn output lengths."""
    path = values.prompts_file
    if path is None:
        raise ValueError("--dataset=jsonl needs --prompts_file")
    drawn = _draw(values, "output", rng)
    prompts, outputs = [], []
    for entry, length in zip(read_prompts(path, SamplingParams(max_tokens=_UNSET), "jsonl"), drawn, strict=False):
        if isinstance(entry, PromptError):
            raise ValueError(entry.message)
        request = entry.render(tokenizer) if isinstance(entry, ChatRequest) else entry
        ids = request.prompt_token_ids
        if ids is None:
            if tokenizer is None:
                raise ValueError(
                    f"{path}: {request.id!r} is text and the model has no tokenizer: give prompt_token_ids"
                )
            ids = tokenizer.encode(str(request.prompt), add_special_tokens=True)
        _check_ids(ids, vocab_size, f"{path}: {request.id!r}")
        prompts.append(list(ids))
        outputs.append(length if request.params.max_tokens == _UNSET else request.params.max_tokens)
    if len(prompts) < values.num_requests:
        raise ValueError(
            f"{path} has {len(prompts)} prompts, fewer than --num_requests={values.num_requests}: lower it"
        )
    return Workload(prompts, outputs)


def _check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    if not ids or max(ids) >= vocab_size:
        raise ValueError(f"{name}: token ids must be at least one, and below {vocab_size}, the size of the vocabulary")
