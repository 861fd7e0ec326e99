"""The records of the engine's state. A queue row owns a sequence; a slot is a place in the batch that it holds while it runs.

    queue row   submitted ---> WAITING <--> RUNNING ---> STOP | LENGTH | ABORT | ERROR ---> FREE (collected)
                                   admit  preempt   finish                          collect

Every fact is stored once. A slot is in use when it names a row. It decodes when exactly one of its tokens has no key and
value yet, and prefills when more have none. The status of a finished row is the reason why it finished.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxserve.config import EngineConfig
from jaxserve.core.cache import KVPool, PageTable, init_kv_pool, init_page_table
from jaxserve.core.cache.kv_pool import stores_bits
from jaxserve.core.columns import axis_sizes, column, off_rows
from jaxserve.core.logit_rules import LogitRules
from jaxserve.core.pytree import Record, record
from jaxserve.core.sampling import SamplingArrays
from jaxserve.models import ModelConfig
from jaxserve.request import FinishReason


class Status(enum.IntEnum):
    """The phase that a queue row is in. Values from STOP on say why it finished."""

    FREE = 0
    WAITING = 1
    RUNNING = 2
    STOP = 3  # an end-of-sequence token, a stop token or a stop sequence was generated
    LENGTH = 4  # it has max_tokens new tokens, or is as long as a sequence can be
    ABORT = 5  # aborted by its owner
    ERROR = 6  # it was not valid when submitted, or there was no distribution to draw from

    @property
    def finish_reason(self) -> FinishReason | None:
        """The reason as users see it; None while the row has not finished."""
        return _REASONS.get(self)


_REASONS: dict[Status, FinishReason] = {
    Status.STOP: "stop",
    Status.LENGTH: "length",
    Status.ABORT: "abort",
    Status.ERROR: "error",
}


@record
class Queue(Record):
    """The submitted sequences, one row each, from submission to collection."""

    tokens: Int32[Array, "Q M"]  # prompt, then generated; stale beyond num_tokens
    prompt_length: Int32[Array, " Q"]  # tokens
    num_tokens: Int32[Array, " Q"]  # prompt + generated
    max_length: Int32[Array, " Q"]  # num_tokens at which the sequence ends
    stop_token_ids: Int32[Array, "Q Z"] = column(off=-1)  # generating one of these ends the sequence; -1: unused entry
    stop_sequences: Int32[Array, "Q NS LS"] = column(off=-1)  # these end it too; aligned at their end, -1 before it
    sampling: SamplingArrays
    rules: LogitRules
    num_prompt_logprobs: Int32[Array, " Q"] = column(off=-1)  # most likely tokens to report per prompt token; -1: none
    priority: Int32[Array, " Q"]  # lower goes first
    arrival: Int32[Array, " Q"]  # running number; breaks ties of priority
    group: Int32[Array, " Q"]  # arrival of the request's first sequence: the same for all samples of a request
    status: Int32[Array, " Q"]  # a `Status`
    abort_requested: Bool[Array, " Q"]  # whether the next step must end the sequence
    num_preemptions: Int32[Array, " Q"]  # times this sequence lost its slot
    generation: Int32[Array, " Q"]  # times the row was submitted to; with the row id it is a handle


@record
class Slots(Record):
    """The places in the batch. Everything else about the sequence in a slot is in its queue row."""

    row_id: Int32[Array, " S"]  # queue row; Q = none, the slot is not in use
    num_computed: Int32[Array, " S"]  # tokens whose keys and values are in the pool
    num_counted: Int32[Array, " S"]  # tokens counted in `EngineState.seen`; 0: the slot's entry there is stale


@record
class EngineState(Record):
    """Everything that exists between two steps. It is a value: keep it, copy it, restore it, run it twice."""

    queue: Queue
    slots: Slots
    table: PageTable
    pool: KVPool
    # Per slot and token id 2 * times generated + whether it is in the prompt; None: the config has no penalties.
    seen: Int32[Array, "S V"] | None
    aux: Any  # data that a `LogitsFn` remembers per queue row, a tree of arrays [Q, ...]; None: it remembers nothing
    next_arrival: Int32[Array, ""]  # arrival of the next sequence; a state serves 2^31 of them

    @property
    def active(self) -> Bool[Array, " S"]:
        """Whether each slot is in use."""
        return self.slots.row_id < self.queue.status.shape[0]


def init_state(
    model: ModelConfig, config: EngineConfig, *, aux: Any = None, platform: str | None = None
) -> EngineState:
    """Returns the empty state: nothing is submitted, and all slots and pages are free.

    Args:
      model, config: static.
      aux: initial data that a `LogitsFn` remembers of one sequence: a tree of arrays. The state has one per queue row.
      platform: static; the platform of the devices that will hold the state, which decides how the pool is stored; None: that
        of JAX's default device.

    Raises:
      ValueError: if `config.num_pages` or `config.kv_dtype` is None, which leaves the choice to the Engine.
    """
    if config.num_pages is None or config.kv_dtype is None:
        raise ValueError("num_pages and kv_dtype must be set: give them in EngineConfig, or let the Engine choose them")
    rows, slots = config.queue_size, config.max_slots
    return EngineState(
        queue=off_rows(Queue, rows, axis_sizes(model.vocab_size, config)),
        slots=Slots(row_id=jnp.full((slots,), rows, jnp.int32), num_computed=_zeros(slots), num_counted=_zeros(slots)),
        table=init_page_table(slots, config.pages_per_slot, config.num_pages),
        pool=init_kv_pool(
            model, config.num_pages, config.page_size, config.kv_dtype, as_bits=stores_bits(config.backend, platform)
        ),
        seen=jnp.zeros((slots, model.vocab_size), jnp.int32) if config.penalties else None,
        aux=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf))), aux),
        next_arrival=jnp.asarray(0, jnp.int32),
    )


def _zeros(size: int) -> Int32[Array, " size"]:
    return jnp.zeros((size,), jnp.int32)
