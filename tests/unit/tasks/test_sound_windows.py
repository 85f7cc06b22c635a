"""Windows of a sound: those of transformers' pipeline, counted before they are made."""

import pytest

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.sound_windows import Windows, windows_of


def of_the_pipeline(samples, length, left, right):
    """``chunk_iter`` of transformers' pipeline, without its features."""
    for start in range(0, samples, length - left - right):
        last = start + length >= samples
        end = min(start + length, samples)
        if end - start > (left if start else 0):
            yield start, end, left if start else 0, 0 if last else right
        if last:
            return


@pytest.mark.parametrize("sides", [(0, 0), (2, 1), (0, 3), (4, 0), (3, 3)])
def test_windows_are_those_of_the_pipeline(sides):
    windows = Windows(8, *sides)
    for samples in range(1, 60):
        found = windows.of(samples)
        assert found == list(of_the_pipeline(samples, 8, *sides))
        assert windows.count(samples) == len(found)


def asked(length, *sides):
    return {"chunk_length_s": length, "stride_length_s": list(sides)}


def test_lengths_are_whole_steps_of_the_model():
    assert windows_of(asked(0.0), 16_000, 320) is None
    assert windows_of(asked(30.0), 16_000, 320) == Windows(480_000, 80_000, 80_000)
    assert windows_of(asked(1.01, 0.1), 16_000, 320) == Windows(16_000, 1600, 1600)
    assert windows_of(asked(1.0, 0.1, 0.0), 16_000, 320) == Windows(16_000, 1600, 0)


@pytest.mark.parametrize("length", [0.2, 0.1, 0.001])
def test_overlaps_must_leave_something_of_a_window(length):
    with pytest.raises(InputError, match=r"longer than its overlaps.*steps of 320 samples"):
        windows_of(asked(length, 0.1), 16_000, 320)
