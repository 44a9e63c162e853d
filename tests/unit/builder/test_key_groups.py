"""Test the groups of batch norm in which the keys pass, in one process."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from momentum_helpers import DIM, build, keys_by_hand, two_views
from run_helpers import typed
from timm.layers import BatchNormAct2d
from torch import nn

from moco.builder import base
from moco.builder.batch_norm import split_batch_norm
from moco.builder.moco import MoCo
from moco.rng import Progress


# BN groups of the keys, one process
def numbered_images(batch):
    return torch.arange(float(batch))[:, None, None, None].expand(batch, 3, 9, 9).contiguous()


def key_groups(batch, splits, progress):
    """Which images the key encoder sees together, a list of lists of their places in the batch."""
    groups = []

    def batch_norm(x, *rest):
        groups.append(x[:, 0, 0, 0].int().tolist())
        return normalized(x, *rest)

    normalized = F.batch_norm
    model = MoCo(
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(243, DIM)),
        dim=DIM,
        K=8,
        bn_splits=splits,
    )
    with mock.patch.object(F, "batch_norm", batch_norm):
        model.keys(numbered_images(batch), progress)
    return groups


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(24, 5, 4, 3), (24, 5, 1, 1), (24, 5)])
def test_groups_as_channels_are_groups_one_by_one(shape, form):
    """Output, gradients and running statistics are the same, in float64."""
    found = []
    for name in ("group_by_group", "groups_as_channels"):
        torch.manual_seed(0)
        norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5).double()
        for x in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(x)
        split_batch_norm(norm, 3)
        x = torch.randn(shape, dtype=torch.float64)
        x = (x.contiguous(memory_format=form) if len(shape) == 4 else x).requires_grad_()
        out, means, variances = getattr(norm, name)(x, 3)
        (out * torch.randn(shape, dtype=torch.float64)).sum().backward()
        found.append([out, means, variances, x.grad, norm.weight.grad, norm.bias.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_bn_splits_query_splits_the_batch_norm_of_the_query_encoder():
    model, plain = build(bn_splits=4, bn_splits_query=True), build(bn_splits=4)
    views = two_views(32, 0)
    q = torch.cat([copy.deepcopy(plain.encoder_q)(group) for group in views[0].chunk(4)])
    torch.testing.assert_close(model.encoder_q(views[0]), q)
    assert not torch.allclose(plain.encoder_q(views[0]), q, atol=1e-3)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.encoder_q(views[0]), plain.eval().encoder_q(views[0]))


def test_the_symmetric_loss_is_the_sum_of_both_directions():
    views, progress = two_views(32, 0), Progress(seed=1)
    both, one = build(symmetric=True, K=80), build(K=80)
    loss, metrics = both(views, torch.arange(32), progress)
    first, _ = one(views, torch.arange(32), progress)
    q = F.normalize(copy.deepcopy(build(K=80).encoder_q)(views[1]))
    k = build(K=80).keys(views[0], progress, 1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ one.queue.T], 1) / one.T
    torch.testing.assert_close(
        loss, first + F.cross_entropy(logits, torch.zeros(32, dtype=torch.long))
    )
    assert all(value.dim() == 0 for value in metrics.values())
    both.after_step()
    assert int(both.queue_ptr) == 64
    torch.testing.assert_close(
        both.queue[:32], k
    )  # the keys of the first view, then those of the second


@pytest.mark.parametrize(
    ("batch", "splits", "sizes"),
    [
        (64, 8, [8] * 8),
        (128, 8, [16] * 8),
        (64, 4, [16] * 4),
        (32, 8, [8] * 4),
        (20, 8, [10, 10]),
        (26, 8, [9, 9, 8]),
        (70, 8, [9] * 6 + [8] * 2),
        (15, 8, [15]),
        (3, 8, [3]),
        (64, 1, [64]),
    ],
)
def test_keys_pass_in_groups_of_a_shuffled_batch(batch, splits, sizes):
    groups = key_groups(batch, splits, Progress(seed=1))
    assert [len(group) for group in groups] == sizes
    together = [place for group in groups for place in group]
    assert sorted(together) == list(range(batch))
    assert together != list(range(batch))
    if len(sizes) > 1:
        for group in groups:
            assert max(group) - min(group) >= len(group)  # no run of neighbours


def test_key_groups_are_fresh_each_pass_and_repeat_for_the_same_pass():
    def partition(**where):
        return {frozenset(group) for group in key_groups(64, 8, Progress(**where))}

    first = partition(step=0)
    assert first == partition(step=0)
    for where in ({"step": 1}, {"step": 0, "micro": 1}, {"step": 0, "seed": 1}):
        assert not first & partition(**where)


def test_keys_come_back_in_the_order_of_the_batch():
    model = build().eval()
    images = two_views(40, 0)[1]
    k = model.keys(images, Progress())
    torch.testing.assert_close(k, F.normalize(model.encoder_k(images)))
    assert not torch.allclose(k[0], k[1], atol=1e-2)


def test_key_normalisation_uses_the_statistics_of_the_group():
    model, progress = build(), Progress(step=4)
    images = two_views(40, 0)[1]
    whole = F.normalize(copy.deepcopy(model.encoder_k)(images))
    expected = keys_by_hand(copy.deepcopy(model.encoder_k), images, progress, 5)
    k = model.keys(images, progress)
    torch.testing.assert_close(k, expected)
    assert not torch.allclose(k, whole, atol=1e-2)


@pytest.mark.parametrize(
    ("splits", "batch", "said"),
    [
        (8, 8, "--bn-splits 8: 1 group is used, because each needs 8 images and a pass has 8\n"),
        (
            4,
            20,
            "--bn-splits 4: 2 groups are used, because each needs 8 images and a pass has 20\n",
        ),
        (2, 20, None),
    ],
)
def test_fewer_batch_norm_groups_than_asked_for_are_announced(
    splits, batch, said, script, shared_images, tmp_path
):
    small = ("-a", "resnet18", "--image-size", 32, "-j", 0, "--epochs", 1, "--moco-k", 24)
    command = (
        "main_synco",
        shared_images,
        *small,
        *typed("-b {} --bn-splits {} --save-dir {}", batch, splits, tmp_path),
    )
    status, out, err = script(*command)
    assert status == 0, err
    assert said in out if said else "groups are used" not in out


@pytest.mark.parametrize("name", ["group_by_group", "groups_as_channels"])
def test_groups_of_timms_batch_norm_keep_its_activation(name, monkeypatch):
    torch.manual_seed(0)
    norm, x = BatchNormAct2d(5, act_layer=nn.ReLU), torch.randn(24, 5, 4, 3)
    groups = torch.cat([copy.deepcopy(norm)(part) for part in x.chunk(3)])
    split_batch_norm(norm, 3)
    monkeypatch.setattr(type(norm), "group_by_group", getattr(norm, name).__func__)
    torch.testing.assert_close(norm(x), groups)
    assert (groups >= 0).all() and (groups == 0).any()
    assert torch.equal(norm.eval()(x), F.relu(F.batch_norm(x, norm.running_mean, norm.running_var)))


def test_groups_of_a_batch_norm_without_scale_are_channels():
    found = []
    for name in ("group_by_group", "groups_as_channels"):
        torch.manual_seed(0)
        norm = nn.BatchNorm2d(5, affine=False)
        split_batch_norm(norm, 2)
        found.append(getattr(norm, name)(torch.randn(16, 5, 2, 2), 2))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_keys_of_a_network_without_batch_norm_are_not_shuffled(monkeypatch):
    monkeypatch.setattr(base.distributed, "shuffle", None)  # fails if it is called
    plain = nn.Sequential(nn.Flatten(), nn.LayerNorm(243), nn.Linear(243, DIM))
    model = MoCo(lambda: plain, dim=DIM, K=8, bn_splits=4)
    images = torch.randn(32, 3, 9, 9)
    assert torch.equal(model.keys(images, Progress()), F.normalize(plain(images)))
    assert model.notes(32) == [
        "the network has no batch norm, so the keys need no shuffle and no groups"
    ]
    with pytest.raises(TypeError):
        build().keys(images, Progress())
