"""Test `moco.report.ridges`: no number of the axis is cut off."""

import numpy as np
import pytest

from moco.report import plots
from moco.report.ridges import ridges


@pytest.mark.parametrize("limits", [(-1.0, 1.0), (-0.82, 1.0), (-0.75, 1.02), (0.8, 0.9), (0, 1)])
def test_numbers_at_the_ends_of_the_axis_are_not_cut_off(limits):
    values = np.linspace(*limits, 50)
    figure = ridges({"one": values}, {"one": plots.look(0)}, limits, "one")
    figure.canvas.draw()
    (axis,) = figure.axes
    ends = [
        text
        for tick, text in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
        if limits[0] <= tick <= limits[1]
    ]
    boxes = [text.get_window_extent() for text in ends]
    assert len(ends) > 2
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.x1
