"""Loading a backbone from checkpoints of any origin."""

import copy

import pytest
import torch
from encoder_helpers import PREFIXES, random_resnet18
from torch import nn
from torchvision import models

from moco.config import STD
from moco.encoder import pretrained
from moco.encoder.networks import backbone_keys
from moco.encoder.pretrained import describe_choice, load_backbone, tensors_of
from moco.encoder.resnets import resnet
from moco.errors import InputError


@pytest.fixture(scope="module")
def own():
    """Return the network that tests copy and never change."""
    return random_resnet18(1)


@pytest.fixture
def net(own):
    return copy.deepcopy(own)


@pytest.fixture(scope="module")
def published():
    """Return the tensors of a checkpoint, with torchvision's names."""
    return random_resnet18(2).state_dict()


def zeros(shape):
    return torch.zeros(()).expand(shape)


def file_with(tensors, prefix):
    """Return a checkpoint's tensors: the encoder under `prefix`, key encoders, queue, predictor."""
    file = {
        "module.queue": zeros((4, 8)),
        "module.queue_ptr": zeros(1),
        "module.predictor.0.weight": zeros((2, 2)),
    }
    if prefix not in ("module.", ""):
        for other in (
            "module.encoder_k.",
            "module.momentum_encoder.",
            "encoder_k.",
            "momentum_encoder.",
        ):
            file |= {other + name: zeros(t.shape) for name, t in tensors.items()}
    return file | {prefix + name: t for name, t in tensors.items()}


def assert_unchanged(net, own):
    for name, t in own.state_dict().items():
        assert torch.equal(net.state_dict()[name], t), name


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_backbone_tensor_loads_under_any_prefix(net, own, published, prefix):
    count = load_backbone(net, file_with(published, prefix), "file.pth")
    loaded = net.state_dict()
    backbone = [name for name in loaded if name not in ("fc.weight", "fc.bias")]
    assert count == len(backbone) == 120
    for name in backbone:
        assert torch.equal(loaded[name], published[name]), name
    assert torch.equal(net.fc.weight, own.fc.weight) and torch.equal(net.fc.bias, own.fc.bias)


def test_query_encoder_is_read_instead_of_key_encoder(net, published):
    keys = {f"module.encoder_k.{name}": t + 1 for name, t in published.items()}
    queries = {f"module.encoder_q.{name}": t for name, t in published.items()}
    load_backbone(net, keys | queries, "file.pth")
    assert torch.equal(net.conv1.weight, published["conv1.weight"])


def under(prefix, tensors):
    return {prefix + name: t for name, t in tensors.items()}


NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def numbered(tensors):
    """Return `tensors` with the names in an nn.Sequential of torchvision's layers, without fc."""
    parts = {name: name.split(".", 1) for name in tensors if not name.startswith("fc.")}
    return {f"{NUMBERS[layer]}.{rest}": tensors[name] for name, (layer, rest) in parts.items()}


# per origin: a function of the encoder `x` to read and another one `y` that returns the file's
# content, and the printed choice
ORIGINS = {
    "DINO": (
        lambda x, y: {
            "student": under("module.backbone.", y),
            "teacher": under("backbone.", x),
            "epoch": 1,
        },
        "teacher.backbone.*, not student.module.backbone.*",
    ),
    "half of DINO": (
        lambda x, y: {"student": under("module.backbone.", x)},
        "student.module.backbone.*",
    ),
    "VISSL": (
        lambda x, y: {
            "classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", x)}}}
        },
        "classy_state_dict.base_model.model.trunk._feature_blocks.*",
    ),
    "model_state_dict": (
        lambda x, y: {"model_state_dict": x, "optimizer_state_dict": y},
        "model_state_dict.*",
    ),
    "net": (lambda x, y: {"net": under("module.", x), "acc": 0.9}, "net.module.*"),
    "network": (lambda x, y: {"network": under("features.", x)}, "network.features.*"),
    "params": (
        lambda x, y: {"params": {"encoder": x, "predictor": {"0": zeros((2, 2))}}},
        "params.encoder.*",
    ),
    "timm": (
        lambda x, y: {"state_dict_ema": y, "arch": "resnet18", "state_dict": x},
        "state_dict.*, not state_dict_ema.*",
    ),
    "only an average": (lambda x, y: {"model_ema": under("module.", x)}, "model_ema.module.*"),
    "Lightning": (
        lambda x, y: {"state_dict": under("model.backbone.", x), "hyper_parameters": {"lr": 1.0}},
        "state_dict.model.backbone.*",
    ),
    "solo-learn": (
        lambda x, y: {"state_dict": under("momentum_backbone.", y) | under("backbone.", x)},
        "state_dict.backbone.*, not state_dict.momentum_backbone.*",
    ),
    "lightly": (
        lambda x, y: {
            "state_dict": under("backbone_momentum.", numbered(y)) | under("backbone.", numbered(x))
        },
        "state_dict.backbone.*, not state_dict.backbone_momentum.*",
    ),
    "mmselfsup": (
        lambda x, y: {
            "meta": {},
            "state_dict": under("target_net.0.", y) | under("online_net.0.", x),
        },
        "state_dict.online_net.0.*, not state_dict.target_net.0.*",
    ),
    "MoCo v3": (
        lambda x, y: {
            "state_dict": under("module.momentum_encoder.", y) | under("module.base_encoder.", x)
        },
        "state_dict.module.base_encoder.*, not state_dict.module.momentum_encoder.*",
    ),
    "compiled": (
        lambda x, y: {
            "model": under("_orig_mod.module.encoder._orig_mod.", x)
            | under("_orig_mod.module.encoder_k.", y)
        },
        "model.module.encoder.*, not model.module.encoder_k.*",
    ),
    "bare": (lambda x, y: x, ""),
}


@pytest.mark.parametrize("origin", ORIGINS)
def test_right_encoder_of_each_origin_is_read_and_printed(origin, net, own, published):
    make, said = ORIGINS[origin]
    tensors = tensors_of(net, make(published, own.state_dict()))
    assert load_backbone(net, tensors, "file.pth") == 120
    assert all(torch.equal(net.state_dict()[name], published[name]) for name in backbone_keys(net))
    assert describe_choice(net, tensors) == said


def test_teacher_of_another_architecture_is_not_read(net, published):
    with torch.device("meta"):
        teacher = models.resnet50().state_dict()
    tensors = tensors_of(net, {"teacher": teacher, "student": published})
    assert (
        load_backbone(net, tensors, "file.pth") == 120
        and describe_choice(net, tensors) == "student.*"
    )


def test_key_encoder_does_not_replace_an_incomplete_query_encoder(net, own, published):
    """Neither do the optimizer's tensors, nor a dict that contains itself."""
    queries = {name: t for name, t in published.items() if name != "layer1.0.bn1.bias"}
    state = {
        "optimizer": published,
        "state_dict": under("encoder_q.", queries) | under("encoder_k.", published),
    }
    state["itself"] = state
    with pytest.raises(InputError, match=r"missing tensors \(1\): layer1\.0\.bn1\.bias"):
        load_backbone(net, tensors_of(net, state), "file.pth")
    assert_unchanged(net, own)


@pytest.mark.parametrize(
    "head",
    [{}, {"fc.0.weight": zeros((3, 3)), "fc.2.weight": zeros((3, 3)), "fc.3.bias": zeros(3)}],
)
def test_heads_of_file_and_network_are_ignored(net, published, head):
    net.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    before = net.fc[0].weight.clone()
    tensors = {name: t for name, t in published.items() if not name.startswith("fc.")}
    assert load_backbone(net, tensors | head, "file.pth") == 120
    assert torch.equal(net.layer4[1].bn2.running_var, published["layer4.1.bn2.running_var"])
    assert torch.equal(net.fc[0].weight, before)


def test_file_without_step_counters_loads(net, published):
    old = {
        f"module.encoder_q.{name}": t
        for name, t in published.items()
        if "num_batches_tracked" not in name
    }
    assert load_backbone(net, old, "file.pth") == 100
    assert torch.equal(
        net.layer3[0].downsample[1].running_mean, published["layer3.0.downsample.1.running_mean"]
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"vision.stem.weight": zeros(1), "vision.conv1.weight": zeros(1)},
        {"fc.weight": zeros((16, 512)), "fc.bias": zeros(16)},
        {"a": {"b": {"c.weight": zeros(1)}}},
    ],
)
def test_error_shows_names_if_no_tensor_matches(own, tensors):
    found = tensors_of(own, tensors)
    with pytest.raises(
        InputError, match=r"file\.pth: no tensor matches the encoder; its names look like"
    ) as error:
        load_backbone(own, found, "file.pth")
    assert all(f"'{name}'" in str(error.value) for name in found) and "-a" in str(error.value)
    with pytest.raises(InputError, match="it has no named tensors"):
        load_backbone(own, tensors_of(own, {"epoch": 3, "model": [zeros(1)]}), "file.pth")


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("module.encoder_q.", "conv1.weight"),
        ("backbone.", "layer4.1.bn2.running_var"),
        ("", "layer2.0.downsample.1.bias"),
    ],
)
def test_error_names_a_missing_tensor(net, own, published, prefix, name):
    tensors = {prefix + key: t for key, t in published.items() if key != name}
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
        load_backbone(net, tensors, "file.pth")
    assert "file.pth" in str(error.value)
    assert_unchanged(net, own)


def test_error_names_a_tensor_of_wrong_shape_and_both_shapes(net, own, published):
    tensors = published | {"layer1.0.conv1.weight": zeros((64, 64, 1, 1))}
    with pytest.raises(InputError, match=r"layer1\.0\.conv1\.weight") as error:
        load_backbone(net, tensors, "file.pth")
    assert "(64, 64, 1, 1)" in str(error.value) and "(64, 64, 3, 3)" in str(error.value)
    assert_unchanged(net, own)


@pytest.fixture(scope="module")
def resnet34():
    with torch.device("meta"):
        return models.resnet34(num_classes=16)


@pytest.mark.parametrize("prefix", ["module.encoder_q.", ""])
def test_deeper_network_of_the_same_widths_is_an_error(net, own, resnet34, prefix):
    deeper = {prefix + name: zeros(t.shape) for name, t in resnet34.state_dict().items()}
    with pytest.raises(InputError, match=r"layer\d\.\d"):
        load_backbone(net, deeper, "file.pth")
    assert_unchanged(net, own)


def test_shallower_network_is_an_error(resnet34, published):
    with pytest.raises(InputError, match=r"layer1\.2\.conv1\.weight"):
        load_backbone(resnet34, published, "file.pth")


def test_use_of_imagenets_mean_and_std_is_printed(tmp_path, capsys):
    tensors = {
        f"module.encoder_q.{name}": x for name, x in resnet("resnet18", 8).state_dict().items()
    }
    options = {"image_size": 32, "mean": [0.5] * 3}
    torch.save({"arch": "resnet18", "args": options, "state_dict": tensors}, tmp_path / "a.pth")
    found = pretrained.read(str(tmp_path / "a.pth"))
    assert found.mean == [0.5] * 3 and found.std == list(STD)
    line = f"{tmp_path / 'a.pth'}: does not say the std of its images; ImageNet's is used\n"
    assert capsys.readouterr().out == line
    options["std"] = [0.2] * 3
    torch.save({"arch": "resnet18", "args": options, "state_dict": tensors}, tmp_path / "a.pth")
    assert pretrained.read(str(tmp_path / "a.pth")).std == [0.2] * 3
    assert capsys.readouterr().out == ""
