"""Work that nobody asks for is not done: neither by the loop that holds it, nor outside of that because XLA moved it there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve import EngineConfig
from jaxserve.core.logit_rules import Context, plain_rules
from jaxserve.core.optional import if_any
from jaxserve.core.sampling import greedy_arrays, sample

ROWS, VOCAB = 6, 4099  # no other array has this shape
PASSES_ON = {"parameter", "get-tuple-element", "tuple", "while", "copy", "bitcast", "opt-barrier"}


def large_work(function, *arguments) -> list[str]:
    """Instructions outside of all loops that make an array of ROWS x VOCAB, or reduce one."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    shape = rf"\[{ROWS},{VOCAB}\]"
    made = re.findall(rf"= \w+{shape}\S* ([a-z-]+)\(", entry)
    return [opcode for opcode in made if opcode not in PASSES_ON]


def heavy(x: jax.Array) -> jax.Array:
    return jnp.cumsum(jnp.exp(x), axis=1)


def test_a_loop_of_no_trips_leaves_nothing_to_do():
    def skipped(x, wanted):
        return if_any(wanted, lambda y, x: jnp.max(heavy(x), axis=1), jnp.zeros(ROWS), x)

    arguments = (jnp.ones((ROWS, VOCAB)), jnp.zeros(ROWS, bool))
    assert not large_work(skipped, *arguments)
    np.testing.assert_array_equal(skipped(*arguments), np.zeros(ROWS))
    assert (skipped(arguments[0], ~arguments[1]) > 1).all()


def test_what_is_not_among_the_operands_is_moved_out_and_seen_here():
    """The control; if it fails, XLA has mended its ways, and the barrier may go."""

    def moved(x, wanted):
        return if_any(wanted, lambda y: jnp.max(heavy(x), axis=1), jnp.zeros(ROWS))

    def plain(x, wanted):
        start = (~jnp.any(wanted), jnp.zeros(ROWS))
        return lax.while_loop(lambda c: ~c[0], lambda c: (~c[0], jnp.max(heavy(x), axis=1)), start)[1]

    arguments = (jnp.ones((ROWS, VOCAB)), jnp.zeros(ROWS, bool))
    assert large_work(moved, *arguments)
    assert large_work(plain, *arguments)


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
        return jnp.argmax(logits, axis=1), jax.nn.logsumexp(logits, axis=1)

    arguments = (
        jnp.zeros((ROWS, VOCAB)),
        greedy_arrays(ROWS),
        plain_rules(ROWS, VOCAB, config),
        context,
        jnp.ones(ROWS, bool),
    )
    assert len(large_work(drawn, *arguments)) <= len(large_work(least, *arguments))
