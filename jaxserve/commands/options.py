"""The flags of `python -m jaxserve.generate`, and the checked record that they are turned into."""

import dataclasses
from typing import Any

from absl import flags

from jaxserve.commands.flags import (
    PROMPTS,
    EngineOptions,
    define_engine_flags,
    define_sampling_flags,
    define_timeline_flag,
    describe_flags,
    engine_options,
    sampling_params,
)
from jaxserve.request import SamplingParams

INTERRUPTED = 130  # the exit status after Ctrl-C, as in shells
_MAX_TOKENS = 128
_MAX_TOKENS_CHAT = 1024
_USAGE = """\
Generates text for prompts, with continuous batching.

  python -m jaxserve.generate --prompt "def fibonacci(n):" --temperature 0
  python -m jaxserve.generate --prompts_file prompts.jsonl --output results.jsonl
  python -m jaxserve.generate --model Qwen/Qwen3-0.6B --chat --stream

A line of a prompts file may set parameters of its own: {"prompt": "Once upon", "temperature": 0.7}.
--helpfull lists the flags of absl too."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The values of all flags, checked."""

    prompts: tuple[str, ...]
    prompts_file: str | None
    output: str | None
    chat: bool
    system: str | None
    stream: bool
    timeline: str | None
    params: SamplingParams
    engine: EngineOptions

    @property
    def interactive(self) -> bool:
        """Whether the prompts come from a user at the terminal."""
        return not self.prompts and self.prompts_file is None


def define_flags(values: flags.FlagValues) -> None:
    """Defines all flags of the command."""
    to: dict[str, Any] = {"flag_values": values, "module_name": PROMPTS}
    flags.DEFINE_multi_string("prompt", [], "A text to continue.", **to)
    flags.DEFINE_string(
        "prompts_file",
        None,
        "A file of prompts: one JSON object per line if its name ends in .jsonl, else one text per line.",
        **to,
    )
    flags.DEFINE_string("output", None, "A file for the results, which are written as JSON lines.", **to)
    flags.DEFINE_boolean("stream", False, "Print text while it is generated.", **to)
    flags.DEFINE_boolean(
        "chat",
        False,
        "Send each prompt as a user's message, through the model's chat template. In a terminal, with --stream and "
        "without a prompt, this starts a conversation.",
        **to,
    )
    flags.DEFINE_string("system", None, "The system message of a chat.", **to)
    define_timeline_flag(values)
    define_engine_flags(values, max_waiting="no bound")
    define_sampling_flags(values, max_tokens=f"{_MAX_TOKENS}, in a chat {_MAX_TOKENS_CHAT}")


def help_text(values: flags.FlagValues) -> str:
    """Returns the text that --help prints."""
    return f"{_USAGE}\n\n{describe_flags(values)}"


def parse_options(values: flags.FlagValues, *, in_terminal: bool) -> Options:
    """Turns flags into options.

    Args:
      values: the parsed flags.
      in_terminal: whether stdin is a terminal, so that a conversation is possible.

    Raises:
      ValueError: if the value of a flag is not valid, or a flag has no effect beside the others.
    """
    options = Options(
        prompts=tuple(values.prompt),
        prompts_file=values.prompts_file,
        output=values.output,
        chat=values.chat,
        system=values.system,
        stream=values.stream,
        timeline=values.timeline,
        params=sampling_params(values, max_tokens=_MAX_TOKENS_CHAT if values.chat else _MAX_TOKENS),
        engine=engine_options(values, max_waiting=None),  # all prompts are in memory anyway
    )
    if options.interactive and not (options.chat and options.stream and in_terminal):
        raise ValueError(
            'there is nothing to do: give --prompt "some text" or --prompts_file FILE, or --chat --stream in a terminal'
        )
    if options.interactive and (options.params.n > 1 or not options.params.detokenize):
        raise ValueError("a conversation continues from the text of one answer: leave out --n and --nodetokenize")
    if options.stream and options.output is not None:
        raise ValueError("--stream prints text and --output writes a file: use one of them")
    if options.system is not None and not options.chat:
        raise ValueError("--system is the system message of a chat: add --chat")
    if options.timeline is not None:
        from jaxserve.timeline import check_path  # brings JAX, which a timeline needs anyway

        check_path(options.timeline)
    for name in ("logprobs", "prompt_logprobs"):
        if values[name].value is not None and options.output is None:
            raise ValueError(f"--{name} is reported in JSON lines only: add --output FILE")
    return options
