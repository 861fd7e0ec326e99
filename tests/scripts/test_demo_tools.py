"""The demo model's tools: corpus split, tokenizer, Kneser-Ney, training that resumes, what counts as parsing."""

import dataclasses
import random

import evaluate_demo_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_demo_model
from demo import completions as demo_completions
from demo import corpus as demo_corpus
from demo import kneser_ney
from demo import model as demo_model
from demo import tokenizer as demo_tokenizer
from flax import nnx

from jaxserve.models import Projection, RopeConfig, Transformer, causal_attend
from jaxserve.models.rope import rotations

TINY = dataclasses.replace(
    demo_model.CONFIG,
    vocab_size=31,
    embed_dim=32,
    ffw_dim=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    windows=(),
    max_position=16,
)
RECIPE = train_demo_model.Recipe(context=16, batch_size=4, microbatch_size=2, warmup_steps=2)
TEXTS = ["def f(self, x):\n    return self.x + x\n\n\n", "class A:\n    def g(self):\n        pass\n"] * 20


def markov_tokens(num_tokens: int, vocab_size: int = 7) -> np.ndarray:
    """Each token is one of two successors of the last two."""
    rng = random.Random(0)
    tokens = [0, 1]
    for _ in range(num_tokens - 2):
        tokens.append((3 * tokens[-1] + tokens[-2] + rng.randrange(2)) % vocab_size)
    return np.array(tokens, np.uint16)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one_after_seen_and_unseen_contexts(order):
    model = kneser_ney.fit(markov_tokens(500), order, vocab_size=9)  # Tokens 7 and 8 never occur.
    rng = np.random.default_rng(0)
    for context in rng.integers(0, 9, (20, order - 1)):
        every = kneser_ney.probabilities(model, np.tile(context, (9, 1)), np.arange(9))
        assert every.min() > 0
        assert every.sum() == pytest.approx(1.0)


def test_a_trigram_beats_lower_orders_where_two_tokens_decide():
    tokens = markov_tokens(4000)
    bits = [kneser_ney.bits(kneser_ney.fit(tokens[:3000], n, 7), tokens[3000:]) / 1000 for n in (1, 2, 3)]
    assert bits[2] < 0.5 * min(bits[:2])
    assert bits[2] == pytest.approx(1.0, abs=0.1)  # One coin per token.


def test_kneser_ney_equals_a_count_by_hand():
    # a b a b a c: bigrams ab 2, ba 2, ac 1; left neighbours: a {b}, b {a}, c {a}; every discount is 0.75.
    model = kneser_ney.fit(np.array([0, 1, 0, 1, 0, 2], np.uint16), 2, vocab_size=3)
    unigram_c = (1 - 0.75) / 3 + 0.75 * 3 / 3 / 3
    expected = (1 - 0.75) / 3 + 0.75 * 2 / 3 * unigram_c
    assert kneser_ney.probabilities(model, np.array([[0]]), np.array([2]))[0] == pytest.approx(expected)


def test_n_grams_that_do_not_fit_a_word_are_refused():
    with pytest.raises(ValueError, match="lower the order"):
        kneser_ney.fit(markov_tokens(50), 6, vocab_size=2048)


def test_the_heldout_split_depends_on_the_name_alone():
    names = [f"pkg/module_{i}.py" for i in range(1000)]
    heldout = [name for name in names if demo_corpus.is_heldout(name)]
    assert 25 <= len(heldout) <= 75
    assert heldout[:3] == ["pkg/module_24.py", "pkg/module_76.py", "pkg/module_82.py"]


def test_the_heldout_list_holds_only_heldout_names():
    names = demo_corpus.HELDOUT_FILE.read_text().split()
    assert names == sorted(set(names))
    assert all(map(demo_corpus.is_heldout, names))


def test_a_near_copy_is_dropped_and_other_files_stay():
    lines = [f"a long enough line, number {i}\n" for i in range(20)]
    other = "".join(f"something else entirely, {i}\n" for i in range(20))
    sources = [("a", "".join(lines)), ("b", "".join(lines[:15]) + "a changed ending of the file\n"), ("c", other)]
    assert [name for name, _ in demo_corpus.deduplicate(sources)] == ["a", "c"]


@pytest.mark.parametrize("text", ["x = 'é☃😀'\r\n\tpass\n\n\n", "".join(map(chr, range(1, 300))), " \n  \n", ""])
def test_the_tokenizer_gives_any_text_back(text):
    tokenizer = demo_tokenizer.train(TEXTS, vocab_size=300)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_line_end_with_its_indentation_is_one_token():
    tokenizer = demo_tokenizer.train(TEXTS, vocab_size=300)
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("def f(self):\n        pass\n").ids]
    assert "\n        " in tokens


def test_every_file_is_led_by_end_of_text():
    tokenizer = demo_tokenizer.train(TEXTS, vocab_size=300)
    tokens = demo_tokenizer.encode(tokenizer, TEXTS[:3])
    assert tokens[0] == tokens[-1] == demo_tokenizer.END_OF_TEXT_ID
    assert np.sum(tokens == demo_tokenizer.END_OF_TEXT_ID) == 4


def test_attention_in_blocks_is_causal_attention():
    batch, time = 2, 12

    @jax.jit
    def both(key):
        qkv = jax.random.normal(key, (batch * time, 2, 4, 8))
        projection = Projection(qkv, *rotations(RopeConfig(), 8, jnp.tile(jnp.arange(time), batch)))
        blocks, _ = demo_model.causal_attend_in_blocks(batch, time, block=4)(projection, None, layer=0, window=None)
        return blocks, causal_attend(batch, time)(projection, None, layer=0, window=None)[0]

    blocks, dense = both(jax.random.key(0))
    np.testing.assert_allclose(blocks, dense, atol=1e-5)


def test_the_loss_in_chunks_has_the_gradient_of_the_plain_one():
    hidden = jax.random.normal(jax.random.key(0), (10, 8))
    embedding = jax.random.normal(jax.random.key(1), (6, 8))
    targets = jnp.arange(10) % 6

    def plain(hidden, embedding):
        scores = jax.nn.log_softmax(hidden @ embedding.T)
        return -jnp.take_along_axis(scores, targets[:, None], axis=1).mean()

    def chunked(hidden, embedding):
        return demo_model.cross_entropy(hidden, embedding, targets, 4)

    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, embedding)
    actual = jax.jit(jax.value_and_grad(chunked, (0, 1)))(hidden, embedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


def run_steps(state, tokens, num_steps):
    """`num_steps` of training; optax itself does not promote strictly."""
    step, losses = train_demo_model.make_step(TINY, RECIPE), []
    for _ in range(num_steps):
        batch = train_demo_model.batch_at(tokens, state.num_tokens, RECIPE, seed=0)
        with jax.numpy_dtype_promotion("standard"):
            params, optimizer, loss = step(state.params, state.optimizer, batch, np.float32(1.0))
        state = train_demo_model.TrainState(params, optimizer, state.step + 1, state.num_tokens + batch.shape[0] * 16)
        losses.append(float(loss))
    return state, losses


def test_training_lowers_the_loss_and_resumes_bit_for_bit(tmp_path):
    tokens = markov_tokens(2000)
    state, losses = run_steps(train_demo_model.init_state(TINY, RECIPE, seed=0), tokens, 10)
    assert losses[-1] < losses[0] - 0.5
    train_demo_model.save_checkpoint(tmp_path / "stable.safetensors", state)
    _, expected = run_steps(state, tokens, 3)
    like = train_demo_model.init_state(TINY, RECIPE, seed=1)
    loaded = train_demo_model.load_checkpoint(tmp_path / "stable.safetensors", like)
    assert (loaded.step, loaded.num_tokens) == (10, 640)
    assert run_steps(loaded, tokens, 3)[1] == expected


def test_an_epoch_reads_every_window_once():
    tokens = np.arange(16 * 9, dtype=np.uint16)
    rows = [train_demo_model.batch_at(tokens, n, RECIPE, seed=0) for n in (0, 64)]
    starts = sorted(int(row[0]) for batch in rows for row in batch)
    assert np.all(np.diff(starts) == 16)


def test_every_token_after_the_first_is_scored_once():
    windows, first = evaluate_demo_model.overlapping_windows(np.arange(43), 8)
    scored = [int(t) for row, start in zip(windows, first, strict=True) for t in row[1 + start :]]
    assert scored == list(range(1, 43))


def test_model_bits_add_up_to_the_mean_loss():
    model = nnx.jit(lambda: Transformer(TINY, rngs=nnx.Rngs(0)))()
    tokens = markov_tokens(17)
    loss = nnx.jit(train_demo_model.loss_of)(model, jnp.asarray(tokens[None], jnp.int32))
    assert evaluate_demo_model.model_bits(model, tokens) == pytest.approx(16 * float(loss) / np.log(2), rel=1e-5)


HEAD = "def f(x):\n    'Doc.'"


@pytest.mark.parametrize(
    ("completion", "ended", "verdict"),
    [
        ("\n    return x\n", True, "complete"),
        ("\n    return x\n\n\ndef g(:", False, "complete"),
        ("\n    return (x\n\n\ndef g():", False, "no"),
        ("\n    z = x\n    if z:\n        y = [x,", False, "beginning"),
        ("\n    z = x\n    if z:\n        y = [x,", True, "no"),
        ("\n    x = = 1\n    retu", False, "no"),
        ("\n      \n      \n", False, "no"),
        ("\n    # x\n\n\nclass A:", False, "no"),
    ],
)
def test_a_completion_parses_as_a_whole_or_as_a_beginning(completion, ended, verdict):
    assert demo_completions.parses(HEAD, completion, ended=ended) == verdict
