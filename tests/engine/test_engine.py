"""The Engine: text and tokens in, results out, in any order and under page pressure."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from jaxserve import Engine, EngineConfig, Request, SamplingParams, Update
from jaxserve.core.compile_guard import forbid_compilation
from tests import small_model

CONFIG = EngineConfig(**small_model.CAPACITIES)


@pytest.fixture(scope="module")
def engine(checkpoint: pathlib.Path) -> Engine:
    engine = Engine.from_pretrained(str(checkpoint), dtype="float32", config=CONFIG)
    engine.warm_up()
    return engine


def make_prompts(number: int, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(number)
    return [
        rng.integers(1, small_model.MODEL.vocab_size, length).tolist() for length in rng.integers(1, longest, number)
    ]


def drain(engine: Engine) -> list[Update]:
    updates = []
    while engine.has_unfinished:
        updates += engine.step()
    return updates


def test_results_come_in_the_order_of_the_prompts_and_with_all_their_fields(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2)
    results = engine.generate(["the cat", "the dog sat on"], params)
    assert [result.prompt for result in results] == ["the cat", "the dog sat on"]
    for result in results:
        (completion,) = result.outputs
        assert result.prompt_token_ids == tuple(engine.tokenizer.encode(result.prompt))
        assert len(completion.token_ids) == 5 and completion.finish_reason == "length"
        assert completion.text == engine.tokenizer.decode(completion.token_ids)
        assert completion.stop_reason is None and result.seed is None and result.finished
        metrics = result.metrics
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finish_time
        for token, places in zip(completion.token_ids, completion.logprobs, strict=True):
            assert places[token].rank == 1 and len(places) == 2
            assert places[token].decoded_token == engine.tokenizer.decode_token(token)
            assert places[token].logprob == max(place.logprob for place in places.values())
        assert completion.cumulative_logprob == pytest.approx(
            sum(places[token].logprob for token, places in zip(completion.token_ids, completion.logprobs, strict=True))
        )


def test_a_request_gets_the_same_tokens_alone_and_among_forty_in_a_tight_pool(engine: Engine) -> None:
    prompts = make_prompts(40)
    params = [
        SamplingParams(temperature=index % 3, seed=index, max_tokens=1 + index, ignore_eos=True) for index in range(40)
    ]
    engine.reset_stats()
    crowded = engine.generate(prompts, params)
    assert engine.stats.num_preemptions > 0
    assert sum(result.metrics.num_preemptions for result in crowded) == engine.stats.num_preemptions
    for index in (0, 7, 20, 38, 39):
        (alone,) = engine.generate([prompts[index]], params[index])
        assert alone.outputs[0].token_ids == crowded[index].outputs[0].token_ids


def test_nothing_is_compiled_after_warm_up_whatever_the_requests(engine: Engine) -> None:
    old, new = small_model.make_params(0), small_model.make_params(1)
    with forbid_compilation():
        engine.generate(make_prompts(9), [SamplingParams(top_k=index, max_tokens=3 + index) for index in range(9)])
        engine.generate(["text"], SamplingParams(top_p=0.5, min_p=0.1, logprobs=3))
        engine.set_params(new)
        engine.generate(make_prompts(2), SamplingParams(temperature=0))
        engine.set_params(old)


def test_new_weights_change_the_tokens_and_the_old_ones_bring_them_back(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def tokens() -> tuple[int, ...]:
        return engine.generate(["the mat"], params)[0].outputs[0].token_ids

    before = tokens()
    engine.set_params(small_model.make_params(1))
    other = tokens()
    engine.set_params(small_model.make_params(0))
    assert tokens() == before != other


def test_a_seed_reported_for_a_request_replays_it(engine: Engine) -> None:
    (first,) = engine.generate(["the"], SamplingParams(max_tokens=12, ignore_eos=True))
    (other,) = engine.generate(["the"], SamplingParams(max_tokens=12, ignore_eos=True))
    (again,) = engine.generate(["the"], SamplingParams(max_tokens=12, ignore_eos=True, seed=first.seed))
    assert again.outputs[0].token_ids == first.outputs[0].token_ids != other.outputs[0].token_ids


def test_a_stop_token_ends_the_sequence_stays_in_the_ids_and_leaves_the_text(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    free = engine.generate(["the cat"], params)[0].outputs[0].token_ids
    stop = free[4]
    first = free.index(stop)
    (result,) = engine.generate(["the cat"], dataclasses.replace(params, stop_token_ids=(stop,)))
    completion = result.outputs[0]
    assert completion.finish_reason == "stop" and completion.stop_reason == stop
    assert completion.token_ids == free[: first + 1]
    assert completion.text == engine.tokenizer.decode(free[:first])


def test_the_end_of_sequence_token_stops_without_a_stop_reason_and_can_be_ignored(checkpoint: pathlib.Path) -> None:
    engine = Engine.from_pretrained(str(checkpoint), dtype="float32", config=CONFIG)
    assert engine.eos_token_ids == (small_model.EOS,)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    free = engine.generate(["the cat"], params)[0].outputs[0].token_ids
    prompt = engine.tokenizer.encode("the cat")
    engine = Engine(small_model.make_params(), small_model.MODEL, CONFIG, eos_token_ids=(free[2],))
    (ended,) = engine.generate([prompt], dataclasses.replace(params, ignore_eos=False))
    assert ended.outputs[0].token_ids == free[: free.index(free[2]) + 1]
    assert ended.outputs[0].finish_reason == "stop" and ended.outputs[0].stop_reason is None
    (ignored,) = engine.generate([prompt], params)
    assert ignored.outputs[0].token_ids == free


def test_updates_put_together_are_the_result(engine: Engine) -> None:
    params = SamplingParams(temperature=1, max_tokens=30, seed=3, ignore_eos=True)
    requests = [Request(id=name, prompt=name, params=params) for name in ("the", "cat", "sat")]
    text, tokens, outputs = {}, {}, {}
    for update in engine.serve(requests, steps_per_call=1):
        assert update.request_id not in outputs
        text[update.request_id] = text.get(update.request_id, "") + update.text
        tokens[update.request_id] = tokens.get(update.request_id, ()) + update.token_ids
        if update.output is not None:
            outputs[update.request_id] = update.output
    for name, output in outputs.items():
        assert text[name] == output.outputs[0].text == engine.tokenizer.decode(tokens[name])
        assert tokens[name] == output.outputs[0].token_ids


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3, 5])
def test_an_aborted_request_ends_once_and_others_are_not_disturbed(engine: Engine, steps_before: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = make_prompts(10)
    expected = engine.generate(prompts, params)
    for index, prompt in enumerate(prompts):
        engine.add_request(Request(id=str(index), prompt_token_ids=tuple(prompt), params=params))
    updates: list[Update] = []
    for _ in range(steps_before):
        updates += engine.step(2)
    for name in ("1", "9", "no such request"):
        engine.abort(name)
    updates += drain(engine)
    finished = {update.request_id: update.output for update in updates if update.output is not None}
    assert len([update for update in updates if update.output is not None]) == len(finished) == 10
    for index, result in enumerate(expected):
        tokens, wanted = finished[str(index)].outputs[0].token_ids, result.outputs[0].token_ids
        if index in (1, 9):
            assert finished[str(index)].outputs[0].finish_reason == "abort"
            assert tokens == wanted[: len(tokens)] and len(tokens) < len(wanted)
        else:
            assert tokens == wanted
    assert engine.generate(prompts, params)[1].outputs[0].token_ids == expected[1].outputs[0].token_ids


def test_an_urgent_request_finishes_before_those_that_wait(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for index in range(8):
        engine.add_request(Request(id=str(index), prompt_token_ids=(1, 2, 3), params=params, priority=int(index != 7)))
    order = [update.request_id for update in drain(engine) if update.output is not None]
    assert order.index("7") < order.index("4")


def test_debug_checks_change_nothing(engine: Engine, checkpoint: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, debug_checks=True)
    checked = Engine.from_pretrained(str(checkpoint), dtype="float32", config=config)
    prompts, params = make_prompts(6), SamplingParams(max_tokens=10, seed=1)
    for one, other in zip(checked.generate(prompts, params), engine.generate(prompts, params), strict=True):
        assert one.outputs == other.outputs


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], []], {}, "prompt 1: prompt_token_ids=\\[\\] must have at least one"),
        ([""], {}, "prompt 0: the prompt has no tokens"),
        ([[1, 300]], {}, "prompt 0: prompt_token_ids has 300, .* from 0 to 299"),
        ([[1] * 96], {}, "has 96 tokens, but max_model_len=96"),
        ([[1]], {"logprobs": 4}, "logprobs=4 is above max_logprobs=3"),
        ([[1]], {"stop_token_ids": (5, 400)}, "stop_token_ids has 400"),
        ([[1]], {"stop_token_ids": tuple(range(1, 9))}, "has 9 stop tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_generated(
    engine: Engine, prompts: list, params: dict, message: str
) -> None:
    steps = engine.stats.num_steps
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, SamplingParams(**params))
    assert engine.stats.num_steps == steps and not engine.has_unfinished


def test_an_id_in_use_is_refused(engine: Engine) -> None:
    request = Request(id="same", prompt_token_ids=(1,), params=SamplingParams(max_tokens=2))
    engine.add_request(request)
    with pytest.raises(ValueError, match="'same' is in use"):
        engine.add_request(request)
    drain(engine)


def test_a_sequence_longer_than_the_model_was_made_for_is_refused(checkpoint: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, max_model_len=136)
    with pytest.raises(ValueError, match="max_model_len=136 is longer than the 128 positions"):
        Engine.from_pretrained(str(checkpoint), config=config)


def test_a_generation_is_clipped_to_the_longest_sequence(engine: Engine) -> None:
    (result,) = engine.generate([[1] * 90], SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 6 and result.outputs[0].finish_reason == "length"


PLACEMENTS = {
    "uncommitted": lambda params: params,
    "committed": lambda params: jax.device_put(params, jax.devices()[0]),
    "second device": lambda params: jax.device_put(params, jax.devices()[1]),
    "mesh": lambda params: jax.device_put(
        params, jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec())
    ),
}


@pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_new_engine_compiles_nothing_after_its_warm_up_wherever_its_weights_are(place) -> None:
    engine = Engine(place(small_model.make_params()), small_model.MODEL, CONFIG)
    engine.warm_up()
    with forbid_compilation():
        first = engine.generate(make_prompts(6), SamplingParams(max_tokens=4, seed=1))
        engine.set_params(small_model.make_params())
        second = engine.generate(make_prompts(6), SamplingParams(max_tokens=4, seed=1))
    assert [result.outputs for result in first] == [result.outputs for result in second]


def test_weights_of_another_dtype_or_shape_are_refused(engine: Engine) -> None:
    narrow = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), small_model.make_params())
    with pytest.raises(ValueError, match="is bfloat16.* but the engine was made for float32"):
        engine.set_params(narrow)
    with pytest.raises(ValueError, match="another structure"):
        engine.set_params(narrow["blocks"])


def test_callers_that_overlap_each_get_what_is_theirs(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outer = [Request(id=str(index), prompt_token_ids=(5, 6, index + 1), params=params) for index in range(3)]
    engine.add_request(Request(id="mine", prompt_token_ids=(9,), params=params))
    finished = {}
    for update in engine.serve(outer, steps_per_call=2):
        if update.output is not None:
            finished[update.request_id] = update.output
        (inner,) = engine.generate([[1, 2]], params)
        assert inner.outputs[0].finish_reason == "length"
    assert set(finished) == {"0", "1", "2"}
    assert "mine" in {update.request_id for update in engine.step() + drain(engine) if update.output is not None}


def test_closing_an_iterator_early_aborts_what_it_served(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    updates = engine.serve([Request(id=str(i), prompt_token_ids=(i + 1,), params=params) for i in range(8)])
    next(updates)
    updates.close()
    engine.reset_stats()
    engine.generate([[1, 2]], SamplingParams(max_tokens=1))
    assert not engine.has_unfinished and engine.stats.num_steps < 20


def test_one_bad_request_of_several_adds_none(engine: Engine) -> None:
    requests = [Request(id="good", prompt_token_ids=(1,)), Request(id="bad", prompt_token_ids=(300,))]
    with pytest.raises(ValueError, match="300"):
        next(engine.serve(requests))
    assert not engine.has_unfinished


@pytest.mark.parametrize("max_steps", [0, -5, 9, 2**40])
def test_a_number_of_steps_out_of_range_is_refused(engine: Engine, max_steps: int) -> None:
    with pytest.raises(ValueError, match=f"max_steps={max_steps} must lie in"):
        engine.step(max_steps)


def test_an_interrupted_engine_forgets_its_requests_and_serves_new_ones(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    (expected,) = engine.generate([[1, 2, 3]], params)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.driver, "read", interrupted)
        engine.generate(make_prompts(9), params)
    assert not engine.has_unfinished
    with forbid_compilation():
        (again,) = engine.generate([[1, 2, 3]], params)
    assert again.outputs == expected.outputs


def test_logits_that_are_not_finite_end_a_request_with_an_error(engine: Engine) -> None:
    (good,) = engine.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    engine.set_params(jax.tree.map(lambda leaf: leaf * np.nan, small_model.make_params()))
    (bad,) = engine.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=3, logprobs=1))
    engine.set_params(small_model.make_params())
    assert bad.outputs[0].finish_reason == "error" and bad.outputs[0].token_ids == ()
    assert "not finite" in bad.error
    (again,) = engine.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert again.outputs == good.outputs


def test_wide_tiles_give_the_same_greedy_tokens(engine: Engine) -> None:
    config = dataclasses.replace(CONFIG, deterministic=False, chunk_size=64)
    assert len(config.tile_sizes) == 2
    wide = Engine(small_model.make_params(), small_model.MODEL, config)
    prompts, params = make_prompts(12), SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    results = zip(wide.generate(prompts, params), engine.generate(prompts, params), strict=True)
    assert all(one.outputs[0].token_ids == other.outputs[0].token_ids for one, other in results)
