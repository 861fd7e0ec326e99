"""The usual workload of the benchmarks on a tiny model: a quarter of the pool makes sequences resume and changes no token."""

import dataclasses

import pytest
from absl import flags
from batching.runs import Contender, serve
from flax import nnx
from lib import workloads

from jaxserve import Engine, EngineConfig, ModelConfig, Transformer
from jaxserve.core.compile_guard import forbid_compilation

MODEL = ModelConfig("llama", 64, 16, 16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=384)
WHOLE = EngineConfig(max_slots=32, max_model_len=384, page_size=16, kv_dtype="float32", attention_backend="reference")


@pytest.mark.slow
def test_a_quarter_of_the_pool_preempts_compiles_nothing_frees_all_pages_and_changes_no_token():
    values = flags.FlagValues()
    workloads.define_flags(values)
    values(["benchmark"])
    w48 = workloads.workload_from_flags(values, MODEL.vocab_size)
    params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(0)))[1]
    whole = WHOLE.max_slots * WHOLE.pages_per_slot
    tokens, preemptions = [], []
    for num_pages in (whole, whole // 4):
        engine = Engine(params, MODEL, dataclasses.replace(WHOLE, num_pages=num_pages))
        engine.warm_up()
        with forbid_compilation():
            run = serve(Contender("w48", engine, None), w48)
        free = run.timeline.steps().num_free_pages
        assert free.min() >= 0 and free[-1] == num_pages
        tokens.append(run.token_ids)
        preemptions.append(engine.stats.num_preemptions)
    assert [len(ids) for ids in tokens[0]] == w48.output_lengths and tokens[0] == tokens[1]
    assert preemptions[0] == 0 < preemptions[1]
