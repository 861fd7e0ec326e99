"""A user's function on the logits: its arguments, its memory, and that it changes no other request (promise P4)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import EngineConfig, run
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.core.logit_rules import Context, apply, plain_rules
from jaxserve.core.programs import programs
from jaxserve.core.sampling import greedy_arrays, sample
from jaxserve.core.scheduler import EngineState, Status, check_invariants, init_state, submit
from tests import workload
from tests.core import skipped_work
from tests.workload import CONFIG, MAX_NEW, MODEL, Asked, Traced, assert_run_agrees, assert_same, greedy

NEVER = 10**6
PLAIN = {
    "hash": np.int32(1),  # of the tokens drawn
    "calls": np.int32(0),
    "saw": np.zeros(2, np.float32),  # the first logits of tokens 5 and 6
    "doomed_at": np.int32(NEVER),  # tokens after which all are ruled out
    "coin": np.asarray(False),  # whether only tokens 0 and 1 are left, with odds of 1 to 3
}


def identity(aux, logits, context):
    return aux, logits


def meddle(aux, logits, context):
    """Rules out a third of the vocabulary, chosen by the tokens that the sequence drew; `aux` may ask for more."""
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)
    last = context.tokens.at[row, context.num_tokens - 1].get(mode="clip")
    first = context.num_generated == 0
    hashed = jnp.where(first, aux["hash"], aux["hash"] * 31 + last + 1)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    new = jnp.where((ids + hashed[:, None]) % 3 == 0, -jnp.inf, logits)
    coin = jnp.where(ids == 0, 0.0, jnp.where(ids == 1, jnp.log(3.0), -jnp.inf))
    new = jnp.where(aux["coin"][:, None], coin, new)
    new = jnp.where((context.num_generated >= aux["doomed_at"])[:, None], -jnp.inf, new)
    saw = jnp.where(first[:, None], logits[:, 5:7], aux["saw"])
    return aux | {"hash": hashed, "calls": aux["calls"] + 1, "saw": saw}, new


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return workload.make_params()


def crowd() -> list[Asked]:
    """Returns requests so long that some are preempted."""
    prompts = [asked.prompt for asked in workload.crowd(5, 10)]
    return [Asked(prompt, greedy(temperature=1.3 * (i % 2), seed=i)) for i, prompt in enumerate(prompts)]


@functools.cache
def submit_program(config: EngineConfig):
    return jax.jit(functools.partial(submit, model=MODEL, config=config))


@functools.cache
def step_program(logits_fn: Any):
    """Programs with a function are new with every call: these are kept for all tests."""
    return programs(MODEL, CONFIG, logits_fn)["step"]


def submission_of(requests: Sequence[Asked], auxes: Sequence[Any]) -> Any:
    padded = [*auxes, *[PLAIN] * (CONFIG.queue_size - len(auxes))]
    aux = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
    return workload.submission_of(requests, CONFIG).replace(aux=aux)


def trace(
    requests: Sequence[Asked], params: nnx.State, logits_fn: Any, auxes: Sequence[Any] | None = None
) -> tuple[list[Traced], EngineState]:
    """As `workload.trace` with a function; request i is in row i, and starts with `auxes[i]`."""
    submission = submission_of(requests, auxes or [PLAIN] * len(requests))
    state, _ = submit_program(CONFIG)(init_state(MODEL, CONFIG, aux=PLAIN), submission)
    traced = [Traced() for _ in requests]
    step = step_program(logits_fn)
    while workload.has_unfinished(state):
        state, output = step(params, state)
        check_invariants(state)
        workload.note(jax.device_get(output), {i: i for i in range(len(requests))}, traced)
    for row, seen in enumerate(traced):
        seen.num_preemptions = int(state.queue.num_preemptions[row])
        seen.status = Status(int(state.queue.status[row]))
    return traced, jax.device_get(state)


def test_the_identity_gives_the_same_bits_and_no_other_program(params):
    requests = crowd()
    plain, _ = trace(requests, params, None)
    traced, _ = trace(requests, params, identity)
    assert sum(seen.num_preemptions for seen in plain) > 0
    for seen, expected in zip(traced, plain, strict=True):
        assert_same(seen, expected)
    assert programs(MODEL, CONFIG, identity).keys() == programs(MODEL, CONFIG).keys()
    with forbid_compilation():
        trace(requests, params, identity)


def test_the_identity_adds_no_work_on_the_vocabulary():
    """It costs one copy of the logits, which are kept as they were for log probabilities, and a search of the copy."""
    rows, vocab_size = skipped_work.ROWS, skipped_work.VOCAB
    config, number = EngineConfig(max_slots=rows), jnp.full(rows, 4, jnp.int32)
    context = Context(
        tokens=jnp.zeros((rows, 8), jnp.int32),
        num_tokens=number,
        prompt_length=number,
        stop_token_ids=jnp.zeros((rows, 2), jnp.int32),
        slot=jnp.arange(rows, dtype=jnp.int32),
        seen=jnp.zeros((rows, vocab_size), jnp.int32),
    )
    asks, rules, active = greedy_arrays(rows), plain_rules(rows, vocab_size, config), jnp.ones(rows, bool)

    def by(logits_fn):
        def step(logits, asks, rules, context, active):
            changed = logits_fn(None, apply(logits, rules, context, active), context)[1]
            return sample(logits, asks, rules, context, active, max_logprobs=4, changed=changed)

        return skipped_work.large_work(step, jnp.ones((rows, vocab_size)), asks, rules, context, active)

    def least(logits, changed):
        return jnp.argmax(changed, axis=1), jax.nn.logsumexp(logits, axis=1)

    bound = skipped_work.large_work(least, *2 * (jnp.ones((rows, vocab_size)),))
    assert len(by(identity)) <= len(bound)
    assert len(by(lambda aux, logits, context: (aux, logits + jnp.cumsum(logits, axis=1)))) > len(bound)


def test_what_a_function_remembers_is_the_sequences_alone_crowded_and_preempted(params):
    requests = crowd()
    auxes = [PLAIN | {"hash": np.int32(i)} for i in range(len(requests))]
    crowded, state = trace(requests, params, meddle, auxes)
    preempted = [i for i, seen in enumerate(crowded) if seen.num_preemptions]
    assert preempted
    for i in {0, 1, *preempted[:2]}:
        (alone,), own = trace([requests[i]], params, meddle, [auxes[i]])
        assert_same(crowded[i], alone)
        assert own.aux["hash"][0] == state.aux["hash"][i]
    assert state.aux["calls"][: len(requests)].tolist() == [MAX_NEW] * len(requests)
    other, _ = trace([requests[0]], params, meddle, [PLAIN | {"hash": np.int32(2)}])
    assert other[0].tokens != crowded[0].tokens


def test_the_function_comes_after_the_rules_and_before_temperature(params):
    prompt = workload.make_prompt(np.random.default_rng(0), 9)
    ruled = {"logit_bias": {5: 10.0}, "allowed_token_ids": [3, 5, 7]}
    wanted = [greedy(), greedy(**ruled), greedy(**ruled, temperature=2.0, seed=1)]
    coins = [greedy(**ruled, temperature=0.5, seed=seed) for seed in range(9)]
    auxes = [PLAIN] * 3 + [PLAIN | {"coin": np.asarray(True)}] * 9
    traced, state = trace([Asked(prompt, each) for each in (*wanted, *coins)], params, meddle, auxes)
    plain, biased, hot = state.aux["saw"][:3]
    assert biased[0] == plain[0] + np.float32(10) and biased[1] == -np.inf < plain[1]
    assert hot.tolist() == biased.tolist()
    tokens = np.array([seen.tokens for seen in traced[3:]])
    assert set(tokens.ravel()) == {0, 1}  # it has the last word on what the rules forbid
    assert abs(tokens.mean() - 0.9) < 0.05  # 3^2 to 1; at temperature 1 it were 0.75


def test_a_row_ruled_out_ends_with_an_error_and_disturbs_no_other(params):
    requests = [Asked(asked.prompt, greedy()) for asked in workload.crowd(5, 6)]
    healthy, _ = trace(requests, params, meddle)
    auxes = [PLAIN | {"doomed_at": np.int32((NEVER, 0, 4)[i % 3])} for i in range(6)]
    traced, _ = trace(requests, params, meddle, auxes)
    for i, (seen, expected) in enumerate(zip(traced, healthy, strict=True)):
        if i % 3 == 0:
            assert_same(seen, expected)
        else:
            assert seen.status == Status.ERROR
            assert seen.tokens == expected.tokens[: (0, 4)[i % 3 - 1]]


def test_run_in_a_callers_jit_takes_functions_of_its_arguments(params):
    requests = workload.crowd(5, 8)
    traced, _ = trace(requests, params, meddle)

    @jax.jit
    def rollout(params, submission, multiplier):
        def meddle_by(aux, logits, context):
            aux, new = meddle(aux, logits, context)
            return aux, new * multiplier

        state = init_state(MODEL, CONFIG, aux=PLAIN)
        state, _ = submit(state, submission, model=MODEL, config=CONFIG)
        return run(
            params,
            state,
            model=MODEL,
            config=CONFIG,
            max_new_tokens=MAX_NEW,
            num_top_logprobs=3,
            logits_fn=meddle_by,
        )[1]

    submission = submission_of(requests, [PLAIN] * len(requests))
    results = jax.device_get(rollout(params, submission, np.float32(1)))
    for row, seen in enumerate(traced):
        assert_run_agrees(results, row, seen)
    with forbid_compilation():
        others = jax.device_get(rollout(params, submission, np.float32(0.5)))
    assert others.token_ids.tolist() != results.token_ids.tolist()
