"""Workloads and engine flags of the benchmarks: lengths against their distributions, tokens against the seed, errors."""

import json

import numpy as np
import pytest
from absl import flags
from lib import engine_options, workloads
from lib.workloads import LENGTHS, Workload, draw_lengths, workload_from_flags

from jaxserve import DEMO_MODEL
from jaxserve.text.tokenizer import load_tokenizer

MEANS = {
    "uniform": (16 + 256) / 2,
    "loguniform": 240 / np.log(16),
    "geometric": 16 + 240 / 5,
    "heavy": np.log(16) * 16 * 256 / 240,
    "bimodal": (7 * 16 + 256) / 8,
}


def values_of(*arguments: str, **defaults: object) -> flags.FlagValues:
    values = flags.FlagValues()
    workloads.define_flags(values, **defaults)
    engine_options.define_engine_flags(values)
    values(["benchmark", *arguments])
    return values


def workload(*arguments: str, vocab_size: int = 2048, tokenizer: object = None) -> Workload:
    return workload_from_flags(values_of(*arguments), vocab_size, tokenizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("distribution", MEANS)
def test_lengths_have_the_mean_of_their_distribution_and_keep_its_bounds(distribution):
    lengths = np.array(draw_lengths(distribution, 16, 256, 40_000, np.random.default_rng(1)))
    assert lengths.min() == 16 and lengths.max() >= (250 if distribution != "geometric" else 240)
    assert lengths.max() <= 256
    assert lengths.mean() == pytest.approx(MEANS[distribution], rel=0.05)


def test_the_heavy_tail_is_that_of_a_density_that_falls_with_the_square():
    lengths = np.array(draw_lengths("heavy", 10, 1000, 40_000, np.random.default_rng(2)))
    for bound in (20, 50, 200):  # P(length >= b) = (1/b - 1/1001) / (1/10 - 1/1001)
        assert (lengths >= bound).mean() == pytest.approx((1 / bound - 1 / 1001) / (1 / 10 - 1 / 1001), rel=0.1)


@pytest.mark.parametrize("distribution", LENGTHS)
def test_one_length_is_possible_in_every_distribution(distribution):
    assert draw_lengths(distribution, 7, 7, 5, np.random.default_rng(0)) == [7] * 5


@pytest.mark.parametrize(
    ("distribution", "low", "high", "message"),
    [
        ("uniform", 9, 8, "lengths from 9 to 8: the shortest must be"),
        ("uniform", 0, 8, "at least 1"),
        ("fixed", 8, 9, "fixed lengths from 8 to 9: the shortest must be the longest"),
        ("normal", 8, 9, "'normal' are unknown: use fixed, uniform"),
    ],
)
def test_bad_lengths_are_refused(distribution, low, high, message):
    with pytest.raises(ValueError, match=message):
        draw_lengths(distribution, low, high, 1, np.random.default_rng(0))


def test_without_flags_it_is_w48_as_the_check_of_preemption_draws_it():
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 129, 48)
    outputs = np.exp(rng.uniform(*np.log([16, 256]), 48)).astype(int)
    prompts = [rng.integers(0, 49152, length).tolist() for length in lengths]
    w48 = workload(vocab_size=49152)
    assert w48 == Workload(prompts, outputs.tolist())
    assert (len(w48), w48.num_prompt_tokens, w48.num_output_tokens) == (48, lengths.sum(), outputs.sum())
    assert w48.longest == max(lengths + outputs) <= 384


def test_requests_are_greedy_and_end_by_length_alone():
    params = workload("--num_requests=3", "--output_lengths=fixed", "--shortest_output=5", "--longest_output=5").params
    assert [(p.temperature, p.max_tokens, p.ignore_eos, p.detokenize) for p in params] == [(0, 5, True, False)] * 3


def test_prefixes_are_shared_in_turns_and_come_before_what_random_prompts_are():
    shared = workload("--dataset=prefix", "--prefix_len=9", "--num_prefixes=2", "--num_requests=6")
    plain = workload("--num_requests=6")
    heads = [tuple(prompt[:9]) for prompt in shared.prompts]
    assert heads == [heads[0], heads[1]] * 3 and heads[0] != heads[1]
    assert [prompt[9:] for prompt in shared.prompts] == plain.prompts
    assert shared.output_lengths == plain.output_lengths


def test_a_file_gives_prompts_in_its_order_and_lengths_where_it_has_them(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        json.dumps({"prompt": "def main():", "max_tokens": 3}) + "\n" + json.dumps({"prompt_token_ids": [5, 6]})
    )
    tokenizer = load_tokenizer(DEMO_MODEL)
    found = workload("--dataset=jsonl", f"--prompts_file={path}", "--num_requests=2", tokenizer=tokenizer)
    assert found.prompts == [tokenizer.encode("def main():", add_special_tokens=True), [5, 6]]
    assert found.output_lengths[0] == 3 and 16 <= found.output_lengths[1] <= 256


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ('{"prompt": "a"}', ["--num_requests=1"], "'line-1' is text and the model has no tokenizer"),
        ('{"prompt_token_ids": [2048]}', ["--num_requests=1"], "below 2048"),
        ('{"prompt_token_ids": [1]}', ["--num_requests=2"], "has 1 prompts, fewer than --num_requests=2: lower it"),
        ('{"prompt_token_id": [1]}', ["--num_requests=1"], "prompts.jsonl:1: "),
    ],
)
def test_a_file_that_is_no_good_is_refused(tmp_path, lines, arguments, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        workload("--dataset=jsonl", f"--prompts_file={path}", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefix_len=3"], "--prefix_len has no effect on --dataset=random"),
        (["--dataset=jsonl", "--longest_prompt=3"], "--longest_prompt has no effect on --dataset=jsonl"),
        (["--dataset=jsonl"], "needs --prompts_file"),
        (["--shortest_output=300"], "--output_lengths: lengths from 300 to 256"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        workload(*arguments)


def test_records_name_the_flags_that_count():
    values = values_of("--num_requests=5", longest_output=40)
    assert workloads.describe_workload(values) == {
        "dataset": "random",
        "num_requests": 5,
        "prompt_lengths": "uniform",
        "shortest_prompt": 16,
        "longest_prompt": 128,
        "output_lengths": "loguniform",
        "shortest_output": 16,
        "longest_output": 40,
        "seed": 0,
    }


def test_an_engine_is_fitted_to_the_workload_unless_told_otherwise():
    fitted = engine_options.fitted_options(values_of("--model=a.json", "--max_slots=3"), max_model_len=77)
    assert (fitted.load_format, fitted.config.max_slots, fitted.config.max_model_len) == ("dummy", 3, 77)
    told = engine_options.fitted_options(values_of("--max_model_len=99"), max_model_len=77)
    assert (told.load_format, told.config.max_model_len) == ("auto", 99)


def test_what_a_workload_needs_of_the_model_is_known_before_its_weights_are():
    model, tokenizer = engine_options.load_model(engine_options.fitted_options(values_of()))
    assert model.vocab_size == 2048 and tokenizer is not None
    shape = engine_options.fitted_options(values_of("--model=configs/models/llama-135m.json"))
    model, tokenizer = engine_options.load_model(shape)
    assert (model.vocab_size, tokenizer) == (49152, None)
