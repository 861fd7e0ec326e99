"""How the samples of one request share the pages of their prompt: the lending slot, the shared pages, and the rows that wait.

The samples of one request are a group. A sequence starts as a fork of another of its group that is in a slot and has computed
the prompt, with or without its last token, if there is such a sequence. With pages of 4 tokens and a prompt of 11:

    positions   0 1 2 3   4 5 6 7   8 9 10 11   12 ...
    lender      page 7    page 2    page 5      page 3
    fork        page 7    page 2    page 0                 8 and 9 copied from page 5; it computes 10 first

Every sequence computes the last token of its prompt itself, because the first new token is drawn from the hidden state there.
It shares the pages that lie wholly before that token. So no shared page is ever written: the lender has written all of it
before it is shared, and a fork writes from the prompt's last token on (promise P2). Everything that a fork reads was computed
as tokens of a prompt, just as the fork would have computed it (promise P4).

The head of the queue waits while a sequence of its group computes their prompt. This cannot deadlock (promise P3), whatever
the size of the group. A waiting head holds nothing, and it waits only while the other sequence is in a slot. Only rows ahead
of the head are admitted meanwhile, so running sequences finish: in each step the most urgent one makes progress, because it
is served first and preempted last, and when it is alone it finds pages, because the pool holds a longest sequence. So in the
end the other sequence has the prompt, or it has left its slot: finished, aborted or preempted. Then the head borrows from it,
waits for the next of its group that is in a slot, or computes the prompt itself if there is none.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxserve.core.pytree import Record, record
from jaxserve.core.scheduler.state import EngineState


@record
class Start(Record):
    """The pages that a sequence gets from another one on admission; a sequence without a lender shares 0 pages of slot 0."""

    num_computed: Int32[Array, ""]  # tokens whose keys and values are in the shared and copied pages
    lender: Int32[Array, ""]  # slot whose first pages it shares
    num_shared: Int32[Array, ""]  # pages
    copied_page: Int32[Array, ""]  # the lender's page to copy to the first page of the sequence's own; N = none
    waits: Bool[Array, ""]  # whether the sequence must not start yet, because another one computes the prompt


def start_of(state: EngineState, row: Int32[Array, ""], copied_page: Int32[Array, " S"], *, page_size: int) -> Start:
    """Returns how the sequence in queue row `row` starts if it is admitted now.

    A sequence that reports log probabilities of its prompt computes all of the prompt, and can lend to others.

    Args:
      state: a state in which no page of the slots in `copied_page` was written since.
      row: a waiting row.
      copied_page: per slot the page that must still be copied to the slot's first own page; N = none. Until then the slot
        cannot lend.
      page_size: T.
    """
    queue, slots, num_pages = state.queue, state.slots, state.table.num_pages
    last = queue.prompt_length[row] - 1
    in_group = state.active & (queue.group[slots.row_id] == queue.group[row]) & (queue.num_prompt_logprobs[row] < 0)
    has_prompt = in_group & (slots.num_computed >= last)
    lends = has_prompt & (copied_page == num_pages)
    # A sequence that ends with its first token leaves in the step that completes the prompt, so it never lends.
    stays = queue.max_length[slots.row_id] > last + 2
    lender = jnp.argmax(lends).astype(jnp.int32)
    num_computed = jnp.where(jnp.any(lends), last, 0)
    num_shared = num_computed // page_size
    is_partial = num_computed % page_size > 0
    return Start(
        num_computed=num_computed,
        lender=lender,
        num_shared=num_shared,
        copied_page=jnp.where(is_partial, state.table.page_ids[lender, num_shared], num_pages),
        waits=jnp.any(in_group & stays) & ~jnp.any(has_prompt),
    )
