"""Tests of `moco.report.curves` and `plots`: which panels there are, and how they look."""

import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moco.report import curves, plots, scatter
from moco.report.plots import Curve
from moco.report.runs import Log, Run


def run(name="run", **columns):
    """Return a run of 10 steps an epoch, whose metrics have the given values."""
    found = {name: (np.arange(len(y)) * 10.0, np.asarray(y, float)) for name, y in columns.items()}
    return Run(name, name, {}, Log(found, 10.0, 20.0, 5.0, 0))


def ticks(page):
    """Return the texts of a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", page)


def test_panels_are_those_of_the_logged_metrics():
    found = curves.panels([run(loss=[3, 2]), run(grad_encoder=[1], knn=[np.nan], new=[4])])
    assert [panel.name for panel in found] == ["loss", "grad_encoder", "new"]
    assert curves.section([run()]) == ""


def test_accuracies_are_in_per_cent_with_the_random_encoder_as_baseline():
    page = curves.section([run(knn=[0.4, 0.5, 0.7], knn_gain=[0.0, 0.1, 0.3])])
    texts = ticks(page)
    assert "before training: 40" in texts and page.count("<figure>") == 1
    assert {"40", "70"} & set(texts) and not {"0.4", "0.7"} & set(texts)


def test_each_panel_names_its_runs():
    page = curves.section([run("first", loss=[3, 2], lr=[1, 1]), run("second", loss=[2, 1])])
    assert page.count("<figure>") == 2
    loss, lr = page.split("<figure>")[1:]
    assert "first</li>" in loss and "second</li>" in loss
    assert "first</li>" in lr and "second</li>" not in lr
    assert "first</li>" not in curves.section([run("first", loss=[3, 2])])


def test_types_of_negatives_share_a_panel():
    found = run(hardness=[0.9, 0.95], hardness_mixup=[0.5, 0.6], hardness_noise=[0.8, 0.8])
    page = curves.section([found])
    titles = re.findall("<h4>(.*?)</h4>", page)
    assert titles == ["Hardness of negatives", "Hardness by type of negative"]
    key = re.findall(r"</svg> ([^<]*)</li>", page)
    assert key == ["hardest real negative", "mixup", "noise"]
    assert "Hardness by type of negative: b" in curves.section(
        [run(loss=[1]), run("b", hardness_x=[1])]
    )


@pytest.mark.parametrize(("values", "log"), [([1, 30, 1e5], True), ([1, 3, 50], False)])
def test_values_that_span_decades_have_a_log_scale(values, log):
    curve = Curve(np.arange(3.0), np.array(values, float), plots.look(0))
    figure = plots.chart([curve], "epoch", {}, log=True)
    assert (figure.axes[0].get_yscale() == "log") == log
    negative = curve._replace(y=curve.y - 2)
    for one, allowed in ((negative, True), (curve, False)):
        assert plots.chart([one], "epoch", {}, log=allowed).axes[0].get_yscale() == "linear"


def test_looks_differ_in_more_than_colour():
    runs = [plots.look(i) for i in range(10)]
    assert len({(one.marker, one.dashes) for one in runs}) == 10
    classes = [scatter.class_look(i) for i in range(35)]
    assert len(set(classes)) == 35


def test_ids_of_pictures_are_unique_on_a_page():
    page = curves.section([run(loss=[3, 2], acc1=[3, 2], acc5=[3, 2])])
    clips = [set(re.findall(r'id="(p[0-9a-f]{8,})"', one)) for one in page.split("<figure>")[1:]]
    assert all(clips) and not clips[0] & clips[1] and not clips[1] & clips[2]


def test_names_on_a_map_do_not_overlap_and_those_of_large_classes_come_first():
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), np.arange(1, 101))
    places = draw.normal(size=(len(labels), 2)) + 6 * draw.normal(size=(100, 2))[labels]
    names = {i: f"class number {i}" for i in range(100)}
    figure = scatter.scatter(places, labels, names)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    shown = [int(text.get_text().split()[-1]) for text in figure.axes[0].texts]
    assert 10 < len(shown) < 100 and shown[0] == 99
    for i, box in enumerate(boxes):
        assert box.x0 + 5 >= 0 and box.x1 - 5 <= scatter.SIDE
        overlaps = [
            other for other in boxes[:i] if box.shrunk(0.9, 0.6).overlaps(other.shrunk(0.9, 0.6))
        ]
        assert not overlaps
    assert any(
        "$" in t.get_text() for t in scatter.scatter(places, labels, {99: "$x_$"}).axes[0].texts
    )
