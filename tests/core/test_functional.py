"""jaxserve as a function among functions: inside a caller's jit, beside gradients, over snapshots and several devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.core.programs import programs
from jaxserve.core.scheduler import EngineState, Status, init_state, submit
from jaxserve.core.step import RunResults, run
from jaxserve.models import causal_attend, graphdef_of
from jaxserve.models.params import shardings_of
from tests import workload
from tests.workload import CONFIG, MODEL, greedy

NUM_NEW = 8
RUN = functools.partial(run, model=MODEL, config=CONFIG, max_new_tokens=NUM_NEW)


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return workload.make_params()


@pytest.fixture(scope="module")
def requests() -> list[workload.Asked]:
    """Returns twelve requests, half greedy and half random, for four slots and a pool that is too small."""
    kinds = [greedy(max_tokens=NUM_NEW), greedy(max_tokens=NUM_NEW, temperature=1.0, seed=5)]
    crowd = enumerate(workload.crowd(3, CONFIG.queue_size))
    return [dataclasses.replace(asked, params=kinds[i % 2]) for i, asked in crowd]


@functools.cache
def run_program():
    return jax.jit(RUN)


@pytest.fixture(scope="module")
def expected(params: nnx.State, requests: list[workload.Asked]) -> RunResults:
    results = jax.device_get(run_program()(params, workload.start(requests, CONFIG))[1])
    assert np.all(results.num_generated == NUM_NEW)
    return results


def assert_same(results: RunResults, expected: RunResults) -> None:
    for name in RunResults.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(results, name), getattr(expected, name), err_msg=name)


def test_run_inside_a_callers_jit_takes_new_params_without_compiling_again(params, requests, expected):
    @functools.partial(jax.jit, donate_argnums=1)
    def caller(params, state, scale):
        scaled = jax.tree.map(lambda leaf: leaf * scale, params)
        state, results = RUN(scaled, state)
        return state, results, jnp.sum(results.logprobs)

    one, other = np.float32(1), np.float32(0.9)
    fresh = [workload.start(requests, CONFIG) for _ in range(3)]
    pool = fresh[0].pool.k[0]
    _, results, _ = caller(params, fresh[0], one)
    assert pool.is_deleted()  # it was donated
    with forbid_compilation():
        _, changed, total = caller(params, fresh[1], other)
        _, again, _ = caller(jax.device_get(params), fresh[2], one)
    assert_same(results, expected)
    assert_same(again, expected)
    assert np.any(np.asarray(changed.token_ids) != expected.token_ids)
    assert np.isfinite(total)


def test_a_state_that_was_not_donated_is_a_value(params, requests, expected):
    state = workload.start(requests, CONFIG)
    kept = jax.device_get(state)
    first, _ = run_program()(params, state)
    second, _ = run_program()(params, state)
    assert_trees_equal(first, second)
    assert_trees_equal(state, kept)
    assert_same(run_program()(params, state)[1], expected)


def test_a_snapshot_continues_exactly_where_it_was_taken(params, requests):
    step = programs(MODEL, CONFIG)["step"]
    state = workload.start(requests, CONFIG)
    for _ in range(9):
        state, _ = step(params, state)
    snapshot = jax.device_get(state)
    assert np.sum(snapshot.queue.status == Status.RUNNING) > 1
    continued, outputs = [], []
    for start in (state, jax.device_put(snapshot), jax.tree.map(np.array, snapshot)):
        for _ in range(20):
            start, output = step(params, start)
            outputs.append(jax.device_get(output))
        continued.append(jax.device_get(start))
    assert_trees_equal(continued[0], continued[1])
    assert_trees_equal(continued[0], continued[2])
    for i in range(20):
        assert_trees_equal(outputs[i], outputs[20 + i])
        assert_trees_equal(outputs[i], outputs[40 + i])


def assert_trees_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, left), right in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))


def sequence_logprobs(params: nnx.State, tokens: jax.Array) -> jax.Array:
    """Log probability of every token but the first given those before it, [B, T - 1], through dense attention."""
    batch, time = tokens.shape
    model = nnx.merge(graphdef_of(MODEL), params)
    positions = jnp.tile(jnp.arange(time, dtype=jnp.int32), batch)
    hidden, _ = model(tokens.reshape(-1), positions, attend=causal_attend(batch, time), kv=None)
    logprobs = jax.nn.log_softmax(model.logits(hidden).reshape(batch, time, -1)[:, :-1])
    return jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


def test_gradients_through_the_same_model_and_params_are_finite_and_reach_every_leaf(params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 40)), jnp.int32)
    loss = jax.jit(lambda params: -jnp.mean(sequence_logprobs(params, tokens)))
    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(np.asarray(leaf) != 0), path
    size = np.sqrt(sum(float(np.vdot(leaf, leaf)) for leaf in jax.device_get(jax.tree.leaves(gradient))))
    before, along = float(loss(params)), 1e-3 / size
    moved = jax.tree.map(lambda leaf, slope: leaf - along * slope, params, gradient)
    assert float(loss(moved)) - before == pytest.approx(-along * size**2, rel=0.1)


TARGET = 7  # the token that is rewarded
OPTIMISER = optax.adam(0.02)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, optimiser_state, submission, seed):
    """Samples with `run`, then REINFORCE on what it sampled: one program, the weights that were just updated included."""
    number = CONFIG.queue_size
    key_data = jnp.stack([jnp.full(number, seed), jnp.arange(number, dtype=jnp.uint32)], axis=1)
    submission = submission.replace(sampling=submission.sampling.replace(key_data=key_data))
    state, _ = submit(init_state(MODEL, CONFIG), submission, model=MODEL, config=CONFIG)
    state, results = RUN(params, state)
    tokens, lengths = state.queue.tokens, state.queue.prompt_length
    place = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None, :]
    generated = (place >= lengths[:, None]) & (place < state.queue.num_tokens[:, None])
    reward = jnp.mean((results.token_ids == TARGET).astype(jnp.float32), axis=1)
    advantage = (reward - jnp.mean(reward))[:, None]

    def loss(params):
        logprobs = jnp.where(generated, sequence_logprobs(params, tokens), 0)
        return -jnp.mean(jnp.sum(advantage * logprobs, axis=1)), logprobs

    gradient, logprobs = jax.grad(loss, has_aux=True)(params)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, optimiser_state = OPTIMISER.update(gradient, optimiser_state)
    scored = jnp.take_along_axis(logprobs, lengths[:, None] - 1 + jnp.arange(NUM_NEW, dtype=jnp.int32)[None, :], axis=1)
    difference = jnp.max(jnp.abs(scored - results.logprobs))
    return optax.apply_updates(params, updates), optimiser_state, jnp.mean(reward), difference


def test_a_policy_learns_from_its_own_samples_inside_one_program(requests):
    sampling = greedy(temperature=1.0, seed=0, max_tokens=NUM_NEW)
    asked = [dataclasses.replace(request, params=sampling) for request in requests]
    submission = workload.submission_of(asked, CONFIG)
    params = jax.tree.map(lambda leaf: leaf / 10 if leaf.ndim > 1 else leaf, workload.make_params())
    params, optimiser_state, reward, difference = train_step(params, OPTIMISER.init(params), submission, np.uint32(0))
    rewards, differences = [float(reward)], [float(difference)]
    with forbid_compilation():
        for seed in range(1, 60):
            params, optimiser_state, reward, difference = train_step(
                params, optimiser_state, submission, np.uint32(seed)
            )
            rewards.append(float(reward))
            differences.append(float(difference))
    assert max(differences) < 1e-3  # the policy that is trained is the policy that sampled
    assert np.mean(rewards[:10]) < 0.2
    assert np.mean(rewards[-10:]) > 0.8


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("x",))


def test_two_replicas_under_shard_map_give_what_one_gives(mesh, params, requests, expected):
    """Data-parallel rollouts: each device runs an engine of its own on its half of the states, and stops on its own."""
    halves = [requests[:3], requests[3:]]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(workload.start(half, CONFIG) for half in halves))

    def replica(params, states):
        _, results = RUN(params, jax.tree.map(lambda leaf: leaf[0], states))
        return jax.tree.map(lambda leaf: leaf[None], results)

    both = jax.jit(jax.shard_map(replica, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"), check_vma=False))
    results = jax.device_get(both(params, jax.device_put(states, NamedSharding(mesh, P("x")))))
    assert results.num_steps[0] != results.num_steps[1]
    rows = [(0, row) for row in range(3)] + [(1, row) for row in range(9)]
    for row, (device, local) in enumerate(rows):
        np.testing.assert_array_equal(results.token_ids[device, local], expected.token_ids[row])
        np.testing.assert_array_equal(results.logprobs[device, local], expected.logprobs[row])


def sharded_params(params: nnx.State, mesh: Mesh) -> nnx.State:
    """Attention over kv heads, everything else on every device. Both kernels are laid out by kv head."""
    specs = {"qkv": P(None, "x"), "out": P("x", None)}
    shardings = shardings_of(lambda path, _: NamedSharding(mesh, specs.get(path[-1], P())), params)
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [jax.device_put(*pair) for pair in zip(leaves, shardings, strict=True)])


def sharded_state(state: EngineState, mesh: Mesh) -> EngineState:
    pool = jax.device_put(state.pool, NamedSharding(mesh, P(None, "x")))
    return jax.device_put(state.replace(pool=None), NamedSharding(mesh, P())).replace(pool=pool)


def test_kv_heads_sharded_over_two_devices_give_the_same_tokens(mesh, params, requests, expected):
    state = sharded_state(workload.start(requests, CONFIG), mesh)
    placed = sharded_params(params, mesh)
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(placed)} == {P(None, "x"), P("x", None), P()}
    # Native code cannot be parted over devices.
    config = dataclasses.replace(CONFIG, attention_backend="reference")
    program = jax.jit(functools.partial(RUN, config=config), donate_argnums=1)
    compiled = program.lower(placed, state).compile()
    final, results = compiled(placed, state)
    for pages in (*final.pool.k, *final.pool.v):
        assert pages.sharding.shard_shape(pages.shape)[1] == MODEL.num_kv_heads // 2
    assert "all-reduce" in compiled.as_text()
    assert f"[{CONFIG.num_pages},{MODEL.num_kv_heads},{CONFIG.page_size}," not in compiled.as_text()  # never whole
    results = jax.device_get(results)
    np.testing.assert_array_equal(results.token_ids, expected.token_ids)
    np.testing.assert_allclose(results.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_array_equal(results.status, expected.status)
