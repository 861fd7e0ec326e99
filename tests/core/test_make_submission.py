"""Requests made into rows: the row of each field, and the refusal of values that do not fit, on the host and inside jit."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxserve import EngineConfig, ModelConfig, SamplingParams
from jaxserve.core.columns import parameter_rules
from jaxserve.core.logit_rules import LogitRules
from jaxserve.core.make_submission import (
    check_prompt,
    derived_seed,
    empty_submission,
    fill_row,
    make_submission,
    truncated,
)
from jaxserve.core.sampling import SamplingArrays
from jaxserve.core.scheduler import Status, Submission, init_state, submit
from jaxserve.request import parameters_of
from jaxserve.text.tokenizer import Tokenizer, spell

MODEL = ModelConfig("llama", 70, 2, 2, 1, 1, 1, 2)  # three words of allowed ids, the last not full
CONFIG = EngineConfig(
    max_slots=2,
    num_pages=4,
    page_size=8,
    max_model_len=16,
    max_queue=4,
    max_logprobs=3,
    max_stop_token_ids=3,
    max_stop_sequences=2,
    max_stop_sequence_len=3,
    max_logit_bias=2,
    max_bad_words=3,
    max_bad_word_len=4,
    kv_dtype="float32",
)
EOS = [3, 4]


def filled(prompt=(1, 2), *, config: EngineConfig = CONFIG, **fields: Any) -> Submission:
    """Returns a submission of three equal rows."""
    params = SamplingParams(**fields)
    return make_submission([prompt] * 3, params, model=MODEL, config=config, eos_token_ids=EOS)


# What each field becomes.


def test_rows_hold_what_the_parameters_say():
    submission = filled(
        presence_penalty=0.5,
        frequency_penalty=-2,
        repetition_penalty=1.5,
        logit_bias={9: -1, 5: 200},
        bad_words=[[7], [1, 2, 3, 8], [2, 9]],
        min_tokens=4,
        stop=[[5], [6, 7, 8]],
        stop_token_ids=[9],
        logprobs=2,
        logprobs_mode="processed",
        prompt_logprobs=1,
    )
    rules = submission.rules
    assert np.all(rules.presence_penalty == 0.5) and np.all(rules.frequency_penalty == -2)
    assert np.all(rules.repetition_penalty == 1.5) and np.all(rules.min_tokens == 4)
    assert rules.bias_ids[1].tolist() == [5, 9] and rules.bias[1].tolist() == [100, -1]  # clamped
    assert rules.bad_words[1].tolist() == [[-1, -1, -1, 7], [1, 2, 3, 8], [-1, -1, 2, 9]]
    assert not rules.restricted.any()
    assert submission.stop_sequences[1].tolist() == [[-1, -1, 5], [6, 7, 8]]
    assert submission.stop_token_ids[1].tolist() == [3, 4, 9]
    assert submission.sampling.num_logprobs.tolist() == [2] * 3 and submission.sampling.processed.all()
    assert submission.num_prompt_logprobs.tolist() == [1] * 3


# A value for each parameter that the device needs, other than the default.
CHANGES: dict[str, Any] = {
    "allowed_token_ids": [1],
    "bad_words": [[1]],
    "min_tokens": 1,
    "logit_bias": {1: 1},
    "repetition_penalty": 2,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "temperature": 0.5,
    "min_p": 0.5,
    "top_k": 1,
    "top_p": 0.5,
    "seed": 1,
    "n": 2,
    "ignore_eos": True,
    "stop_token_ids": [1],
    "stop": [[1]],
    "max_tokens": 1,
    "logprobs": 1,
    "logprobs_mode": "processed",
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 1,
}
ONLY_FOR_THE_HOST = {
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
}


def test_every_parameter_that_is_not_the_hosts_alone_changes_the_rows():
    assert CHANGES.keys() | ONLY_FOR_THE_HOST == SamplingParams.__dataclass_fields__.keys()
    plain = jax.tree.leaves(filled())
    for name, value in CHANGES.items():
        changed = jax.tree.leaves(filled(**{name: value}))
        assert not all(np.array_equal(*pair) for pair in zip(plain, changed, strict=True)), name


def test_defaults_change_nothing():
    assert_equal_rows(filled(), filled(bad_words=[], stop=[], logit_bias={}, allowed_token_ids=None))
    submission = filled()
    empty = empty_submission(3, MODEL, CONFIG)
    for name in (field.name for field in dataclasses.fields(submission.rules)):
        np.testing.assert_array_equal(getattr(submission.rules, name), getattr(empty.rules, name), err_msg=name)
    assert np.all(submission.stop_sequences == -1)


def assert_equal_rows(a: Submission, b: Submission) -> None:
    for (path, left), right in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("ids", [[0], [31], [32], [69], [0, 31, 32, 63, 64, 69], range(70), [5, 5, 5]])
def test_allowed_ids_become_their_bits_and_no_others(ids):
    rules = filled(allowed_token_ids=ids).rules
    assert rules.restricted.all() and rules.allowed.shape == (3, 3)
    for words in rules.allowed:
        assert [token for token in range(96) if words[token // 32] >> np.uint32(token % 32) & 1] == sorted(set(ids))


def test_a_row_is_filled_and_the_others_are_left_alone():
    rows, empty = empty_submission(3, MODEL, CONFIG), empty_submission(3, MODEL, CONFIG)
    params = SamplingParams(allowed_token_ids=[2, 40], bad_words=[[2]], logit_bias={2: 1}, stop=[[1]], min_tokens=1)
    fill_row(rows, 1, (5, 6), params, seed=2**40 + 7, priority=-1, eos_token_ids=EOS)
    keep = np.array([0, 2])
    assert_equal_rows(*(jax.tree.map(lambda leaf: leaf[keep], tree) for tree in (rows, empty)))
    assert rows.sampling.key_data[1].tolist() == [2**8, 7] and rows.valid.tolist() == [False, True, False]


def test_end_of_sequence_and_stop_tokens_count_once_and_are_left_out_on_request():
    assert filled(stop_token_ids=[4, 9]).stop_token_ids[0].tolist() == [3, 4, 9]
    assert filled(stop_token_ids=[4, 9], ignore_eos=True).stop_token_ids[0].tolist() == [4, 9, -1]
    assert filled(ignore_eos=True).stop_token_ids[0].tolist() == [-1] * 3


def test_requests_without_a_seed_get_one_each():
    prompts = [(1,)] * 3
    given = [SamplingParams(), SamplingParams(seed=5), SamplingParams()]
    keys = make_submission(prompts, given, model=MODEL, config=CONFIG, seed=9).sampling.key_data.tolist()
    assert keys[1] == [0, 5]
    assert keys[::2] == [[derived_seed(9, i) >> 32, derived_seed(9, i) & 0xFFFFFFFF] for i in (0, 2)]
    assert keys[0] != keys[2]


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 20), (1, 1), (3, 3), (15, 15), (19, 19), (20, 20), (99, 20), (-1, 15)]
)
def test_the_last_tokens_of_a_prompt_are_kept(limit, expected):
    prompt = tuple(range(20))
    kept = truncated(prompt, SamplingParams(truncate_prompt_tokens=limit), CONFIG)
    assert kept == prompt[-expected:]


def test_a_long_prompt_is_taken_if_it_is_cut_to_what_fits():
    for limit, length in ((-1, 15), (4, 4)):
        submission = filled(tuple(range(40)), truncate_prompt_tokens=limit)
        assert submission.prompt_length.tolist() == [length] * 3
        assert submission.tokens[0, :length].tolist() == list(range(40 - length, 40))
    for limit in (None, 16):
        with pytest.raises(ValueError, match="max_model_len=16 tokens hold prompt and output together"):
            filled(tuple(range(40)), truncate_prompt_tokens=limit)


# Refused on the host.

NO_ROOM = [
    ("max_logit_bias", "logit_bias has 3 token ids", {"logit_bias": {1: 1, 2: 1, 3: 1}}),
    ("max_bad_words", "bad_words has 4 token sequences", {"bad_words": [[1], [2], [3], [4]]}),
    ("max_bad_word_len", "bad_words has 5 tokens in one sequence", {"bad_words": [[1], [1, 2, 3, 4, 5]]}),
    ("max_stop_sequences", "stop has 3 token sequences", {"stop": [[1], [2], [3]]}),
    ("max_stop_sequence_len", "stop has 4 tokens in one sequence", {"stop": [[1, 2, 3, 4]]}),
    ("max_stop_token_ids", "the request has 4 stop tokens, end-of-sequence included", {"stop_token_ids": [1, 2]}),
    ("max_logprobs", "logprobs=4 is above max_logprobs=3", {"logprobs": 4}),
    ("max_logprobs", "prompt_logprobs=4 is above max_logprobs=3", {"prompt_logprobs": 4}),
]


@pytest.mark.parametrize(("capacity", "message", "fields"), NO_ROOM, ids=[name for name, *_ in NO_ROOM])
def test_more_than_a_capacity_is_refused_by_its_name_and_one_more_room_is_enough(capacity, message, fields):
    with pytest.raises(ValueError) as caught:
        filled(**fields)
    text = str(caught.value)
    assert text.startswith(f"prompt 0: {message}") and f"{capacity}={getattr(CONFIG, capacity)}" in text
    assert f"raise {capacity}" in text and "\n" not in text
    filled(config=dataclasses.replace(CONFIG, **{capacity: getattr(CONFIG, capacity) + 1}), **fields)


@pytest.mark.parametrize("fields", [{"logit_bias": {1: 1}}, {"bad_words": [[1]]}, {"stop": [[1]]}], ids=str)
def test_where_there_is_no_room_at_all_nothing_is_taken_and_plain_requests_are(fields):
    config = dataclasses.replace(CONFIG, max_logit_bias=0, max_bad_words=0, max_stop_sequences=0)
    filled(config=config)
    with pytest.raises(ValueError, match="=0: use fewer or raise max_"):
        filled(config=config, **fields)


@pytest.mark.parametrize(
    "fields", [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"repetition_penalty": 1.1}], ids=str
)
def test_penalties_are_refused_where_the_engine_keeps_no_counts(fields):
    filled(**fields)
    with pytest.raises(ValueError, match="need penalties=true in the engine's configuration"):
        filled(config=dataclasses.replace(CONFIG, penalties=False), **fields)


@pytest.mark.parametrize("outside", [70, 2**31 - 1])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("stop_token_ids", lambda token: {"stop_token_ids": [token]}),
        ("allowed_token_ids", lambda token: {"allowed_token_ids": [1, token]}),
        ("logit_bias", lambda token: {"logit_bias": {token: 1.0}}),
        ("bad_words", lambda token: {"bad_words": [[1], [token, 2]]}),
        ("stop", lambda token: {"stop": [[1], [2, token]]}),
        ("prompt_token_ids", lambda token: {"prompt": (1, token)}),
    ],
)
def test_ids_outside_the_vocabulary_are_named_with_their_field(name, fields, outside):
    with pytest.raises(
        ValueError, match=f"^prompt 0: {name} has {outside}, but the model's token ids go from 0 to 69$"
    ):
        filled(**fields(outside))
    filled(**fields(69))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bad_words": [[1], "no"]}, "bad_words has the text 'no', which needs a tokenizer: give lists of token ids"),
        ({"stop": [[1], "END"]}, "stop has the text 'END', which needs a host: give lists of token ids"),
    ],
)
def test_texts_are_refused_where_there_is_no_tokenizer(fields, message):
    with pytest.raises(ValueError, match=message):
        filled(**fields)


def test_the_prompt_at_fault_is_named():
    with pytest.raises(ValueError, match="^prompt 1: bad_words has 70"):
        params = [SamplingParams(), SamplingParams(bad_words=[[70]])]
        make_submission([(1,), (2,)], params, model=MODEL, config=CONFIG)
    with pytest.raises(ValueError, match="^the prompt has no tokens"):
        check_prompt((), SamplingParams(), model=MODEL, config=CONFIG)


# Refused inside jit, where nothing raises: the row ends at once.


@jax.jit
def submitted(submission: Submission) -> jax.Array:
    return submit(init_state(MODEL, CONFIG), submission, model=MODEL, config=CONFIG)[0].queue.status


EVERYTHING: dict[str, Any] = {
    "presence_penalty": 2,
    "frequency_penalty": -2,
    "repetition_penalty": 3e38,
    "logit_bias": {0: -100, 69: 100},
    "allowed_token_ids": [0, 69],
    "bad_words": [[69], [0, 1, 2, 69], [69, 0]],
    "min_tokens": 16,
    "stop": [[69], [0, 1, 69]],
}


def test_rows_at_the_edge_of_every_range_are_taken():
    assert submitted(filled(**EVERYTHING)).tolist() == [Status.WAITING] * 3 + [Status.FREE]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.01),
        ("presence_penalty", np.nan),
        ("frequency_penalty", -2.01),
        ("frequency_penalty", np.inf),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", np.inf),
        ("repetition_penalty", np.nan),
        ("bias", [0.0, 100.1]),
        ("bias", [np.nan, 0.0]),
        ("bias_ids", [70, -1]),
        ("bias_ids", [1, -2]),
        ("bad_words", [[-1, -1, -1, 1], [-1, -1, -1, -1], [-1, -1, 2, 70]]),
        ("min_tokens", -1),
    ],
)
def test_a_rule_out_of_range_ends_its_row_with_error_and_no_other(field, value):
    submission = filled(**EVERYTHING)
    getattr(submission.rules, field)[1] = value
    assert submitted(submission).tolist() == [Status.WAITING, Status.ERROR, Status.WAITING, Status.FREE]


COLUMNS = [
    (record, name)
    for record, kind in (("sampling", SamplingArrays), ("rules", LogitRules))
    for name in parameter_rules(kind)
]


@pytest.mark.parametrize(("record", "name"), COLUMNS)
def test_every_number_is_taken_within_the_range_of_its_parameter_and_refused_beyond(record, name):
    rule = parameters_of(SamplingParams)[name].rule
    column = getattr(getattr(filled(), record), name)
    if column.dtype == np.float32:
        inside, outside = [rule.low, rule.high], [rule.low - 1e-3, -np.inf, np.inf, np.nan]
        inside, outside = (inside[1:], [*outside, rule.low]) if rule.above else (inside, outside)
        outside += [rule.high + 1e-3] if rule.high < 1e3 else []
    else:
        inside, outside = [rule.low, rule.high], [rule.low - 1]
    for values, status in ((inside, Status.WAITING), (outside, Status.ERROR)):
        for value in values:
            submission = filled()
            getattr(getattr(submission, record), name)[1] = value
            assert submitted(submission).tolist() == [Status.WAITING, status, Status.WAITING, Status.FREE], value


@pytest.mark.parametrize("count", [-2, 4])
def test_prompt_logprobs_out_of_range_end_their_row_with_error(count):
    submission = filled()
    submission.num_prompt_logprobs[1] = count
    assert submitted(submission).tolist() == [Status.WAITING, Status.ERROR, Status.WAITING, Status.FREE]


def test_penalties_without_counts_end_their_row_with_error():
    config = dataclasses.replace(CONFIG, penalties=False)
    submission = filled(config=config)
    submission.rules.presence_penalty[2] = 1
    state, _ = submit(init_state(MODEL, config), jax.device_put(submission), model=MODEL, config=config)
    assert state.queue.status.tolist() == [Status.WAITING, Status.WAITING, Status.ERROR, Status.FREE]


# Bad words as texts: spelled by a tokenizer first.


def byte_level() -> Tokenizer:
    """GPT-2's kind: a blank belongs to the word after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "c"), ("Ġ", "ca"), ("Ġ", "cat"), ("d", "o"), ("Ġ", "d")]
    merged = list(dict.fromkeys("".join(pair) for pair in merges))
    vocabulary = {piece: i for i, piece in enumerate(["<s>", *alphabet, *merged])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("d", "o")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


def sentence_piece() -> Tokenizer:
    """Llama 2's kind: every text begins with a blank, written as U+2581; bytes for what has no piece."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"catdog", "▁c", "▁ca", "▁cat"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


def words() -> Tokenizer:
    """Whole words only; blanks are nothing to it."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "cat": 1, "dog": 2}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


def spelled(tokenizer: Tokenizer, *wanted: str | tuple[int, ...]) -> list[str]:
    """Each spelling as its tokens, joined with bars."""
    name = tokenizer.backend.id_to_token
    return ["|".join(str(name(token)) for token in spelling) for spelling in spell(wanted, tokenizer)]


@pytest.mark.parametrize(
    ("make", "word", "expected"),
    [
        (byte_level, "cat", ["cat", "Ġcat"]),
        (byte_level, " cat", ["Ġcat"]),
        (byte_level, "dog", ["do|g"]),  # "Ġ|do|g" ends with it
        (byte_level, "cat dog", ["cat|Ġ|do|g", "Ġcat|Ġ|do|g"]),
        (byte_level, "\n", ["Ċ"]),  # and not the blank
        (byte_level, "  ", ["Ġ|Ġ"]),  # and not a single blank
        (byte_level, "é", ["Ã|©"]),
        (sentence_piece, "cat", ["▁cat"]),  # "▁|▁cat" ends with it
        (sentence_piece, " cat", ["▁|▁cat"]),
        (sentence_piece, "dog", ["▁|d|o|g"]),
        (sentence_piece, "\n", ["▁|<0x0A>"]),
        (words, "cat", ["cat"]),
        (words, "cat  dog", ["cat|dog"]),
    ],
)
def test_a_word_is_spelled_as_at_the_start_of_a_text_and_after_a_blank(make, word, expected):
    assert spelled(make(), word) == expected


def test_spellings_come_in_order_once_each_and_token_ids_stay_as_they_are():
    tokenizer = byte_level()
    (dog,) = spell(["dog"], tokenizer)
    assert spell([(5, 6), "dog", "dog", dog, (5, 6), (7,)], tokenizer) == ((5, 6), dog, (7,))
    assert spell([], tokenizer) == ()


@pytest.mark.parametrize("word", [" ", "\n"])
def test_a_word_of_which_there_are_no_tokens_is_refused_and_not_ignored(word):
    with pytest.raises(ValueError, match="of which the tokenizer makes no tokens: leave it out"):
        spell(["cat", word], words())


def test_spellings_count_against_the_room_for_bad_words():
    bad_words = spell(["cat", "cat dog"], byte_level())
    model = dataclasses.replace(MODEL, vocab_size=300)
    with pytest.raises(ValueError, match="bad_words has 4 token sequences, but max_bad_words=3"):
        make_submission([(1,)], SamplingParams(bad_words=bad_words), model=model, config=CONFIG)
