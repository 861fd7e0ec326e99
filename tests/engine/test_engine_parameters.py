"""Parameters through the Engine: their effect on the result, and that nothing is compiled for any of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxserve import BeamParams, Engine, EngineConfig, Request, SamplingParams, make_submission
from jaxserve.core.compile_guard import forbid_compilation
from jaxserve.models import causal_attend, graphdef_of
from tests import small_model
from tests.small_model import MODEL

CONFIG = EngineConfig(**small_model.CAPACITIES)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    directory = small_model.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    engine = Engine.from_pretrained(str(directory), dtype="float32", config=CONFIG)
    engine.warm_up()
    return engine


@jax.jit
def dense_logprobs(params, tokens):
    model = nnx.merge(graphdef_of(MODEL), params)
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    hidden, _ = model(tokens, positions, attend=causal_attend(1, tokens.shape[0]), kv=None)
    return jax.nn.log_softmax(model.logits(hidden))


def oracle(tokens: list[int]) -> np.ndarray:
    """Log probabilities after each token, of padded tokens so that one program serves all."""
    padded = np.zeros(CONFIG.max_model_len, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(dense_logprobs(small_model.make_params(), padded))[: len(tokens)]


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, MODEL.vocab_size, length).tolist()


def greedy(**fields) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, "ignore_eos": True} | fields)


def drawn(**fields) -> SamplingParams:
    return greedy(temperature=1.3, seed=5, **fields)


def test_prompt_logprobs_are_the_models_in_chunks_and_after_a_preemption(engine):
    prompts = [prompt(i, length) for i, length in enumerate([40, 1, 33, 25, 12, 38])]
    before = engine.stats.num_preemptions
    results = engine.generate(prompts, greedy(prompt_logprobs=2, max_tokens=30))
    assert engine.stats.num_preemptions > before
    for tokens, result in zip(prompts, results, strict=True):
        expected = oracle(tokens)
        assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == len(tokens)
        for position in range(1, len(tokens)):
            row, places = expected[position - 1], result.prompt_logprobs[position]
            assert places[tokens[position]].logprob == pytest.approx(row[tokens[position]], abs=1e-4)
            assert places[tokens[position]].rank == 1 + np.sum(row > row[tokens[position]])
            best = np.argsort(-row)[:2]
            assert set(places) == {tokens[position], *best.tolist()}
            for rank, token in enumerate(best, 1):
                assert places[int(token)].rank == rank
                assert places[int(token)].logprob == pytest.approx(row[token], abs=1e-4)


def test_a_request_without_prompt_logprobs_gets_none_beside_one_that_asks_for_them(engine):
    asked, silent = engine.generate([prompt(1, 9), prompt(2, 9)], [greedy(prompt_logprobs=0), greedy()])
    assert silent.prompt_logprobs is None
    assert [len(places) for places in asked.prompt_logprobs[1:]] == [1] * 8


def test_a_request_fares_the_same_beside_neighbours_who_ask_for_everything(engine):
    target, neighbours = prompt(3, 20), [prompt(i, 18) for i in range(4, 9)]
    everything = SamplingParams(
        temperature=0.9,
        seed=1,
        max_tokens=8,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        logit_bias={5: 3.0},
        allowed_token_ids=range(2, 200),
        bad_words=[[7], [8, 9]],
        min_tokens=3,
        stop=[[4, 5]],
        logprobs=3,
        logprobs_mode="processed",
        prompt_logprobs=3,
        truncate_prompt_tokens=10,
    )
    (alone,) = engine.generate([target], greedy(logprobs=2))
    with forbid_compilation():
        crowded, *_ = engine.generate([target, *neighbours], [greedy(logprobs=2), *[everything] * 5])
    assert crowded.outputs == alone.outputs


def test_a_stop_string_ends_the_text_and_the_pages_come_back(engine):
    (free,) = engine.generate(["the cat sat"], drawn(max_tokens=40))
    text = free.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    assert 0 < text.index(stop) == text.rindex(stop)
    (ended,) = engine.generate(["the cat sat"], drawn(max_tokens=40, stop=["never in it", stop]))
    completion = ended.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    tokens = free.outputs[0].token_ids
    assert completion.token_ids == tokens[: len(completion.token_ids)] and len(completion.token_ids) < len(tokens)
    (included,) = engine.generate(["the cat sat"], drawn(max_tokens=40, stop=stop, include_stop_str_in_output=True))
    assert included.outputs[0].text == text[: text.index(stop) + len(stop)]
    engine.generate(["a"], greedy(max_tokens=1))  # its first call tells the device of the end
    assert not engine.has_unfinished and not np.asarray(engine.driver.state.active).any()
    assert int(engine.driver.state.table.num_free) == engine.config.num_pages


def test_a_stop_sequence_of_token_ids_ends_where_it_falls(engine):
    (free,) = engine.generate([prompt(3, 20)], greedy(max_tokens=20))
    tokens = free.outputs[0].token_ids
    wanted = tokens[7:9]
    place = next(i for i in range(len(tokens)) if tokens[i : i + 2] == wanted)
    (ended,) = engine.generate([prompt(3, 20)], greedy(max_tokens=20, stop=[wanted]))
    assert ended.outputs[0].token_ids == tokens[: place + 2]
    assert ended.outputs[0].stop_reason == wanted
    assert ended.outputs[0].text == engine.tokenizer.decode(tokens[: place + 2])


def test_rules_that_leave_no_token_end_with_an_error_that_says_so(engine):
    (failed,) = engine.generate([prompt(1, 4)], greedy(allowed_token_ids=[9], bad_words=[[9]]))
    assert failed.outputs[0].finish_reason == "error"
    assert "allowed_token_ids, bad_words and logit_bias together left none" in failed.error


def test_only_the_end_of_a_prompt_is_used_if_it_is_to_be_truncated(engine):
    tokens = prompt(5, 30)
    (short,) = engine.generate([tokens], greedy(truncate_prompt_tokens=7))
    assert short.prompt_token_ids == tuple(tokens[-7:])
    (same,) = engine.generate([tokens[-7:]], greedy())
    assert same.outputs == short.outputs
    (long,) = engine.generate([tokens * 9], greedy(truncate_prompt_tokens=-1, max_tokens=1))
    assert len(long.prompt_token_ids) == CONFIG.max_model_len - 1


def test_scores_are_log_probabilities_of_what_was_given(engine):
    prompts, completions = [prompt(1, 9), prompt(2, 20)], [prompt(3, 5), prompt(4, 1)]
    for start, completion, scores in zip(prompts, completions, engine.score(prompts, completions), strict=True):
        expected = oracle(start + completion)
        places = range(len(start) - 1, len(start) + len(completion) - 1)
        np.testing.assert_allclose(scores, [expected[p, t] for p, t in zip(places, completion, strict=True)], atol=1e-4)
    (scores,) = engine.score(["the cat"], [" sat on"])
    assert len(scores) == len(engine.tokenizer.encode(" sat on"))
    with pytest.raises(ValueError, match="1 completions for 2 prompts"):
        engine.score(prompts, completions[:1])


def stay_below(aux, logits, context):
    """No token from the limit of its sequence on; counts the calls."""
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    allowed = ids < aux["limit"][:, None]
    return {"limit": aux["limit"], "calls": aux["calls"] + 1}, jnp.where(allowed, logits, -jnp.inf)


def test_a_users_function_runs_with_its_own_memory_per_request():
    aux = {"limit": np.int32(MODEL.vocab_size), "calls": np.int32(0)}
    config = dataclasses.replace(CONFIG, num_pages=13)
    engine = Engine(small_model.make_params(), MODEL, config, logits_fn=stay_below, aux=aux)
    plain = Engine(small_model.make_params(), MODEL, config)
    prompts = [prompt(i, 30) for i in range(6)]
    for index, tokens in enumerate(prompts):
        own = {"limit": np.int32(20), "calls": np.int32(0)} if index % 2 else None
        engine.add_request(Request(str(index), prompt_token_ids=tokens, params=greedy(max_tokens=20), aux=own))
    results = {}
    while engine.has_unfinished:
        results |= {update.request_id: update.output for update in engine.step() if update.output is not None}
    assert engine.stats.num_preemptions > 0
    for index, (tokens, result) in enumerate(zip(prompts, map(results.get, map(str, range(6))), strict=True)):
        generated = result.outputs[0].token_ids
        if index % 2:
            assert max(generated) < 20
        else:
            assert generated == plain.generate([tokens], greedy(max_tokens=20))[0].outputs[0].token_ids
    assert (
        np.asarray(engine.driver.state.aux["calls"])[: config.queue_size].max() == 20
    )  # one call per token, preempted or not
    with pytest.raises(ValueError, match=r"aux is .*'limit': 'int64\[\]'.* make them alike"):
        engine.add_request(Request("x", prompt_token_ids=(1,), aux={"limit": 5, "calls": np.int32(0)}))


def test_samples_of_a_request_are_those_of_their_indices_and_share_the_prompts_pages(engine):
    params = drawn(n=3, max_tokens=12, logprobs=2, prompt_logprobs=1)
    tokens = prompt(8, 40)
    before = engine.stats.peak_pages
    engine.reset_stats()
    (result,) = engine.generate([tokens], params)
    shared = engine.stats.peak_pages
    assert [output.index for output in result.outputs] == [0, 1, 2]
    assert len({output.token_ids for output in result.outputs}) == 3
    assert len(result.prompt_logprobs) == 40 and result.prompt_logprobs[1] is not None
    (again, *_) = engine.generate([tokens, *(prompt(i, 20) for i in range(4))], [params, *[greedy()] * 4])
    assert again.outputs == result.outputs
    (single,) = engine.generate([tokens], dataclasses.replace(params, n=1))
    assert single.outputs[0] == result.outputs[0]
    pages = -(-(40 + 12) // engine.config.page_size)
    assert shared < 3 * pages and before >= 0
    submission = make_submission([tokens], params, model=MODEL, config=CONFIG)
    assert submission.follows.tolist() == [False, True, True] and submission.sampling.sample_index.tolist() == [0, 1, 2]


def test_each_sample_streams_its_own_text_and_only_the_last_to_end_brings_the_result(engine):
    requests = [Request("a", prompt="the cat", params=drawn(n=3, max_tokens=9)), Request("b", prompt="the dog")]
    texts: dict[tuple[str, int], str] = {}
    outputs = []
    for update in engine.serve(requests):
        texts[update.request_id, update.index] = texts.get((update.request_id, update.index), "") + update.text
        outputs += [update.output] if update.output is not None else []
    assert sorted(output.request_id for output in outputs) == ["a", "b"]
    for output in outputs:
        for completion in output.outputs:
            assert completion.text == texts[output.request_id, completion.index]


def test_more_samples_than_slots_are_refused(engine):
    with pytest.raises(ValueError, match="n=5 is above max_slots=4"):
        engine.generate(["x"], SamplingParams(n=5))


def test_beams_of_width_one_are_the_greedy_text_and_wider_ones_are_no_worse(engine):
    (free,) = engine.generate(["the cat"], greedy(max_tokens=8, logprobs=0))
    (one,) = engine.beam_search(["the cat"], BeamParams(width=1, max_tokens=8, eos_token_ids=()))
    assert one.sequences[0].token_ids == free.outputs[0].token_ids and one.sequences[0].text == free.outputs[0].text
    (wide,) = engine.beam_search(["the cat"], BeamParams(width=4, max_tokens=8, num_return=2, eos_token_ids=()))
    assert wide.sequences[0].score >= wide.sequences[1].score
    assert wide.sequences[0].cumulative_logprob >= one.sequences[0].cumulative_logprob - 1e-4
