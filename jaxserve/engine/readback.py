"""What comes back from the device, handed to the sequences that it is about."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxserve.core.scheduler import Status
from jaxserve.core.step import StepOutputs
from jaxserve.engine.live_requests import LiveSample

# Gets what a call did, in arrays of the host, which share one buffer: copy what you keep; the samples in queue rows, those that
# end in this call included; and how many more samples waited on the host.
Observer = Callable[[StepOutputs, Mapping[int, LiveSample], int], None]


def take_prompt_logprobs(outputs: StepOutputs, by_row: Mapping[int, LiveSample]) -> None:
    """Hands what is known of prompt tokens to the requests that asked; `by_row` maps queue rows to sequences."""
    prompt: Any = outputs.steps.prompt
    if prompt is None:
        return
    for index, place in np.argwhere(prompt.row_id[: int(outputs.num_steps)] < len(outputs.status)).tolist():
        by_row[int(prompt.row_id[index, place])].group.add_prompt_logprob(
            int(prompt.position[index, place]),
            float(prompt.logprob[index, place]),
            int(prompt.rank[index, place]),
            prompt.top_ids[index, place],
            prompt.top_logprobs[index, place],
        )


def take_tokens(outputs: StepOutputs, by_row: Mapping[int, LiveSample]) -> dict[int, LiveSample]:
    """Hands every drawn token to its sequence; returns the sequences that got some, by row."""
    steps, touched = outputs.steps, {}
    drawn: Any = steps.drawn
    where = np.nonzero(steps.sampled[: int(outputs.num_steps)])
    fields: Any = (steps.row_id, drawn.token, drawn.logprob, drawn.rank, steps.status)
    columns = (field[where].tolist() for field in fields)
    for index, slot, row, token, logprob, rank, status in zip(*where, *columns, strict=True):
        sequence = by_row[row]
        if sequence.finished:
            continue
        touched[row] = sequence
        top = drawn.top_ids[index, slot], drawn.top_logprobs[index, slot]
        sequence.append(token, logprob, rank, *top, Status(status))
    return touched
