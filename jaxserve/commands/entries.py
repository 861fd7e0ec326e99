"""The prompts that one command line serves: those of its --prompt flags, then the lines of its prompts file."""

from jaxserve.commands.options import Options
from jaxserve.commands.prompts import ChatRequest, Entry, free_id, read_prompts
from jaxserve.request import Request


def read_entries(options: Options) -> list[Entry]:
    """Returns the prompts of the flags, named prompt-1, prompt-2, ..., and then those of the file, all under different ids.

    Raises:
      ValueError: if the file cannot be read, or there is no prompt in it.
    """
    path = options.prompts_file
    lines = [] if path is None else list(read_prompts(path, options.params))
    ids = {entry.id for entry in lines}
    prompts = [
        Request(free_id(f"prompt-{number}", ids), prompt=prompt, params=options.params)
        for number, prompt in enumerate(options.prompts, start=1)
    ]
    entries = [_as_chat(entry, options) for entry in [*prompts, *lines]]
    if not entries:
        raise ValueError(f"the file {path!r} has no prompts: give one per line")
    return entries


def _as_chat(entry: Entry, options: Options) -> Entry:
    """Applies --chat and --system to an entry. A prompt of token ids stays as it is."""
    if options.chat and isinstance(entry, Request) and entry.prompt is not None:
        entry = ChatRequest(entry, ({"role": "user", "content": entry.prompt},))
    if options.system is not None and isinstance(entry, ChatRequest):
        entry = entry.with_system(options.system)
    return entry
