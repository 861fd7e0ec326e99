"""Work that is not needed is not done: neither in its loop, nor outside of the loop because XLA moved it there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxserve import EngineConfig
from jaxserve.core.logit_rules import Context, plain_rules
from jaxserve.core.optional import if_any
from jaxserve.core.sampling import greedy_arrays, sample
from tests.core.skipped_work import ROWS, VOCAB, large_work


def heavy(x: jax.Array) -> jax.Array:
    return jnp.cumsum(jnp.exp(x), axis=1)


def test_a_loop_of_no_trips_leaves_nothing_to_do():
    def skipped(x, needed):
        return if_any(needed, lambda y, x: jnp.max(heavy(x), axis=1), jnp.zeros(ROWS), x)

    arguments = (jnp.ones((ROWS, VOCAB)), jnp.zeros(ROWS, bool))
    assert not large_work(skipped, *arguments)
    np.testing.assert_array_equal(skipped(*arguments), np.zeros(ROWS))
    assert (skipped(arguments[0], ~arguments[1]) > 1).all()


def test_what_is_not_among_the_operands_is_moved_out_and_seen_here():
    """The control; if it fails, XLA has mended its ways, and the barrier may go."""

    def moved(x, needed):
        return if_any(needed, lambda y: jnp.max(heavy(x), axis=1), jnp.zeros(ROWS))

    def plain(x, needed):
        start = (~jnp.any(needed), jnp.zeros(ROWS))
        return lax.while_loop(lambda c: ~c[0], lambda c: (~c[0], jnp.max(heavy(x), axis=1)), start)[1]

    arguments = (jnp.ones((ROWS, VOCAB)), jnp.zeros(ROWS, bool))
    assert large_work(moved, *arguments)
    assert large_work(plain, *arguments)


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda x: jnp.max(jnp.cumsum(jnp.exp(x.T), axis=0), axis=0), id="another order of axes"),
        pytest.param(lambda x: jnp.cumsum(jnp.exp(x.reshape(-1)))[:ROWS], id="one axis"),
        pytest.param(lambda x: jnp.sum(jnp.exp(x[:, :4097]), axis=1), id="a part, reduced at once"),
        pytest.param(lambda x: jnp.max(jnp.cumsum(x.astype(jnp.int32), axis=1), axis=1).astype(x.dtype), id="integers"),
    ],
)
def test_work_of_any_shape_is_seen_where_it_is_moved_out_and_only_there(work):
    def moved(x, needed):
        return if_any(needed, lambda y: work(x), jnp.zeros(ROWS))

    def skipped(x, needed):
        return if_any(needed, lambda y, x: work(x), jnp.zeros(ROWS), x)

    arguments = (jnp.ones((ROWS, VOCAB)), jnp.zeros(ROWS, bool))
    assert large_work(moved, *arguments)
    assert not large_work(skipped, *arguments)


def test_the_sampler_does_no_work_on_the_vocabulary_but_the_most_likely_token_and_the_normaliser():
    config = EngineConfig(max_slots=ROWS)
    number = jnp.full(ROWS, 4, jnp.int32)
    context = Context(
        tokens=jnp.zeros((ROWS, 8), jnp.int32),
        num_tokens=number,
        prompt_length=number,
        stop_token_ids=jnp.zeros((ROWS, 2), jnp.int32) - 1,
        slot=jnp.arange(ROWS, dtype=jnp.int32),
        seen=jnp.zeros((ROWS, VOCAB), jnp.int32),
    )

    def drawn(logits, rows, rules, context, active):
        return sample(logits, rows, rules, context, active, max_logprobs=5)

    def least(logits, *_):
        token = jnp.argmax(logits, axis=1)
        largest = jnp.take_along_axis(logits, token[:, None], axis=1)
        return token, jnp.isfinite(largest), largest - jax.nn.logsumexp(logits, axis=1, keepdims=True)

    arguments = (
        jnp.zeros((ROWS, VOCAB)),
        greedy_arrays(ROWS),
        plain_rules(ROWS, VOCAB, config),
        context,
        jnp.ones(ROWS, bool),
    )
    assert len(large_work(drawn, *arguments)) <= len(large_work(least, *arguments))
