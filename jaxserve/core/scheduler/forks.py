"""The samples of one request share the pages of their prompt: who lends them, which they are, and who waits for them.

A sequence starts as a fork of another of its group, one that has the whole prompt but perhaps for its last token, if there is
one. Pages of 4 tokens, a prompt of 11:

    positions   0 1 2 3   4 5 6 7   8 9 10 11   12 ...
    lender      page 7    page 2    page 5      page 3
    fork        page 7    page 2    page 0                 8 and 9 copied from page 5; 10 is the first that it computes

The last token of a prompt is computed by every sequence for itself: the first token is drawn from what the model makes of it.
Shared are the pages that lie wholly before it. So nobody writes to a shared page: a lender has written all of it before it
is shared, a fork writes from the prompt's last token on (promise P2). And all that a fork reads was computed, as rows of a
prompt, as it would have computed it (promise P4).

The head of the queue waits while a sequence of its group computes their prompt. Nothing deadlocks (promise P3), for groups of
any size: who waits holds neither a slot nor pages, and waits only while the other is in a slot. Meanwhile nobody is admitted
who does not go before the head anyway, and each step takes the most urgent sequence in a slot further: it is the first to
get rows and the last to be preempted, and alone it finds pages: what others shared with it is its own then, and the pool
holds a longest sequence. So sequences finish one after another until the other has the prompt or has left its slot, whichever
way: finished, aborted or preempted. Then the head borrows from it, waits for the next of the group in a slot, or, if there
is none, computes the prompt itself, without asking what became of anyone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxserve.core.pytree import Record, record
from jaxserve.core.scheduler.state import EngineState


@record
class Start(Record):
    """What a sequence has of another when it is admitted; a sequence that starts from nothing has nothing of slot 0."""

    num_computed: Int32[Array, ""]  # tokens whose keys and values are there
    lender: Int32[Array, ""]  # slot whose first pages it shares
    num_shared: Int32[Array, ""]  # pages
    copied_page: Int32[Array, ""]  # the lender's, to be copied to the first page of the sequence's own; N = none
    waits: Bool[Array, ""]  # it is not to start yet: what it could have is being computed


def start_of(state: EngineState, row: Int32[Array, ""], copied_page: Int32[Array, " S"], *, page_size: int) -> Start:
    """How the sequence in queue row `row` starts if it is admitted now.

    One that reports log probabilities of its prompt computes all of it, and lends to others.

    Args:
      state: with no page of the slots in `copied_page` written since.
      row: a waiting row.
      copied_page: per slot what is still to be copied to its first own page, so that it has nothing to lend; N = nothing.
      page_size: T.
    """
    queue, slots, num_pages = state.queue, state.slots, state.table.num_pages
    last = queue.prompt_length[row] - 1
    in_group = state.active & (queue.group[slots.row_id] == queue.group[row]) & (queue.num_prompt_logprobs[row] < 0)
    has_prompt = in_group & (slots.num_computed >= last)
    lends = has_prompt & (copied_page == num_pages)
    # One that ends with its first token has left when the prompt is there: to wait for it would be for nothing.
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
