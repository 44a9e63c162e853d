"""Parts of image folders: of every class a share, nothing in two parts, the same for the same seed."""

import numpy as np
import pytest
from conftest import write_images

from moco.data import datasets
from moco.data.subsets import hold_out
from moco.errors import InputError


def paths(folder):
    return set(folder.paths.tolist())


@pytest.mark.parametrize(("fraction", "per_class"), [(0.25, 4), (0.01, 1), (0.1, 2), (0.99, 15)])
def test_hold_out_takes_a_share_of_each_class(shared_images, fraction, per_class):
    whole = datasets.scan(shared_images, "train")  # 16 images in each of 3 classes
    rest, held = hold_out(whole, fraction, seed=0)
    assert np.bincount(held.labels).tolist() == [per_class] * 3 and np.bincount(rest.labels).tolist() == [16 - per_class] * 3
    assert paths(rest) | paths(held) == paths(whole) and not paths(rest) & paths(held)
    label = dict(zip(whole.paths.tolist(), whole.labels.tolist(), strict=True))
    for part in (rest, held):
        assert [label[path] for path in part.paths.tolist()] == part.labels.tolist()
        assert (part.root, part.classes) == (whole.root, whole.classes)


def test_hold_out_is_the_same_for_a_seed_and_differs_between_seeds(shared_images):
    whole = datasets.scan(shared_images, "train")
    first, again, other = (paths(hold_out(whole, 0.5, seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    whole = datasets.scan(write_images(tmp_path, train=1), "train")
    with pytest.raises(InputError, match="class0: has one image only"):
        hold_out(whole, 0.5, seed=0)
