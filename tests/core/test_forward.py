"""Batches split by kernel, which must not change the bits of a sequence that was preempted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.core.cache import attention
from jaxserve.core.forward import split_by_kernel
from jaxserve.core.programs import _shared_programs, programs
from jaxserve.core.scheduler import init_state
from jaxserve.core.scheduler.transitions import Plan
from pallas_kernels.paged_attention import reference as paged_reference
from pallas_kernels.rotary_write import reference as write_reference
from tests import workload
from tests.workload import CONFIG, MODEL, Asked, assert_same, greedy

# The kernel backends' way through the step; the tests below say what stands in for the kernels.
SPLIT = dataclasses.replace(CONFIG, attention_backend="triton", kv_dtype="float32")


def make_plan(rng: np.random.Generator, config=SPLIT) -> tuple:
    """A state and a plan as `transitions.plan` packs it: decode rows, then runs of prefill rows, then padding."""
    state = init_state(MODEL, config)
    slots = rng.permutation(config.max_slots)
    row_id = rng.permutation(config.queue_size)[: config.max_slots].astype(np.int32)
    prompt_length = rng.integers(1, 30, config.queue_size).astype(np.int32)
    num_new = np.zeros(config.max_slots, np.int32)
    rows = []
    for place, slot in enumerate(slots):
        count = 1 if place < 2 else int(rng.integers(0, 9))
        first = int(rng.integers(0, 40))
        num_new[slot] = count
        rows += [(slot, first + i) for i in range(count)]
    slot, position = (
        np.full(config.max_batch_size, config.max_slots, np.int32),
        np.zeros(config.max_batch_size, np.int32),
    )
    slot[: len(rows)], position[: len(rows)] = zip(*rows, strict=True)
    state = state.replace(
        slots=state.slots.replace(row_id=jnp.asarray(row_id)),
        queue=state.queue.replace(prompt_length=jnp.asarray(prompt_length)),
    )
    plan = Plan(
        slot=slot, position=position, batch_size=np.int32(len(rows)), num_new=num_new, copy_from=None, copy_to=None
    )
    return state, jax.tree.map(jnp.asarray, plan), rows, prompt_length[row_id]


@pytest.mark.parametrize("deterministic", [True, False])
def test_tokens_of_chunks_come_first_and_each_part_keeps_its_order(deterministic):
    config = dataclasses.replace(SPLIT, deterministic=deterministic)
    sizes = set()
    for seed in range(20):
        state, plan, rows, prompt_length = make_plan(np.random.default_rng(seed), config)
        if deterministic:  # generated tokens are single rows, whatever the step; the last prompt token never is
            single = [position >= prompt_length[slot] for slot, position in rows]
        else:
            single = [plan.num_new[slot] == 1 for slot, _ in rows]
        expected = [row for row, alone in zip(rows, single, strict=True) if not alone]
        num_chunk_rows = len(expected)
        expected += [row for row, alone in zip(rows, single, strict=True) if alone]
        split = split_by_kernel(state, plan, config=config)
        actual = list(zip(split.slot.tolist(), split.position.tolist(), strict=True))
        assert actual[: len(rows)] == expected
        assert set(actual[len(rows) :]) <= {(config.max_slots, 0)}
        assert (int(split.num_chunk_rows), int(split.batch_size)) == (num_chunk_rows, len(rows))
        sizes.add(num_chunk_rows)
    assert len(sizes) > 5


@pytest.fixture
def unlike_kernels(monkeypatch):
    """Puts reference functions in place of the kernels; the one for decoding has an error that no test can overlook."""
    calls = {"decode": 0, "chunk": 0}

    def plain(function, **fixed):
        def attend(q, kv, slot, position, *, window, **_):
            calls[fixed["name"]] += 1
            return fixed["factor"] * function(q, kv, slot, position, window=window)

        return attend

    def write(*arguments, backend, interpret, **norms):
        del backend, interpret
        return write_reference.rotary_write(*arguments, **norms)

    paged = paged_reference.paged_attention
    monkeypatch.setattr(attention, "decode_attention", plain(paged, name="decode", factor=1.01))
    monkeypatch.setattr(attention, "chunk_attention", plain(paged, name="chunk", factor=1.0))
    monkeypatch.setattr(attention, "rotary_write", write)
    _shared_programs.cache_clear()
    yield calls
    _shared_programs.cache_clear()


def preempted(config) -> list:
    """Traces a request alone, and again with neighbours that take its pages after some tokens."""
    rng = np.random.default_rng(3)
    target = Asked(workload.make_prompt(rng, 30), greedy(), priority=1)
    neighbours = [Asked(workload.make_prompt(rng, 40), greedy(), arrival=8 + i) for i in range(3)]
    params = workload.make_params()
    (alone,), (seen, *_) = (workload.trace(requests, params, config) for requests in ([target], [target, *neighbours]))
    assert len(seen.tokens) == len(alone.tokens) and seen.num_preemptions >= 1
    assert sum(seen.chunks) > 2 * len(target.prompt) + 1  # it had generated tokens, and they were recomputed
    return [alone, seen]


def test_generated_tokens_go_through_the_decode_kernel_again_when_a_sequence_resumes(unlike_kernels):
    alone, seen = preempted(SPLIT)
    assert_same(seen, alone)
    assert unlike_kernels["decode"] and unlike_kernels["chunk"]


def test_the_error_of_the_decode_kernel_would_show_if_they_did_not(unlike_kernels):
    config = dataclasses.replace(SPLIT, deterministic=False)
    alone, seen = preempted(config)
    assert not np.array_equal(seen.logprobs, alone.logprobs)


def test_tiles_of_both_kinds_hold_any_number_of_tokens(unlike_kernels, monkeypatch):
    """More tokens of each kind than a tile holds, wide tiles included, give what the plain backend gives."""
    paged = paged_reference.paged_attention
    same = lambda q, kv, slot, position, *, window, **_: paged(q, kv, slot, position, window=window)  # noqa: E731
    monkeypatch.setattr(attention, "decode_attention", same)
    monkeypatch.setattr(attention, "chunk_attention", same)
    requests = workload.crowd(2, 12)
    sizes = {"tile_rows": 2, "chunk_size": 30, "deterministic": False}
    params = workload.make_params()
    # With the kernels replaced, "tpu" and "triton" take the same way; the other tests take that of "triton".
    split = workload.trace(requests, params, dataclasses.replace(SPLIT, **sizes, attention_backend="tpu"))
    plain = workload.trace(requests, params, dataclasses.replace(CONFIG, **sizes))
    for seen, expected in zip(split, plain, strict=True):
        assert seen.tokens == expected.tokens
        np.testing.assert_allclose(seen.logprobs, expected.logprobs, atol=2e-5)


def test_the_block_map_of_chunks_is_made_once_for_all_layers(unlike_kernels, monkeypatch):
    made = []
    original = attention.chunk_blocks
    monkeypatch.setattr(attention, "chunk_blocks", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs))
    state = jax.eval_shape(functools.partial(init_state, MODEL, SPLIT))
    params = jax.eval_shape(workload.make_params)
    programs(MODEL, SPLIT)["step"].lower(params, state)
    assert len(made) == 1 and unlike_kernels["chunk"] == MODEL.num_layers
