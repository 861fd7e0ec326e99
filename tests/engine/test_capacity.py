"""What is chosen for a machine and a model where the configuration leaves it open."""

import dataclasses

import pytest

from jaxserve import EngineConfig
from jaxserve.engine.capacity import resolve_capacities
from tests import small_model

CONFIG = EngineConfig(max_slots=2, page_size=8, attention_backend="reference")


@pytest.mark.parametrize(("max_position", "longest"), [(128, 128), (4096, 2048)])
def test_the_longest_sequence_is_by_default_2048_tokens_or_what_the_model_was_made_for(max_position, longest):
    model = dataclasses.replace(small_model.MODEL, max_position=max_position)
    assert (CONFIG.max_model_len, CONFIG.max_sequence_len) == (None, 2048)
    resolved = resolve_capacities(CONFIG, model, small_model.make_params())
    assert (resolved.max_model_len, resolved.max_sequence_len) == (longest, longest)


@pytest.mark.parametrize("length", [129, 2048])
def test_a_longest_sequence_above_the_models_is_refused_whatever_its_value(length):
    config = dataclasses.replace(CONFIG, max_model_len=length)
    with pytest.raises(ValueError, match=f"max_model_len={length} is longer than the 128 positions .* or leave it out"):
        resolve_capacities(config, small_model.MODEL, small_model.make_params())
