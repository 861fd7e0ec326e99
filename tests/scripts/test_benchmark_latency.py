"""The latency benchmark: its arithmetic on runs made by hand, and its refusals."""

import benchmark_latency
import pytest
from absl import flags
from benchmark_latency import Case, summarize
from lib.roofline import weight_bytes_per_token
from lib.serving_load import Served, Trace

from jaxserve import ModelConfig


def run(*arguments: str) -> int:
    values = flags.FlagValues()
    benchmark_latency.define_flags(values)
    values(["benchmark_latency", *arguments])
    return benchmark_latency.main(["benchmark_latency"], values)


def traces(*runs) -> list[Trace]:
    return [Trace([Served(0.0, 0.0, False, times, times[-1]) for times in requests], []) for requests in runs]


def test_a_batch_is_as_slow_as_its_slowest_request_and_tokens_are_counted_over_all():
    runs = traces([[0.1, 0.2, 0.3], [0.2, 0.3, 0.6]], [[0.1, 0.2, 0.3], [0.2, 0.3, 0.4]])
    found = summarize(Case(2, 5, 3), runs, limit_ms=10)
    assert found["batch_ms"]["mean"] == 500 and found["batch_ms"]["median"] == 500
    assert found["ttft_ms"]["median"] == 150 and found["tpot_ms"]["mean"] == pytest.approx((100 + 200 + 100 + 100) / 4)
    assert found["output_tokens_per_s"] == pytest.approx(6 / 0.5)
    assert found["share_of_limit"] is None  # is of a single stream


def test_a_single_stream_is_compared_with_the_limit():
    found = summarize(Case(1, 5, 3), traces([[0.5, 0.54, 0.58]]), limit_ms=10)
    assert (found["tpot_over_limit"], found["share_of_limit"], found["limit_ms_per_token"]) == (4, 0.25, 10)
    assert summarize(Case(1, 5, 1), traces([[0.5]]), limit_ms=10)["share_of_limit"] is None


def test_a_request_that_lacks_tokens_is_an_error():
    with pytest.raises(RuntimeError, match="got 2 tokens, not 3"):
        summarize(Case(1, 5, 3), traces([[0.5, 0.6]]), limit_ms=10)


def test_weights_are_those_that_a_token_needs():
    shape = {"vocab_size": 100, "embed_dim": 8, "ffw_dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    block = 8 * 4 * (2 + 2 * 1) + 2 * 4 * 8 + 3 * 8 * 16 + 2 * 8  # qkv, out, gate-up-down, norms
    matrices = 2 * block + 8
    tied, untied = (ModelConfig("llama", **shape, head_dim=4, tied_embeddings=tied) for tied in (True, False))
    assert (
        weight_bytes_per_token(tied, "float32") == weight_bytes_per_token(untied, "float32") == 4 * (matrices + 100 * 8)
    )
    assert weight_bytes_per_token(tied, "bfloat16") == 2 * (matrices + 100 * 8)
    norms = 2 * 2 * 8 + 8
    assert weight_bytes_per_token(untied, "bfloat16", "int8") == matrices + 100 * 8 + norms


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_sizes=0"], "--batch_sizes: '0' must be an integer from 1"),
        (["--max_slots=2"], "max_slots=2 is below the 32 that are needed"),
        (["--input_lens=100000"], "lower --input_lens or --output_lens"),
        (["--plot=a.gif"], "must be a file that ends in .png"),
        (["--model=nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_flags_get_one_sentence(arguments, message, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]  # a library may have something to say as it is imported
    assert error.startswith("error: ") and message in error and "Traceback" not in error
