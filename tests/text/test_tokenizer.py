"""Tokens to text, all at once and one by one, for every kind of decoder; chat templates; end-of-sequence ids."""

import json
import time

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.text.tokenizer import IncrementalDecoder, load_eos_token_ids, load_tokenizer
from tests.text.small_tokenizers import KINDS, TEXTS, hugging_face_tokenizer, tokenizer_of


def _pushed(decoder: IncrementalDecoder, token_ids: list[int]) -> list[str]:
    return [*map(decoder.push, token_ids), decoder.flush()]


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_encode_and_decode_equal_those_of_transformers(kind):
    inner, tokenizer = hugging_face_tokenizer(kind), tokenizer_of(kind)
    assert tokenizer.vocab_size == len(inner) and tokenizer.eos_token_id == inner.eos_token_id
    for text in [*TEXTS, "<s>the</s> cat<|end|>", ""]:
        ids = tokenizer.encode(text)
        assert ids == inner(text).input_ids
        assert tokenizer.encode(text, add_special_tokens=False) == inner(text, add_special_tokens=False).input_ids
        for skip in (True, False):
            expected = inner.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@every_kind
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_random_tokens_add_up_to_the_whole_text(kind, data, skip):
    tokenizer = tokenizer_of(kind)
    token = st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, 12)
    ids = data.draw(st.lists(token, max_size=40))
    pieces = _pushed(IncrementalDecoder(tokenizer, skip_special_tokens=skip), ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@every_kind
@given(text=st.text(alphabet="ab thé日😀🇩\n,.</s>", max_size=30))
def test_pieces_never_end_within_a_character(kind, text):
    tokenizer = tokenizer_of(kind)
    pieces = _pushed(IncrementalDecoder(tokenizer), tokenizer.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))


@every_kind
@given(data=st.data())
def test_text_after_a_context_continues_it(kind, data):
    tokenizer = tokenizer_of(kind)
    tokens = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20)
    context, ids = data.draw(tokens), data.draw(tokens)
    whole = IncrementalDecoder(tokenizer)
    before = "".join(map(whole.push, context))
    pieces = _pushed(IncrementalDecoder(tokenizer, context=context), ids)
    assert before + "".join(pieces) == tokenizer.decode(context + ids)


def test_first_word_after_a_context_keeps_its_blank():
    tokenizer = tokenizer_of("byte fallback")
    the = tokenizer.encode("the", add_special_tokens=False)
    assert IncrementalDecoder(tokenizer).push(*the) == "the"
    assert IncrementalDecoder(tokenizer, context=tokenizer.encode("cat")).push(*the) == " the"


def test_byte_level_holds_back_an_incomplete_character_only():
    tokenizer = tokenizer_of("byte level")
    ids = [tokenizer.backend.token_to_id(character) for character in ("a", "ð", "Ł", "ĺ", "Ģ", "ð", "b")]
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(token) for token in ids] == ["a", "", "", "", "😀", "", "\ufffdb"]


def test_invalid_byte_makes_its_whole_run_invalid_with_byte_fallback():
    tokenizer = tokenizer_of("byte fallback")
    ids = [tokenizer.backend.token_to_id(token) for token in ("<0xC3>", "<0xA9>", "<0xFF>", "a")]
    assert tokenizer.decode(ids) == "\ufffd\ufffd\ufffda"
    assert _pushed(IncrementalDecoder(tokenizer), ids) == ["", "", "", "\ufffd\ufffd\ufffda", ""]


def test_adjacent_added_tokens_are_joined_when_no_spaces_are_wanted():
    tokenizer = tokenizer_of("word piece")
    ids = tokenizer.encode("<s></s>the<|end|>")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> </s> the <|end|>"
    joined = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert joined == "<s></s> the <|end|>"
    assert tokenizer.decode(ids, spaces_between_special_tokens=False) == "the"


@every_kind
def test_decode_token_shows_special_tokens(kind):
    assert tokenizer_of(kind).decode_token(1) == "</s>"


@pytest.mark.parametrize("kind", ["byte level", "byte level, then another", "byte fallback"])
def test_time_per_token_does_not_grow_with_the_sequence(kind):
    tokenizer = tokenizer_of(kind)
    byte = tokenizer.backend.token_to_id("ð") or tokenizer.backend.token_to_id("<0xF0>")

    def seconds(num_tokens: int) -> float:
        decoder, start = IncrementalDecoder(tokenizer), time.perf_counter()
        for _ in range(num_tokens):
            decoder.push(byte)  # never a whole character
        return time.perf_counter() - start

    assert min(seconds(8000) for _ in range(3)) < 40 * min(seconds(800) for _ in range(3))


def _save(directory, kind="byte level", **fields) -> None:
    backend = KINDS[kind]()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **fields).save_pretrained(
        directory
    )


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    backend = KINDS["byte level"]()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_chat_template_is_rendered(tmp_path):
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    _save(tmp_path, chat_template=template)
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "<s>user: hi>"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<s>user: hi"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ missing.field }}",
        "{% for",
    ],
)
def test_chat_template_runs_in_a_sandbox_and_its_errors_are_clear(tmp_path, template):
    _save(tmp_path, chat_template=template)
    with pytest.raises(ValueError, match="chat template refuses these messages"):
        load_tokenizer(tmp_path).render_chat([{"role": "user", "content": "hi"}])


def test_missing_chat_template_is_refused(tmp_path):
    _save(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(tmp_path).render_chat([{"role": "user", "content": "hi"}])


def test_missing_and_malformed_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load the tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    _save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": [None, "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        load_tokenizer(tmp_path)
    except ValueError as error:
        assert "cannot load the tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 3}, (2,)),
        ({"eos_token_id": [2, 4, 2]}, {}, (2, 4)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": [3]}, (3,)),
        (None, {"eos_token_id": 3}, (3,)),
        (None, None, ()),
    ],
)
def test_eos_ids_come_from_the_generation_config_first(tmp_path, generation, config, expected):
    for name, fields in (("generation_config.json", generation), ("config.json", config)):
        if fields is not None:
            (tmp_path / name).write_text(json.dumps(fields))
    assert load_eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [-1]}', '{"eos_token_id": true}']
)
def test_malformed_eos_ids_are_refused_with_the_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_eos_token_ids(tmp_path)
