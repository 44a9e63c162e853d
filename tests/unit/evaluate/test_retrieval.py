"""Compare retrieval with a slow computation in plain Python, and read revisited data sets."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feature_helpers import on_ranks
from PIL import Image

from moco.encoder import networks
from moco.errors import InputError
from moco.evaluate import retrieval, revisited, whole_images
from moco.evaluate.revisited import Query
from moco.sections_eval import Extraction


def features(n, classes, rng):
    """Features of few different values without rounding, so that many similarities are equal."""
    x = torch.from_numpy(rng.choice([-0.5, 0.5], (n, 4))).float()
    return x, torch.from_numpy(rng.integers(0, classes, n))


def slow(database, queries, ks, same):
    precisions, recalls = [], []
    for i in range(len(queries[1])):
        others = [j for j in range(len(database[1])) if not (same and i == j)]
        similarity = {j: float(queries[0][i].double() @ database[0][j].double()) for j in others}
        order = sorted(others, key=lambda j: -similarity[j])  # stable
        hits = [int(database[1][j]) == int(queries[1][i]) for j in order]
        if not any(hits):
            continue
        at = [sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit]
        precisions.append(sum(at) / len(at))
        recalls.append([any(hits[:k]) for k in ks])
    means = np.mean(recalls, axis=0)
    return {"map": np.mean(precisions)} | {f"recall_{k}": x for k, x in zip(ks, means, strict=True)}


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_retrieval_of_classes_equals_a_slow_computation(same, world_size, monkeypatch):
    monkeypatch.setattr(retrieval, "_ENTRIES", 100)  # several blocks
    rng = np.random.default_rng()
    database = features(40, 9, rng)
    queries = database if same else features(23, 12, rng)  # some classes are not in the database
    ks = [1, 4, 60]

    def work(rank):
        mine = [tuple(x[rank::world_size] for x in split) for split in (database, queries)]
        return retrieval.measure(*mine, ks, same)

    wanted = slow(database, queries, ks, same)
    for found in on_ranks(world_size, work, monkeypatch):
        assert found == pytest.approx(wanted, abs=1e-9)


def test_queries_without_positives_are_an_error_if_there_are_no_others():
    x = F.normalize(torch.randn(3, 4), dim=1)
    with pytest.raises(InputError, match="nothing can be found"):
        retrieval.measure((x, torch.tensor([0, 1, 2])), (x, torch.tensor([0, 1, 2])), [1], True)


def slow_revisited(ranking, truth, ks, formula):
    found = {}
    parts = {"easy": ("easy", "junk hard"), "medium": ("easy hard", "junk")}
    parts["hard"] = ("hard", "junk easy")
    for setting, (wanted, ignored) in parts.items():
        scores, at = [], []
        for order, one in zip(ranking, truth, strict=True):
            positives = {int(i) for part in wanted.split() for i in getattr(one, part)}
            left_out = {int(i) for part in ignored.split() for i in getattr(one, part)}
            kept = [int(i) for i in order if int(i) not in left_out]
            if not positives:
                if formula == "synco-v2":
                    scores.append(0.0)
                    at.append([0.0 for _ in ks])
                continue
            listed = kept if formula == "revisited" else [int(i) for i in order]
            ap, seen = 0.0, 0
            for rank, i in enumerate(listed):
                if i in positives:
                    before = 1.0 if rank == 0 else seen / rank
                    seen += 1
                    after = seen / (rank + 1)
                    ap += (before + after) / 2 if formula == "revisited" else after
            scores.append(ap / len(positives))
            hits = [i in positives for i in kept]
            last = max((r + 1 for r, hit in enumerate(hits) if hit), default=0)
            at.append([sum(hits[: min(k, last)]) / min(k, last) if last else 0.0 for k in ks])
        if scores:
            found[f"map_{setting}"] = np.mean(scores)
            for k, x in zip(ks, np.mean(at, axis=0), strict=True):
                found[f"mp_{setting}_{k}"] = x
    return found


@pytest.mark.parametrize("formula", ["revisited", "synco-v2"])
def test_revisited_metrics_equal_a_slow_computation(formula):
    """With ignored images, queries without positives, and positives that are never ranked."""
    rng = np.random.default_rng()
    truth, ranking = [], []
    for i in range(30):
        drawn = rng.permutation(50)
        sizes = [0 if rng.random() < 0.3 else rng.integers(1, 8) for _ in range(3)]
        ends = np.cumsum(sizes)
        easy, hard, junk = np.split(drawn, ends)[:3]
        if i == 0:
            easy, hard = easy[:0], hard[:0]
        truth.append(Query(easy, hard, junk, (0, 0, 1, 1)))
        ranking.append(rng.permutation(50)[:35])
    found = revisited.evaluate(np.array(ranking), truth, [1, 5, 10], formula)
    wanted = slow_revisited(ranking, truth, [1, 5, 10], formula)
    assert len(wanted) == 12 and found == pytest.approx(wanted, abs=1e-12)


def test_an_example_by_hand():
    """Rank one of two positives first, and the other fourth, after an ignored and a wrong image."""
    truth = [Query(np.array([3]), np.array([0]), np.array([7]), (0, 0, 1, 1))]
    found = revisited.evaluate(np.array([[3, 7, 5, 0, 1]]), truth, [1, 5])
    assert found["map_easy"] == 1 and found["mp_medium_1"] == 1
    assert found["map_medium"] == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert found["mp_medium_5"] == pytest.approx(2 / 3)  # the last positive is third
    assert found["map_hard"] == pytest.approx((0 + 1 / 2) / 2)


TRUTH = {"easy": [0], "hard": np.array([1]), "junk": [], "bbx": [2.0, 3.0, 12.0, 19.0]}


def write(root, truth=TRUTH, name="roxford5k", **more):
    (root / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for image in ("a", "b", "c", "q"):
        pixels = rng.integers(0, 255, (32, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "jpg" / f"{image}.jpg")
    found = {"imlist": ["a", "b", "c"], "qimlist": ["q"], "gnd": [truth], **more}
    (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(found, protocol=2))
    return root


def test_a_data_set_is_read_in_both_places(tmp_path):
    write(tmp_path / "roxford5k")
    for root in (tmp_path, tmp_path / "roxford5k"):
        found = revisited.read("roxford5k", str(root))
        assert [found.database.name(i) for i in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]
        assert found.truth[0].hard.tolist() == [1] and found.truth[0].box == (2, 3, 12, 19)


class Code:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"gnd": [{**TRUTH, "easy": [3]}]}, "an index is not one of the 3 images"),
        ({"gnd": [{**TRUTH, "easy": [1]}]}, "twice among easy, hard and junk"),
        ({"gnd": [{**TRUTH, "easy": [0.5]}]}, "not lists of indices"),
        ({"gnd": [{**TRUTH, "bbx": [9, 3, 2, 19]}]}, "the box of q is empty"),
        (
            {"gnd": [{**TRUTH, "bbx": [24, 3, 30, 19]}]},
            r"\(24, 3, 30, 19\) of q.jpg is outside",
        ),
        ({"gnd": []}, "0 entries of gnd for 1 queries"),
        ({"gnd": [{"easy": [0]}]}, "no 'hard'"),
        ({"imlist": ["../a", "b", "c"]}, "imlist is not a list of file names"),
        ({"imlist": ["a", "b", "x"]}, "1 of the 4 images of roxford5k are missing, first x.jpg"),
        ({"gnd": Code()}, "only plain values and numpy's arrays are read"),
    ],
)
def test_a_wrong_data_set_is_an_error_of_one_line(more, said, tmp_path, capsys):
    write(tmp_path, **more)
    with pytest.raises(InputError, match=said):
        revisited.read("roxford5k", str(tmp_path))
    assert capsys.readouterr().out == ""  # no code of the pickle has run


def test_queries_are_cropped_and_then_shrunk_by_the_factor_of_the_full_image():
    image = torch.randint(0, 255, (3, 100, 200), dtype=torch.uint8)
    shrink = whole_images.Shrunk(50, [(20, 10, 100, 70)])
    (view,) = shrink(image, (0, 0))
    assert view.shape == (3, 15, 20)  # a quarter of 60 x 80 pixels
    (whole,) = whole_images.Shrunk(500, [(20, 10, 100, 70)])(image, (0, 0))
    assert torch.equal(whole, image[:, 10:70, 20:100])  # nothing is enlarged
    assert whole_images.Shrunk(50)(image, (0, 0))[0].shape == (3, 25, 50)
    assert whole_images.Shrunk(40, center=True)(image, (0, 0))[0].shape == (3, 40, 40)


def test_scales_are_joined_by_a_power_mean_after_gem_and_by_a_mean_otherwise():
    torch.manual_seed(0)
    net = networks.create("resnet18", 1).eval()
    x = torch.randn(1, 3, 72, 96)
    config = Extraction(scales=(1.0, 0.5))
    with torch.inference_mode():
        maps = [
            networks.feature_map(net, one)
            for one in (x, F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False))
        ]
        gem = [m.double().clamp_min(1e-6).pow(3).mean((2, 3)).pow(1 / 3) for m in maps]
        unit = [one / one.norm() for one in gem]
        wanted = ((unit[0] ** 3 + unit[1] ** 3) / 2) ** (1 / 3)
        found = whole_images.joined(net, x, config, "gem")
        assert torch.allclose(found.double(), wanted / wanted.norm(), atol=1e-6)
        plain = sum(m.double().mean((2, 3)) for m in maps)
        config = Extraction(scales=(1.0, 0.5), normalize_scales=False)
        found = whole_images.joined(net, x, config, "network")
        assert torch.allclose(found.double(), plain / plain.norm(), atol=1e-6)


@pytest.mark.parametrize("arch", ["test_vit", "swin_tiny"])
def test_a_transformer_takes_other_shapes_and_keeps_its_features_at_its_own(arch):
    torch.manual_seed(0)
    net = networks.create(arch, 1, 224 if "swin" in arch else 160, any_size=True).eval()
    plain = networks.create(arch, 1, 224 if "swin" in arch else 160).eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    side = net.patch_embed.img_size[0]
    with torch.inference_mode():
        x = torch.randn(1, 3, side, side)
        assert torch.equal(whole_images.pooled(net, x, "network"), networks.features(plain, x))
        # pixels that fill no patch are left out, and tiny images are padded
        odd = torch.randn(1, 3, 101, 67)
        found = whole_images.pooled(net, odd, "network")
        patch = networks.patch_size(net)
        cut = odd[..., : 101 // patch * patch, : 67 // patch * patch]
        assert torch.equal(found, networks.features(net, cut))
        tiny = whole_images.pooled(net, odd[..., :3, :3], "network")
        assert tiny.shape == found.shape and tiny.isfinite().all()


def test_a_network_of_one_size_is_refused():
    with pytest.raises(InputError, match="takes square images of one size only"):
        networks.create("torchvision:vit_b_16", 1, any_size=True)
