"""Seeded bugs: each must be caught by the oracle or by the invariants, else the scheduler's tests are worth little.

A bug is a replacement in the source of a function, so that it stands here as it would stand in a careless change. If
the text to be replaced is gone, the code has moved on: restate the bug in the new words.
"""

import dataclasses
import inspect
import textwrap

import pytest

from jaxserve.core.cache import page_table
from jaxserve.core.scheduler import InvariantError, forks, policy, submission, transitions
from tests.core.scheduler import traces

MODULES = (page_table, forks, policy, submission, transitions)
MAX_STEPS = 512  # within which a bug must be found
SEED = 22934  # by step 250 of its trace, everything that the bugs concern has happened


@dataclasses.dataclass(frozen=True)
class Edit:
    """A replacement in the source of a function."""

    function: str
    old: str
    new: str


MUTANTS: dict[str, Edit | tuple[Edit, ...]] = {
    # Pages.
    "a preempted sequence keeps its pages": Edit("preempt", "release(occupancy.table, slot)", "occupancy.table"),
    "a finished sequence keeps its pages": Edit("_vacate", "release_each(state.table, leaving)", "state.table"),
    "one page more is freed than given back": Edit(
        "release",
        "table.num_free + jnp.sum(freed, dtype=jnp.int32)",
        "table.num_free + 1 + jnp.sum(freed, dtype=jnp.int32)",
    ),
    "a page given out stays free": Edit("_pop", "table.num_free - num_pages", "table.num_free"),
    "reference counts are not taken down": Edit(
        "release", "reference_count=count", "reference_count=table.reference_count"
    ),
    "a new page goes to the wrong index": Edit("allocate_each", "granted, page_index", "granted, page_index + 1"),
    "full pages need one more": Edit(
        "admit",
        "_ceil_div(state.queue.num_tokens[row], config.page_size)",
        "state.queue.num_tokens[row] // config.page_size + 1",
    ),
    "the page boundary is seen one token late": Edit(
        "_page_to_write", "state.slots.num_computed //", "(state.slots.num_computed - 1) //"
    ),
    # Who goes first.
    "the shortest overtakes": Edit("next_waiting", "(first, queue.arrival", "(first, queue.num_tokens"),
    "priorities do not count": Edit("next_waiting", "first = waiting & (queue.priority == lowest)", "first = waiting"),
    "no page is kept for decoding slots": Edit("may_admit", "num_needed + num_decoding", "num_needed"),
    "the next sequence gets a busy slot": Edit("admit", "jnp.argmin(now.active)", "jnp.argmax(now.active)"),
    "a sequence starts with what its slot's last one had": Edit(
        "admit", "num_computed.at[slot].set(start.num_computed)", "num_computed"
    ),
    # Who has to go.
    "the victim is the oldest": Edit(
        "victim",
        "jnp.argmax(jnp.where(last, state.queue.arrival[row], -1))",
        "jnp.argmin(jnp.where(last, state.queue.arrival[row], _LAST))",
    ),
    "the victim's priority does not count": Edit(
        "victim", "last = state.active & (priority == jnp.max(priority))", "last = state.active"
    ),
    "a preempted sequence goes to the end of the queue": Edit(
        "next_waiting",
        "(first, queue.arrival",
        "(first, queue.arrival + 1_000_000 * queue.num_preemptions",
    ),
    # What the samples of one request share.
    "the page of the prompt's last token is shared": Edit(
        "start_of", "num_shared = num_computed // page_size", "num_shared = (num_computed + 1) // page_size"
    ),
    "the partial page is shared": Edit(
        "start_of", "num_shared = num_computed // page_size", "num_shared = -(-num_computed // page_size)"
    ),
    "the partial page is not copied": Edit("start_of", "num_computed % page_size > 0", "num_computed < 0"),
    "the copy goes to the next page": Edit(
        "plan", "_page_to_write(state, config)", "_page_to_write(state, config) + 1"
    ),
    "a page is lent before it is filled": Edit("start_of", "has_prompt & (copied_page == num_pages)", "has_prompt"),
    "the prompt is lent before it is computed": Edit(
        "start_of", "slots.num_computed >= last", "slots.num_computed >= last - 1"
    ),
    "a fork does not compute the prompt's last token": Edit(
        "start_of", "jnp.any(lends), last, 0", "jnp.any(lends), last + 1, 0"
    ),
    "other requests share too": Edit("start_of", "(queue.group[slots.row_id] == queue.group[row]) & ", ""),
    "sharing does not count as a reference": Edit(
        "share", 'table.reference_count.at[shared].add(1, mode="drop")', "table.reference_count"
    ),
    "new pages take the place of shared ones": Edit("allocate", " - num_held", ""),
    "shared pages count as new": Edit("admit", " - start.num_shared", ""),
    "no row waits for the prompt": Edit("start_of", "jnp.any(in_group & stays)", "False"),
    "a wait for one that leaves": Edit("start_of", "jnp.any(in_group & stays)", "jnp.any(in_group)"),
    "a wait although the prompt is there": Edit("start_of", " & ~jnp.any(has_prompt)", ""),
    "who reports on its prompt does not compute it": Edit("start_of", " & (queue.num_prompt_logprobs[row] < 0)", ""),
    # What a step computes.
    "chunks go by slot": Edit(
        "service_order",
        "(group, state.queue.priority[row], state.queue.arrival[row], slots)",
        "(group, slots, slots, slots)",
    ),
    "decode rows come last": Edit(
        "service_order",
        "jnp.where(decoding, 0, jnp.where(state.active, 1, 2))",
        "jnp.where(decoding, 1, jnp.where(state.active, 0, 2))",
    ),
    "the chunk is one token too long": Edit("plan", "config.chunk_size - before", "config.chunk_size + 1 - before"),
    "a slot's decode row is missing": Edit(
        "plan", "before, 0, num_left), num_left)", "before, 0, num_left), jnp.where(order == 1, 0, num_left))"
    ),
    "every chunk draws a token": Edit("samples", "num_new == remaining(state)", "num_new > 0"),
    # How it ends.
    "stop tokens do not count": Edit(
        "advance", "jnp.any(stop_token_ids == token[:, None], axis=1)", "jnp.zeros_like(sampled)"
    ),
    "length goes before stop": Edit(
        "advance",
        "jnp.where(stopped, Status.STOP.value, jnp.where(full, Status.LENGTH.value, Status.RUNNING.value))",
        "jnp.where(full, Status.LENGTH.value, jnp.where(stopped, Status.STOP.value, Status.RUNNING.value))",
    ),
    "one token too many": Edit("advance", "length + 1 >=", "length >="),
    "slots are given back a step late": Edit(
        "finish_step", "retire(advance(state, num_new, token))", "advance(retire(state), num_new, token)"
    ),
    # What owners do.
    "waiting sequences cannot be aborted": Edit(
        "apply_aborts", "queue.abort_requested & unfinished", "queue.abort_requested & (queue.status == Status.RUNNING)"
    ),
    "a later abort wins over a finish": (
        Edit("abort", "mask & unfinished &", "mask &"),
        Edit("apply_aborts", "queue.abort_requested & unfinished", "queue.abort_requested"),
    ),
    "an abort hits the row's next sequence": Edit(
        "abort", "(generation == queue.generation)", "(generation <= queue.generation)"
    ),
    "a sequence is collected while it runs": Edit(
        "collect", "queue.status >= Status.STOP", "queue.status >= Status.RUNNING"
    ),
    "a request is taken in part": Edit("submit", "free[order[last]]", "free[order]"),
    "each sample is alone": Edit("submit", "state.next_arrival + order[first]", "state.next_arrival + order"),
    "a row belongs to the one before padding": Edit("_ends_of_groups", " & jnp.roll(submission.valid, 1)", ""),
    "samples of one request may have different prompts": Edit(
        "_acceptable", "(submission.tokens == submission.tokens[first]) | ~in_prompt", "in_prompt | True"
    ),
    "max_tokens is not clipped": Edit(
        "submit",
        "submission.max_tokens, queue.tokens.shape[1] - submission.prompt_length",
        "submission.max_tokens, 2 * queue.tokens.shape[1]",
    ),
}


def apply(edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    (home,) = [
        module for module in MODULES if getattr(vars(module).get(edit.function), "__module__", None) == module.__name__
    ]
    original = vars(home)[edit.function]
    source = textwrap.dedent(inspect.getsource(original))
    assert source.count(edit.old) == 1, f"{edit.old!r} is not (once) in {edit.function}: restate the bug"
    scratch: dict[str, object] = {}
    exec(source.replace(edit.old, edit.new), vars(home), scratch)
    for module in MODULES:
        if vars(module).get(edit.function) is original:
            monkeypatch.setattr(module, edit.function, scratch[edit.function])


def run() -> None:
    device = traces.Device(traces.CONFIGS["minimal pool"], compiler_options=traces.FAST_COMPILE)
    traces.run_trace(device, seed=SEED, num_steps=MAX_STEPS)


def test_without_a_bug_nothing_is_found():
    run()


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_each_seeded_bug_is_found(name, monkeypatch):
    edits = MUTANTS[name]
    for edit in edits if isinstance(edits, tuple) else (edits,):
        apply(edit, monkeypatch)
    with pytest.raises((traces.Mismatch, InvariantError)):
        run()
