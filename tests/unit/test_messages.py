"""The texts of messages."""

import pytest

from moco.messages import counted


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((1, "epoch"), "1 epoch"),
        ((0, "epoch"), "0 epochs"),
        ((12, "epoch"), "12 epochs"),
        ((1, "process", "processes"), "1 process"),
        ((2, "process", "processes"), "2 processes"),
        ((2, "class is", "classes are"), "2 classes are"),
    ],
)
def test_a_number_decides_between_singular_and_plural(words, said):
    assert counted(*words) == said
