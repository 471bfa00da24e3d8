"""The contract of a recording."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import toy_recording

from cortexlit.core import DataError

TOY = toy_recording()


@pytest.mark.parametrize("name", ["running", "pupil_area", "pupil_center", "timestamps"])
@given(change=st.sampled_from([-1, 1]))
def test_wrong_length_is_refused(name, change):
    array = getattr(TOY, name)
    wrong = array[:-1] if change < 0 else np.concatenate([array, array[-1:] + 1])
    with pytest.raises(DataError, match=f"{name} has shape"):
        replace(TOY, **{name: wrong})


@pytest.mark.parametrize("name", ["running", "pupil_area", "pupil_center"])
def test_unmeasured_is_none_never_nan(name):
    assert getattr(replace(TOY, **{name: None}), name) is None
    with pytest.raises(DataError, match="no finite value"):
        replace(TOY, **{name: np.full_like(getattr(TOY, name), np.nan)})


@given(
    row=st.integers(0, 299),
    column=st.sampled_from(["start", "end"]),
    value=st.sampled_from([-1, TOY.n_frames, 10**9]),
)
def test_table_row_outside_the_trace_is_refused(row, column, value):
    table = TOY.stimulus_tables["one"].copy()
    table.loc[row, column] = value
    with pytest.raises(DataError, match="1 of 300 rows point outside"):
        replace(TOY, stimulus_tables={"one": table})


def test_arrays_are_read_only_but_the_callers_stay_writable():
    traces = TOY.traces.copy()
    recording = replace(TOY, traces=traces)
    with pytest.raises(ValueError, match="read-only"):
        recording.traces[0, 0] = 1
    traces[0, 0] = 1


def test_integer_traces_are_fine():
    assert replace(TOY, traces=TOY.traces.astype("int16")).traces.dtype == np.int16


def test_movies_need_a_template():
    assert replace(TOY, templates={"one": TOY.templates["one"]}).movies() == ["one"]
