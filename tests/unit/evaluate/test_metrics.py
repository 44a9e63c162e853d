"""Each metric equals its slow definition on random scores."""

import numpy as np
import pytest
import torch
from metric_helpers import eleven_points_by_hand
from sklearn.metrics import average_precision_score, confusion_matrix

from moco.engine.log import Mean
from moco.evaluate import metrics

CPU = torch.device("cpu")


def batches(*tensors, size=7):
    return zip(*(t.split(size) for t in tensors), strict=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [3, 12])
def test_accuracies_equal_those_of_the_confusion_matrix(seed, classes):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes - 1, 60)  # the last class has no image
    logits = rng.normal(size=(2, 60, classes))
    meter = metrics.Accuracy(2, classes, CPU)
    for row, y in batches(torch.from_numpy(logits).transpose(0, 1), torch.from_numpy(label)):
        meter.add(row.transpose(0, 1), y)
    for found, mine in zip(meter.read(), logits, strict=True):
        matrix = confusion_matrix(label, mine.argmax(1), labels=range(classes)).astype(float)
        seen = matrix.sum(1) > 0
        assert found["mean_per_class"] == pytest.approx(
            (matrix.diagonal()[seen] / matrix.sum(1)[seen]).mean()
        )
        assert found["acc1"] == pytest.approx(matrix.trace() / 60)
        first = np.argsort(-mine, 1)[:, :5]
        assert found["acc5"] == pytest.approx(
            np.mean([y in row for y, row in zip(label, first, strict=True)])
        )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_average_precision_equals_its_definition(seed, fraction):
    rng = np.random.default_rng(seed)
    label = (rng.random(200) < fraction).astype(int)
    label[0] = 1
    score = rng.normal(size=200) + label
    assert metrics.eleven_points(label, score) == pytest.approx(
        eleven_points_by_hand(label, score), abs=1e-12
    )
    assert metrics.area(label, score) == pytest.approx(
        average_precision_score(label, score), abs=1e-12
    )


def test_eleven_points_of_a_ranking_computed_by_hand():
    # recall 1/4 has precision 1, recall 2/4 has 2/3, recall 3/4 has 3/6, recall 4/4 has 4/10
    label = np.array([1, 0, 1, 0, 0, 1, 0, 0, 0, 1])
    score = -np.arange(10.0)
    # recalls 0 .1 .2 | .3 .4 .5 | .6 .7 | .8 .9 1
    assert metrics.eleven_points(label, score) == pytest.approx(
        (3 * 1 + 3 * 2 / 3 + 2 / 2 + 3 * 0.4) / 11
    )
    assert metrics.area(label, score) == pytest.approx((1 + 2 / 3 + 1 / 2 + 0.4) / 4)


def test_a_recall_on_a_tenth_counts_for_that_tenth():
    """With 10 positives every recall is a tenth, which floating point rounds."""
    label = np.tile([1, 0], 10)
    want = sum((i or 1) / (2 * (i or 1) - 1) for i in range(11)) / 11
    assert metrics.eleven_points(label, -np.arange(20.0)) == pytest.approx(want)


def test_difficult_objects_and_absent_classes_do_not_count():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(-1, 2, (50, 4)), rng.normal(size=(50, 4))
    labels[:, 2] = np.minimum(labels[:, 2], 0)  # no image shows it
    labels[0] = [1, 1, 0, 1]
    found = metrics.mean_average_precision(scores, labels)
    kept = [(labels[:, c] >= 0, c) for c in (0, 1, 3)]
    assert found["map"] == pytest.approx(
        np.mean([average_precision_score(labels[k, c], scores[k, c]) for k, c in kept])
    )
    assert found["map11"] == pytest.approx(
        np.mean([eleven_points_by_hand(labels[k, c], scores[k, c]) for k, c in kept])
    )


def test_average_precision_of_several_classifiers_in_batches():
    torch.manual_seed(0)
    logits, label = torch.randn(40, 3, 5), torch.randint(0, 2, (40, 5))
    meter = metrics.create_meter(True, 3, 5, CPU)
    for row, y in batches(logits, label):
        meter.add(row.transpose(0, 1), y)
    for head, found in enumerate(meter.read()):
        assert found == pytest.approx(
            metrics.mean_average_precision(logits[:, head].numpy(), label.numpy())
        )


def test_diverged_classifier_scores_like_a_constant():
    labels = np.array([[1], [0], [0], [1]])
    found = metrics.mean_average_precision(np.full((4, 1), np.nan), labels)
    assert found == {"map11": pytest.approx(0.5), "map": pytest.approx(0.5)}


def test_means_of_a_log_line_leave_out_metrics_without_samples():
    mean = Mean()
    assert mean.read() == {}
    for loss, right, count in ((1.0, 1, 1), (2.0, 0, 0), (6.0, 2, 9)):
        mean.add(
            {
                "loss": torch.tensor(loss),
                "rate": (torch.tensor(right), torch.tensor(count)),
                "none": (torch.tensor(0),) * 2,
            }
        )
    assert mean.read() == {"loss": 3.0, "rate": 0.3}
    mean.add({"loss": torch.tensor(5.0)})
    assert mean.read() == {"loss": 5.0}
