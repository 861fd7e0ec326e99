"""The scheduler against its oracle, step by step, over random traces."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from jaxserve.core.scheduler import check_invariants, policy
from tests.core.scheduler import traces
from tests.core.scheduler.oracle import UNFINISHED, VOCAB_SIZE, Oracle, Request
from tests.core.scheduler.submissions import MAX_SUBMITTED

NUM_STEPS = 6000  # per configuration

# What a trace must contain to be worth running.
ALWAYS = (
    "one-token prompt",
    "prompt at the maximum",
    "one token asked for",
    "max_tokens clipped",
    "prompt cut into chunks",
    "prefill and decode in one step",
    "head waits for a slot",
    "stop token at the last position",
    "submission refused, no free row",
    "abort while waiting",
    "abort in mid-prefill",
    "abort while decoding",
    "abort ignored, finished before",
    "abort ignored, stale handle",
    "collection ignored, unfinished",
    "collection ignored, stale handle",
    "follows no request",
    "group refused, too few free rows",
    "nothing taken behind a refused group",
    "head waits for the prompt of its group",
    "forked with shared pages",
    "shared pages outlive an owner",
    "ended: stop",
    "ended: length",
    "ended: abort",
    "ended: error",
    "drained",
)
WHEN_PAGES_CAN_BE_PARTIAL = ("forked with a copied page", "a fork of this step is not yet a lender")
WHEN_PAGES_ARE_SCARCE = (
    "preempted a lender",
    "head waits for pages",
    "nothing overtakes the head",
    "nothing overtakes across priorities",
    "preempted",
    "preempted in mid-prefill",
    "preempted itself",
    "preempted twice or more",
    "resumed",
    "abort while preempted",
)


@functools.cache
def device(name: str) -> traces.Device:
    return traces.Device(traces.CONFIGS[name], compiler_options=traces.FAST_COMPILE)


@pytest.mark.parametrize("name", traces.CONFIGS)
def test_every_step_of_random_traces_is_as_the_oracle_predicts(name):
    events = traces.run_trace(device(name), seed=20240, num_steps=NUM_STEPS)
    assert events["steps"] >= NUM_STEPS
    config, wanted = traces.CONFIGS[name], ALWAYS
    if name != "more pages than needed":
        wanted += WHEN_PAGES_ARE_SCARCE
    if config.page_size > 1:
        wanted += WHEN_PAGES_CAN_BE_PARTIAL
    if name != "more pages than needed" and config.max_slots > 2:
        wanted += ("resumed as a fork, with generated tokens",)
    if config.chunk_size > 1:
        wanted += ("prefill rows of several sequences",)
    assert [event for event in wanted if not events[event]] == []


def test_a_fork_may_be_preempted_in_the_step_that_admits_it(monkeypatch):
    """Never seen with the policy as it is, by which an admission leaves a page to each sequence that decodes."""

    def may_admit(state, num_needed, num_decoding):
        return (num_needed <= state.table.num_free) | ~jnp.any(state.active)

    monkeypatch.setattr(policy, "may_admit", may_admit)
    eager = traces.Device(CONFIG, compiler_options=traces.FAST_COMPILE)
    events = traces.run_trace(eager, seed=20240, num_steps=NUM_STEPS, keeps_pages=False)
    assert events["fork preempted before its copy"] > 0
    assert events["preempted a lender"] > 0


@st.composite
def requests(draw: st.DrawFn, max_model_len: int) -> Request:
    prompt = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=max_model_len - 1))
    return Request(
        prompt=tuple(prompt),
        max_tokens=draw(st.integers(1, max_model_len)),
        prompt_length=draw(st.sampled_from([len(prompt)] * 9 + [0])),
        priority=draw(st.integers(-1, 1)),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=2))),
    )


@st.composite
def submissions(draw: st.DrawFn, max_model_len: int) -> list[Request]:
    submitted: list[Request] = []
    while len(submitted) < MAX_SUBMITTED and (not submitted or draw(st.booleans())):
        if submitted and draw(st.booleans()):
            submitted.append(dataclasses.replace(submitted[-1], follows=True))
        else:
            submitted.append(draw(requests(max_model_len)))
    return submitted


CONFIG = traces.CONFIGS["minimal pool"]
ROWS = st.integers(0, CONFIG.queue_size - 1)


class SchedulerMachine(RuleBasedStateMachine):
    """Operations in any order and number between steps, which the bulk traces do not have."""

    def __init__(self):
        super().__init__()
        self.device = device("minimal pool")
        self.oracle = Oracle(traces.limits_of(CONFIG))
        self.state, self.marks = self.device.start()

    @rule(wanted=submissions(CONFIG.max_model_len))
    def submit(self, wanted):
        padding = [None] * (MAX_SUBMITTED - len(wanted))
        self.state, handles = self.device.submit(self.state, traces.submission_of(wanted + padding, CONFIG))
        assert traces.seen_handles(jax.device_get(handles), CONFIG) == self.oracle.submit(wanted) + padding

    @rule(rows=st.sets(ROWS, min_size=1, max_size=3), age=st.sampled_from([0, 0, 0, 1]))
    def abort(self, rows, age):
        self.state = self.device.abort(self.state, *self._handles(rows, age, self.oracle.abort))

    @rule(rows=st.sets(ROWS, min_size=1), age=st.sampled_from([0, 0, 0, 1]))
    def collect(self, rows, age):
        self.state = self.device.collect(self.state, *self._handles(rows, age, self.oracle.collect))

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps):
        for _ in range(num_steps):
            record = self.oracle.step()
            self.state, self.marks, observation = self.device.step(self.state, self.marks)
            shown = traces.seen(jax.device_get(observation), CONFIG)
            traces.compare(shown, traces.predicted(self.oracle, record), "step", len(record.decode_rows))

    @invariant()
    def agrees(self):
        state = jax.device_get(self.state)
        traces.compare(traces.seen_state(state, CONFIG), traces.predicted_state(self.oracle), "between steps")
        check_invariants(state)

    def teardown(self):
        unfinished = sum(row is not None and row.status in UNFINISHED for row in self.oracle.rows)
        for _ in range(2 * CONFIG.max_model_len * unfinished):
            self.step(1)
        self.agrees()
        assert not self.oracle.has_work()
        assert sorted(number for number, _ in self.oracle.endings) == list(range(self.oracle.num_arrived))

    def _handles(self, rows, age, tell_oracle):
        mask, generation = np.zeros(CONFIG.queue_size, bool), np.zeros(CONFIG.queue_size, np.int32)
        for row in rows:
            mask[row], generation[row] = True, self.oracle.generations[row] - age
            tell_oracle(row, self.oracle.generations[row] - age)
        return mask, generation


def test_any_order_of_operations_is_as_the_oracle_predicts():
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    settings = hypothesis.settings(max_examples=25, stateful_step_count=30, suppress_health_check=slow)
    run_state_machine_as_test(SchedulerMachine, settings=settings)
