"""Compare the linear layer on VOC2007's images with plain versions: loss, steps, views, ranks."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import on_two_ranks
from data_helpers import read, set_rank, smooth_rgb, some_photographs
from metric_helpers import eleven_points_by_hand
from PIL import Image
from torch import nn
from torchvision import transforms

from moco.data.loader import EvalBatchSampler
from moco.errors import InputError
from moco.evaluate import voc_layer

CLASSES, D, LR, EPOCHS = 3, 5, 0.02, 30


def data(n, seed):
    """Return features [n, D] and labels of 1, 0 and -1, [n, CLASSES]."""
    torch.manual_seed(seed)
    x = torch.randn(n, D, dtype=torch.float64)
    label = (x[:, :CLASSES] + torch.randn(n, CLASSES) > 0).long()
    label[torch.rand(n, CLASSES) < 0.2] = -1
    return x, label


def layer():
    torch.manual_seed(1)
    return nn.Linear(D, CLASSES, dtype=torch.float64)


def batches_of(epoch):
    """Two batches of an epoch, the second one smaller."""
    return [data(6, 100 + epoch), data(3, 200 + epoch)]


def test_the_loss_is_summed_over_the_labels_that_count():
    x, label = data(9, 0)
    logits = layer()(x)
    slow = 0
    for row, labels in zip(logits.tolist(), label.tolist(), strict=True):
        for logit, one in zip(row, labels, strict=True):
            p = 1 / (1 + math.exp(-logit))
            slow -= {1: math.log(p), 0: math.log(1 - p), -1: 0.0}[one]
    assert voc_layer.loss_sum(logits, label).item() == pytest.approx(slow, abs=1e-12)
    assert (label == -1).any()


def test_the_learning_rate_falls_and_rises_in_periods_of_12_epochs():
    found = [voc_layer.lr_of_epoch(0.05, epoch) for epoch in (0, 4, 6, 12, 18, 24, 36, 99)]
    expected = [0.05, 0.0375, 0.025, 0, 0.025, 0.05, 0, 0.025 * (1 + math.cos(8.25 * math.pi))]
    assert found == pytest.approx(expected, abs=1e-12)


def test_training_is_that_of_a_plain_loop_and_ends_at_the_best_epoch():
    val = data(40, 7)
    ours = layer()
    best = voc_layer.train_layer(ours, batches_of, val, EPOCHS, LR)

    W, b = (p.detach().clone() for p in layer().parameters())
    velocity = [torch.zeros_like(W), torch.zeros_like(b)]
    found = []
    for epoch in range(EPOCHS):
        lr = LR / 2 * (1 + math.cos(math.pi * epoch / 12))
        for x, label in batches_of(epoch):
            error = torch.sigmoid(x @ W.T + b) - (label == 1).double()
            error[label == -1] = 0
            for i, gradient in enumerate((error.T @ x, error.sum(0))):
                velocity[i] = 0.9 * velocity[i] + gradient
            W, b = W - lr * velocity[0], b - lr * velocity[1]
        scores, labels = (val[0] @ W.T + b).numpy(), val[1].numpy()
        each = [labels[:, c] >= 0 for c in range(CLASSES)]
        precisions = [
            eleven_points_by_hand(labels[known, c], scores[known, c])
            for c, known in enumerate(each)
        ]
        found.append((np.mean(precisions), W, b))
    epoch = max(range(EPOCHS), key=lambda i: found[i][0])
    assert 0 < epoch < EPOCHS - 1  # else the last epoch, or none, would also pass
    assert best == pytest.approx(found[epoch][0], abs=1e-12)
    torch.testing.assert_close(ours.weight.detach(), found[epoch][1], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.bias.detach(), found[epoch][2], rtol=0, atol=1e-12)


def test_a_loss_that_is_not_finite_is_an_error():
    broken = lambda epoch: [(data(4, 0)[0] * math.nan, data(4, 0)[1])]  # noqa: E731
    with pytest.raises(InputError, match=r"nan in epoch 0.* --lr is too high"):
        voc_layer.train_layer(layer(), broken, data(8, 1), 2, LR)


def on_rank(rank):
    """Train on every second image of each batch; the second rank has no image of one batch."""

    def mine(epoch):
        small = tuple(x[:1] for x in data(3, 200 + epoch))
        return [tuple(x[rank::2] for x in batch) for batch in (data(6, 100 + epoch), small)]

    ours = layer()
    best = voc_layer.train_layer(ours, mine, data(40, 7), 4, LR)
    return {"best": best, **{name: p.detach() for name, p in ours.named_parameters()}}


def test_two_ranks_train_what_one_does(tmp_path):
    def joint(epoch):
        return [data(6, 100 + epoch), tuple(x[:1] for x in data(3, 200 + epoch))]

    ours = layer()
    best = voc_layer.train_layer(ours, joint, data(40, 7), 4, LR)
    for found in on_two_ranks({"train": (on_rank,)}, tmp_path)("train"):
        assert found["best"] == best
        torch.testing.assert_close(found["weight"], ours.weight.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(found["bias"], ours.bias.detach(), rtol=0, atol=1e-12)


def test_an_epoch_has_each_image_once_and_a_smaller_last_batch(monkeypatch):
    alone = voc_layer.EpochSampler(21, 4, seed=3, epoch=5)
    assert [len(part) for part in alone] == [4, 4, 4, 4, 4, 1] and len(alone) == 6
    assert sorted(i for part in alone for _, i in part) == list(range(21))
    assert {epoch for part in alone for epoch, _ in part} == {5}
    other = voc_layer.EpochSampler(21, 4, seed=3, epoch=6)
    assert [i for part in alone for _, i in part] != [i for part in other for _, i in part]
    ranks = []
    for rank in (0, 1):
        set_rank(monkeypatch, rank, 2)
        ranks.append(voc_layer.EpochSampler(21, 4, seed=3, epoch=5))
    assert [len(one) for one in ranks] == [6, 5] and ranks[1].parts[-1] == []
    joined = [sorted(a + b) for a, b in zip(*(one.parts for one in ranks), strict=True)]
    assert joined == [sorted(part) for part in alone]


# Views, compared with torchvision's transforms of Pillow images


def picture():
    array = smooth_rgb(50, 70)
    return Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1).contiguous()


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).int()


@pytest.mark.parametrize(
    ("draws", "brightness", "grey", "flipped", "angle"),
    [
        ((0.4, 0.0, 0.3, 0.5), 0.8, False, False, 0),
        ((0.4, 0.9, 0.2, 0.5), 1.16, False, True, 0),
        ((0.6, 0.2, 0.3, 0.5), 1, True, False, 0),
        ((0.6, 0.3, 0.2, 0.5), 1, False, True, 0),
        ((0.6, 0.2, 0.2, 0.9), 1, True, True, 20),
        ((0.6, 0.3, 0.3, 0.0), 1, False, False, -25),
    ],
)
def test_training_views_are_torchvisions(draws, brightness, grey, flipped, angle, monkeypatch):
    monkeypatch.setattr(voc_layer.rng, "uniform", lambda _key, i: draws[i])
    theirs, image = picture()
    (ours,) = voc_layer.Augmented(40, seed=0)(image, (0, 0))
    theirs = transforms.functional.resize(theirs, [40, 40])
    theirs = transforms.ColorJitter(brightness=(brightness, brightness))(theirs)
    theirs = transforms.RandomGrayscale(float(grey))(theirs)
    theirs = transforms.RandomHorizontalFlip(float(flipped))(theirs)
    theirs = transforms.RandomRotation((angle, angle))(theirs)
    assert ours.shape == (3, 40, 40) and ours.dtype == torch.uint8
    difference = (ours.int() - pixels(theirs)).abs()
    assert difference.max() <= 3 if not angle else (difference > 8).float().mean() < 0.01


def test_training_views_follow_their_probabilities_and_their_epoch():
    _, image = picture()
    view = voc_layer.Augmented(16, seed=1)
    plain = voc_layer.Stretched(16)(image, (0, 0))[0].float()
    assert torch.equal(view(image, (2, 7))[0], view(image, (2, 7))[0])
    assert not torch.equal(view(image, (2, 7))[0], view(image, (3, 7))[0])
    kinds = Counter()
    for i in range(800):
        x = view(image, (0, i))[0].float()[:, 6:10, 6:10]  # no corner is rotated into it
        kinds["grey"] += bool((x[0] - x[1]).abs().max() <= 1 and (x[1] - x[2]).abs().max() <= 1)
        # red rises from left to right
        kinds["flipped"] += bool(x[0, :, 0].mean() > x[0, :, -1].mean())
        factor = x.mean() / plain[:, 6:10, 6:10].mean()
        kinds["darker"] += bool(factor < 0.93)
    assert abs(kinds["grey"] / 800 - 0.125) < 0.04
    assert abs(kinds["flipped"] / 800 - 0.25) < 0.05
    assert abs(kinds["darker"] / 800 - 0.5 * 0.13 / 0.4) < 0.05


def test_test_views_are_torchvisions_five_crops_and_validation_views_are_stretched():
    theirs, image = picture()
    ours = voc_layer.FiveCrops(30)(image, (0, 0))
    expected = transforms.FiveCrop(30)(transforms.Resize(33)(theirs))
    assert len(ours) == len(expected) == 5
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == (3, 30, 30) and (a.int() - pixels(b)).abs().max() <= 1
    (stretched,) = voc_layer.Stretched(30)(image, (0, 0))
    assert (stretched.int() - pixels(transforms.Resize([30, 30])(theirs))).abs().max() <= 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "transform", [voc_layer.Stretched(24), voc_layer.Augmented(24, 0), voc_layer.FiveCrops(24)]
)
def test_the_loader_yields_the_views_of_each_transform(transform, workers):
    images = some_photographs().subset(np.arange(7))
    found = read(images, EvalBatchSampler(7, 4), transform, workers)
    assert [len(batch.index) for batch in found] == [4, 3]
    for batch in found:
        for i, *views in zip(batch.index.tolist(), *batch.views, strict=True):
            expected = transform(images.read(i), (0, i))
            assert all(map(torch.equal, views, expected)) and len(views) == len(expected)
