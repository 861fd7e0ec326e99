"""Peers: the protocol between processes, each driver against the engine or stubs of its library or server, and a comparison."""

import dataclasses
import http.server
import json
import os
import pathlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import benchmark_throughput
import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx
from peers import gguf_weights, llama_cpp_driver, memory, transformers_driver, vllm_driver
from peers import process as peer_process
from peers.jaxserve_driver import Jaxserve, StepClock
from peers.process import PeerError, PeerProcess, PeerUnavailable, session_processes
from peers.protocol import Settings, answer

from jaxserve import EngineConfig, ModelConfig, Transformer
from jaxserve.models.checkpoint.hugging_face import save_hugging_face
from jaxserve.models.families import read_model_config
from tests.scripts.stub_peer import PEAKS, InProcess, Stub

MODEL = ModelConfig("llama", 300, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8, max_position=128)
PROMPTS = [[5, 6, 7], [8] * 20, [9, 10], list(range(40, 51)), [3]]
LENGTHS = [4, 9, 1, 6, 12]
SHAPE = {  # of a config.json: MODEL
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
WORKLOAD = ["--num_requests=3", "--longest_prompt=20", "--longest_output=18", "--repeats=2"]
ENGINE = ["--max_slots=2", "--page_size=8", "--chunk_size=16", "--tile_rows=8", "--dtype=float32", "--max_model_len=64"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Random weights, large enough that generated text varies."""
    directory = tmp_path_factory.mktemp("model")
    params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(0)))[1]
    params = jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim > 1 else leaf, params)
    save_hugging_face(params, MODEL, directory, "float32")
    return str(directory)


def settings(model: str, **options: Any) -> dict[str, Any]:
    told = Settings(
        model, "float32", 2, 64, chunk_size=16, pool_bytes=1 << 20, threads=2, platform="cpu", options=options
    )
    return dataclasses.asdict(told)


def asked(driver: Any, **message: Any) -> dict[str, Any]:
    found = answer(driver, json.loads(json.dumps(message)))
    assert "error" not in found and "unavailable" not in found, found
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def ours(checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the answers of jaxserve's driver to loading and to a round."""
    driver = Jaxserve()
    config = dataclasses.asdict(EngineConfig(max_slots=2, max_model_len=64, page_size=8, chunk_size=16, tile_rows=8))
    loaded = asked(driver, do="load", settings=settings(checkpoint, config=config, seed=0))
    asked(driver, do="run", prompts=PROMPTS, output_lengths=LENGTHS)
    return loaded, asked(driver, do="run", prompts=PROMPTS, output_lengths=LENGTHS)


def test_the_engines_driver_tells_what_its_steps_did(ours):
    loaded, done = ours
    assert [len(ids) for ids in done["token_ids"]] == LENGTHS
    more = done["more"]
    assert more["num_computed_tokens"] == sum(map(len, PROMPTS)) + sum(LENGTHS) - len(LENGTHS)
    assert len(more["flops"]) == len(more["bytes"]) == more["num_steps"]
    assert more["mean_rows"] * more["num_steps"] == pytest.approx(more["num_computed_tokens"])
    assert more["peak_pages"] <= loaded["num_pages"] == 16 and more["num_preemptions"] == 0
    assert len(done["seconds_per_token"]) == sum(length > 1 for length in LENGTHS)
    assert all(0 < span < done["seconds"] for span in done["seconds_per_token"])
    assert loaded["pool_bytes"] == 16 * 8 * 2 * 2 * MODEL.num_kv_heads * MODEL.head_dim * 4
    assert loaded["weights_bytes"] > 300 * 32 * 4 and 0 < loaded["base_bytes"] <= loaded["load_peak_bytes"]


@pytest.mark.parametrize("driver", [transformers_driver.Static, transformers_driver.Continuous])
def test_transformers_generates_the_same_tokens_batch_by_batch_and_in_continuous_batches(driver, checkpoint, ours):
    peer = driver()
    assert asked(peer, do="load", settings=settings(checkpoint))["versions"].keys() == {"transformers", "torch"}
    for _ in range(2):
        done = asked(peer, do="run", prompts=PROMPTS, output_lengths=LENGTHS)
        assert done["token_ids"] == ours[1]["token_ids"]
        assert len(done["seconds_per_token"]) == 4 and min(done["seconds_per_token"]) > 0
        assert max(done["seconds_per_token"]) < done["seconds"]


def test_a_comparison_of_a_tiny_shape_is_recorded_and_printed(tmp_path, monkeypatch, capsys):
    shape = tmp_path / "tiny.json"
    shape.write_text(json.dumps(SHAPE))
    assert read_model_config(shape) == MODEL  # so that the engine has the programs of the fixture
    made = {}

    def make_peer(name: str, options: Any) -> InProcess:
        if name == "llama_cpp":
            raise PeerUnavailable("/no/python: No such file or directory")
        made[name] = InProcess(Jaxserve() if name == "jaxserve" else Stub())
        return made[name]

    monkeypatch.setattr(benchmark_throughput, "find_peaks", lambda dtype: PEAKS)
    monkeypatch.setattr(benchmark_throughput, "make_peer", make_peer)
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 0.0, 0.0))
    out = tmp_path / "out.jsonl"
    flags_given = [f"--model={shape}", "--compare=vllm,llama_cpp", f"--json={out}", "--compilation_cache_dir="]
    flags_given.append(f"--timeline={tmp_path / 'out.html'}")
    values = flags.FlagValues()
    benchmark_throughput.define_flags(values)
    values(["benchmark_throughput", *WORKLOAD, *ENGINE, *flags_given])
    assert benchmark_throughput.main(["x"], values) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["kind"], r["contender"]) for r in records] == [
        *[("round", "jaxserve"), ("round", "vllm"), ("round", "vllm"), ("round", "jaxserve")],
        *[("summary", "jaxserve"), ("summary", "vllm"), ("engine", "jaxserve"), ("ratio", "vllm")],
    ]
    for record in records:
        assert (record["device"], record["commit"], record["dtype"]) == ("a machine", "c", "float32")
        assert record["load_average"] == 2.5
        assert record["workload"]["longest_output"] == 18 and "in turns" in record["method"]
    told = {name: next(m for m in peer.log if m["do"] == "load")["settings"] for name, peer in made.items()}
    assert told["jaxserve"]["model"] == told["vllm"]["model"] != str(shape)  # the same weights, from a directory
    engine = records[6]
    assert told["vllm"]["pool_bytes"] == engine["pool_bytes"] > 0 == told["jaxserve"]["pool_bytes"]
    assert engine["num_preemptions"] == 0 and 0 < engine["share_of_roofline"] < 1
    assert all(peer.closed for peer in made.values())
    assert "<svg" in (tmp_path / "out.html").read_text()
    printed = capsys.readouterr().out
    assert printed.startswith("the machine is not idle (load average 2.5)")
    assert "Throughput: " in printed and "Total num output tokens: " in printed and "Roofline: " in printed
    assert "llama_cpp is not installed: /no/python: No such file or directory" in printed
    row = next(line.split() for line in printed.splitlines() if line.strip().startswith("vllm "))
    assert float(row[1]) == pytest.approx(records[5]["output_tokens_per_s"], rel=0.1) and row[-2:] == ["stub", "1"]


def test_steps_of_a_call_share_its_time_evenly(monkeypatch):
    times = iter([10.0, 14.0, 20.0])  # made, read, read
    monkeypatch.setattr("peers.jaxserve_driver.time.perf_counter", lambda: next(times))
    clock = StepClock(EngineConfig(max_slots=1, num_pages=8, max_model_len=16, page_size=8))
    live = types.SimpleNamespace(id="a", samples=[0], prompt_token_ids=[1], request=types.SimpleNamespace(id="a"))
    sample = types.SimpleNamespace(live=live, index=0, finished=False)
    for count in (2, 3):
        steps = types.SimpleNamespace(
            row_id=np.zeros((count, 1), np.int32),
            num_new=np.ones((count, 1), np.int32),
            sampled=np.ones((count, 1), bool),
            **{name: np.zeros(count, np.int32) for name in ("num_free_pages", "num_waiting", "num_preempted")},
        )
        rows: Any = {"status": np.full(1, 2), "generation": np.zeros(1, np.int32)}
        clock.observe(types.SimpleNamespace(steps=steps, num_steps=count, **rows), {0: sample}, 0)
    assert clock.seconds_per_token() == [pytest.approx((20 - 12) / 4)]  # steps end at 12, 14, 16, 18, 20


def stub() -> PeerProcess:
    return PeerProcess(sys.executable, "tests.scripts.stub_peer")


def test_a_peer_in_another_process_is_loaded_run_and_ended(monkeypatch):
    monkeypatch.setattr(peer_process, "_END_SECONDS", 0.5)  # the last request is not waited for
    with stub() as peer:
        with pytest.raises(PeerUnavailable, match="^No module named 'absent'$"):
            peer.ask({"do": "load", "settings": settings("absent")}, 60)
        with pytest.raises(PeerError, match="^ValueError: the model is wrong$"):
            peer.ask({"do": "load", "settings": settings("wrong")}, 60)
        assert peer.ask({"do": "load", "settings": settings("m")}, 60) == {"versions": {"stub": "1"}, "settings": 2}
        done = peer.ask({"do": "run", "prompts": [[7], [8]], "output_lengths": [2, 1]}, 60)
        assert (done["seconds"], done["token_ids"], done["more"]) == (3.0, [[0, 1], [0]], {"prompts": 2})
        usage = peer.usage()
        if pathlib.Path("/proc").exists():
            assert usage.cpu_seconds is not None and usage.cpu_seconds < 10 and (usage.peak_bytes or 0) > 1 << 20
        with pytest.raises(PeerError, match="no answer within 0 s"):
            peer.ask({"do": "run", "prompts": [[1]], "output_lengths": [1]}, 0.2)
        process = peer._process
    assert process.returncode is not None and not session_processes(process.pid)


def test_a_peer_that_ends_by_itself_has_its_last_line_reported():
    with stub() as peer, pytest.raises(PeerError, match="it ended by itself: last words"):
        peer.ask({"do": "run", "prompts": [[0]], "output_lengths": [1]}, 60)


def test_an_interpreter_that_is_not_there_is_a_peer_that_is_not_installed():
    with pytest.raises(PeerUnavailable, match="/no/python: No such file"):
        PeerProcess("/no/python", "stub_peer")


def test_vllm_gets_prompts_lengths_and_room_and_no_prefix_cache(monkeypatch):
    class LLM:
        def __init__(self, **arguments: Any) -> None:
            self.arguments = arguments

        def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
            assert [prompt["prompt_token_ids"] for prompt in prompts] == PROMPTS and not use_tqdm
            times = types.SimpleNamespace(first_token_ts=1.0, last_token_ts=3.0)
            return [
                types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[1] * p["max_tokens"])], metrics=times)
                for p in params
            ]

    fake: Any = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams, fake.__version__ = LLM, lambda **fields: fields, "0"
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    driver = vllm_driver.Vllm()
    assert asked(driver, do="load", settings=settings("model"))["versions"]["vllm"] == "0"
    arguments = driver._llm.arguments
    assert (arguments["max_num_seqs"], arguments["max_model_len"], arguments["dtype"]) == (2, 64, "float32")
    assert arguments["enable_prefix_caching"] is False
    assert (os.environ["VLLM_CPU_KVCACHE_SPACE"], os.environ["VLLM_CPU_OMP_THREADS_BIND"]) == ("1", "0-1")
    done = asked(driver, do="run", prompts=PROMPTS, output_lengths=LENGTHS)
    assert [len(ids) for ids in done["token_ids"]] == LENGTHS
    assert done["seconds_per_token"] == [2 / (length - 1) for length in LENGTHS if length > 1]


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """Answers as llama-server does."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["ignore_eos"] and not body["cache_prompt"] and body["temperature"] == 0
            count = body["n_predict"]
            timings = {"predicted_n": count, "predicted_ms": 3000.0}
            text = json.dumps({"tokens": [body["prompt"][0]] * count, "timings": timings}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_llama_cpp_is_asked_for_all_requests_at_once_and_answers_in_their_order(server):
    driver = llama_cpp_driver.LlamaCpp()
    driver._port = server.server_port
    done = asked(driver, do="run", prompts=PROMPTS, output_lengths=LENGTHS)
    assert done["token_ids"] == [[prompt[0]] * length for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
    assert done["seconds_per_token"] == [3 / (length - 1) for length in LENGTHS if length > 1]


def test_llama_cpp_has_room_for_as_many_sequences_of_the_longest_length():
    arguments = llama_cpp_driver.server_arguments(Settings(**settings("m")), "w.gguf", 80)
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert (pairs["--parallel"], pairs["--ctx-size"], pairs["--threads"], pairs["--cache-type-k"]) == (
        "2",
        "128",
        "2",
        "f32",
    )


def test_a_server_that_is_not_there_is_a_peer_that_is_not_installed():
    found = answer(llama_cpp_driver.LlamaCpp(), {"do": "load", "settings": settings("m", server="/no/llama-server")})
    assert found == {"unavailable": "/no/llama-server: No such file or directory"}


def test_tensors_are_read_as_they_were_written_and_heads_are_paired_for_llama_cpp(checkpoint, tmp_path):
    params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(1)))[1]
    save_hugging_face(params, MODEL, tmp_path, "bfloat16")
    tensors = dict(gguf_weights.stored_tensors(tmp_path))
    embedding: Any = params["embedding"]
    expected = np.asarray(embedding[...].astype("bfloat16").astype("float32"))
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], expected)
    assert dict(gguf_weights.stored_tensors(pathlib.Path(checkpoint))).keys() == tensors.keys()
    name = "model.layers.0.self_attn.k_proj.weight"
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    paired = gguf_weights.paired(name, tensors[name], config)
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    np.testing.assert_array_equal(paired, tensors[name][order])
    untouched = tensors["model.layers.0.mlp.up_proj.weight"]
    assert gguf_weights.paired("model.layers.0.mlp.up_proj.weight", untouched, config) is untouched


def test_a_family_or_rope_without_a_gguf_layout_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    for config, message in (
        ({"model_type": "gemma"}, "model_type='gemma' has no GGUF layout here: use one of llama"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' is not written"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            gguf_weights.write_gguf(tmp_path, tmp_path / "w.gguf", "bfloat16")


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peaks_of_memory_can_be_forgotten():
    before = memory.resident_bytes() or 0
    block = np.ones(8 << 20)  # 64 MiB
    assert memory.peak_bytes() >= before + (48 << 20)
    del block
    memory.forget_peak()
    assert memory.peak_bytes() <= (memory.resident_bytes() or 0) + (16 << 20)
