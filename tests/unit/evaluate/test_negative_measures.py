"""Compare the measurements of negatives with loops in float64 over fresh random features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco import rng
from moco.errors import InputError
from moco.evaluate.negatives import CHUNK, DRAWN, TIE, measure, shares_class
from moco.loss import synthetic
from moco.loss.synthetic import TYPES, Synthetic

CONFIG = Synthetic(n_hard=7, counts=(3, 1, 2, 1, 1, 1), sigma=0.1, delta=0.2, eta=0.05)


def features(n, dim=16):
    return F.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1)


def sorted_negatives(q, own, bank):
    """The similarity and the index of each negative of a query, the hardest first."""
    found = [(float(q @ bank[j]), j) for j in range(len(bank)) if j != own]
    return sorted(found, reverse=True)


def test_real_negatives_of_many_queries():
    queries, images = 2 * CHUNK + 5, 300
    bank, labels = features(images), torch.randint(4, (images,))
    own = torch.randperm(images)[:queries]
    q = F.normalize(bank[own] + 1.5 * features(queries), dim=1)
    learned = features(50)
    found = measure(q, own, bank, labels, CONFIG, learned=learned, shown=4)
    false = np.zeros((queries, images - 1))
    above = {"all": [], "hardest": [], "learned": []}
    for i, mine in enumerate(own.tolist()):
        positive, ranked = float(q[i] @ bank[mine]), sorted_negatives(q[i], mine, bank)
        values, indices = map(list, zip(*ranked, strict=True))
        assert found.positive[i].item() == pytest.approx(positive)
        assert found.nearest[i].tolist() == indices[:4]
        for shown, expected in (
            (found.groups["all"].similarity[i], values),
            (found.groups["hardest"].similarity[i], values[:7]),
            (found.similarity[i], values[:4]),
        ):
            np.testing.assert_allclose(shown, expected, atol=1e-12)
        false[i] = [labels[j] == labels[mine] for j in indices]
        others = [float(q[i] @ one) for one in learned]
        np.testing.assert_allclose(found.groups["learned"].similarity[i], others, atol=1e-12)
        for name, some in (("all", values), ("hardest", values[:7]), ("learned", others)):
            above[name].append(np.mean([value > positive for value in some]))
        assert mine not in found.nearest[i]
    for name, shares in above.items():
        assert found.groups[name].above_positive == pytest.approx(np.mean(shares)), name
    assert 0 < found.groups["all"].above_positive < found.groups["hardest"].above_positive
    for k in (1, 2, 10, images - 1):
        assert float(found.false[k - 1]) == pytest.approx(false[:, :k].mean())
    assert found.groups["all"].false == pytest.approx(false.mean())
    assert found.groups["hardest"].false == pytest.approx(false[:, :7].mean())
    assert found.groups["learned"].false is None


def test_each_type_of_synthetic_negative():
    queries, images, seed = 11, 40, 5
    bank, labels = features(images), torch.randint(3, (images,))
    own = torch.randperm(images)[:queries]
    q = F.normalize(bank[own] + 0.8 * features(queries), dim=1)
    found = measure(q, own, bank, labels, CONFIG, seed)

    counts = (DRAWN,) * len(TYPES)  # the counts do not change the draws' number
    config = Synthetic(7, counts, CONFIG.sigma, CONFIG.delta, CONFIG.eta)
    draws = synthetic.draw(config, *q.shape, rng.generator("cpu", rng.NEGATIVES, seed), q.dtype)
    for t, type_ in enumerate(TYPES):
        group = found.groups[type_.name]
        above_positive, above_real, false = [], [], []
        for i, mine in enumerate(own.tolist()):
            ranked = sorted_negatives(q[i], mine, bank)
            for m in range(DRAWN):
                column = t * DRAWN + m
                parents = [ranked[draws.first[i, column]][1]]
                n = bank[parents[0]]
                if type_.name == "interpolated":
                    w = draws.weight[i, m]
                    h = w * q[i] + (1 - w) * n
                elif type_.name == "extrapolated":
                    h = q[i] + draws.weight[i, DRAWN + m] * (n - q[i])
                elif type_.name == "mixup":
                    w, other = draws.weight[i, 2 * DRAWN + m], ranked[draws.second[i, m]][1]
                    parents.append(other)
                    h = w * n + (1 - w) * bank[other]
                elif type_.name == "noise":
                    h = n + draws.noise[i, m]
                elif type_.name == "perturbed":
                    h = n + 0.2 * q[i]
                else:
                    h = n + 0.05 * q[i].sign()
                value = float(q[i] @ h / h.norm())
                assert group.similarity[i, m].item() == pytest.approx(value, abs=1e-9)
                above_positive.append(value > q[i] @ bank[mine] + TIE)
                above_real.append(value > ranked[0][0] + TIE)
                false.append(any(labels[j] == labels[mine] for j in parents))
        assert group.above_positive == pytest.approx(np.mean(above_positive)), type_.name
        assert group.above_real == pytest.approx(np.mean(above_real)), type_.name
        assert group.false == pytest.approx(np.mean(false)), type_.name
    values = found.groups["mixup"].similarity.flatten()
    assert found.groups["mixup"].quantiles(0.5) == pytest.approx([float(values.median())], abs=0.01)


def test_only_the_types_that_the_config_has():
    bank = features(20)
    config = Synthetic(n_hard=3, counts=(0, 0, 5, 0, 0, 0))
    found = measure(bank[:4], torch.arange(4), bank, None, config)
    assert list(found.groups) == ["all", "hardest", "mixup"]
    assert found.false is None and found.groups["mixup"].false is None


def test_images_that_show_several_classes():
    labels = torch.tensor([[1, 0, 0], [1, 1, -1], [0, 1, 0], [0, -1, 0]])
    shared = shares_class(labels, torch.tensor([0, 1, 3]))
    expected = [[True, True, False, False], [True, True, True, False], [False] * 4]
    assert shared.tolist() == expected


@pytest.mark.parametrize("images, n_hard", [(1, 1), (10, 10), (10, 0)])
def test_too_few_images(images, n_hard):
    bank = features(images)
    with pytest.raises(InputError, match=r"two images or more|lower --n-hard"):
        measure(bank[:1], torch.tensor([0]), bank, None, Synthetic(n_hard))
