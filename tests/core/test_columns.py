"""Columns of records: their values where nothing is set, and which of them are sampling parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxserve import EngineConfig
from jaxserve.core.columns import axis_sizes, column, off_rows, parameter_rules
from jaxserve.core.pytree import Record, record


@record
class Inner(Record):
    top_p: Float32[Array, " Q"] = column(off=1, parameter=True)
    allowed: UInt32[Array, "Q V/32 2"]


@record
class Outer(Record):
    words: Int32[Array, "W NW LW"] = column(off=-1)
    inner: Inner
    valid: Bool[Array, " W"]
    aux: object


@pytest.mark.parametrize("full", [np.full, jnp.full])
def test_rows_have_the_shapes_and_dtypes_of_their_annotations_and_the_values_of_their_columns(full):
    sizes = axis_sizes(33, EngineConfig(max_bad_words=0, max_bad_word_len=5))
    rows = off_rows(Outer, 3, sizes, full, aux="kept")
    assert isinstance(rows.words, type(full((), 0))) and rows.aux == "kept"
    expected = Outer(
        words=np.full((3, 0, 5), -1, np.int32),
        inner=Inner(top_p=np.ones(3, np.float32), allowed=np.zeros((3, 2, 2), np.uint32)),
        valid=np.zeros(3, bool),
        aux=0,
    )
    for array, other in zip(jax.tree.leaves(rows)[:-1], jax.tree.leaves(expected)[:-1], strict=True):
        assert (array.shape, array.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(array, other)


def test_a_column_without_a_number_of_its_name_in_the_sampling_parameters_is_refused():
    @record
    class Misspelled(Record):
        temprature: Float32[Array, " Q"] = column(off=0, parameter=True)

    @record
    class NoNumber(Record):
        stop: Int32[Array, " Q"] = column(off=0, parameter=True)

    @record
    class MayBeNone(Record):
        logprobs: Int32[Array, " Q"] = column(off=-1, parameter=True)

    assert list(parameter_rules(Inner)) == ["top_p"]
    for kind, name in ((Misspelled, "temprature"), (NoNumber, "stop"), (MayBeNone, "logprobs")):
        with pytest.raises(TypeError, match=f"{kind.__name__}.{name} must have the name of a number in SamplingParams"):
            parameter_rules(kind)
