import copy

import pytest
import torch
from torch import nn
from torchvision import models

from moco.config import STD
from moco.encoder import metadata, pretrained
from moco.encoder.networks import backbone_keys, check_arch, features
from moco.encoder.pretrained import describe_choice, load_backbone, tensors_of
from moco.encoder.recompute import check_compiled_recomputation, recompute_blocks
from moco.encoder.resnets import resnet
from moco.errors import InputError

PREFIXES = [
    "module.encoder_q.",
    "module.base_encoder.",
    "module.encoder.",
    "encoder.",
    "module.backbone.",
    "backbone.",
    "module.",
    "",
]


def trained(seed):
    """A resnet18 whose BatchNorm tensors, which all networks start equal, are drawn like its weights."""
    torch.manual_seed(seed)
    net = models.resnet18(num_classes=16)
    for tensor in net.state_dict().values():
        if not tensor.is_floating_point():
            tensor.fill_(seed)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def own():
    """The network that the other tests copy; never written to."""
    return trained(1)


@pytest.fixture
def net(own):
    return copy.deepcopy(own)


@pytest.fixture(scope="module")
def published():
    """The tensors of a file, with torchvision's names."""
    return trained(2).state_dict()


def zeros(shape):
    return torch.zeros(()).expand(shape)


def file_with(tensors, prefix):
    """What a checkpoint holds besides the encoder: the other encoder of the pair, a queue, a predictor."""
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
def test_every_backbone_tensor_arrives_whatever_the_prefix(net, own, published, prefix):
    count = load_backbone(net, file_with(published, prefix), "file.pth")
    loaded = net.state_dict()
    backbone = [name for name in loaded if name not in ("fc.weight", "fc.bias")]
    assert count == len(backbone) == 120
    for name in backbone:
        assert torch.equal(loaded[name], published[name]), name
    assert torch.equal(net.fc.weight, own.fc.weight) and torch.equal(net.fc.bias, own.fc.bias)


def test_the_query_encoder_is_read_and_not_the_key_encoder(net, published):
    keys = {f"module.encoder_k.{name}": t + 1 for name, t in published.items()}
    queries = {f"module.encoder_q.{name}": t for name, t in published.items()}
    load_backbone(net, keys | queries, "file.pth")
    assert torch.equal(net.conv1.weight, published["conv1.weight"])


def under(prefix, tensors):
    return {prefix + name: t for name, t in tensors.items()}


NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def numbered(tensors):
    """The names in an nn.Sequential of torchvision's layers, without its last."""
    parts = {name: name.split(".", 1) for name in tensors if not name.startswith("fc.")}
    return {f"{NUMBERS[layer]}.{rest}": tensors[name] for name, (layer, rest) in parts.items()}


# a file's content, of the encoder `x` to read and another one `y`, and the choice that is printed
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
    "an average alone": (lambda x, y: {"model_ema": under("module.", x)}, "model_ema.module.*"),
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
def test_the_right_encoder_of_each_origin_is_read_and_named(origin, net, own, published):
    make, said = ORIGINS[origin]
    tensors = tensors_of(net, make(published, own.state_dict()))
    assert load_backbone(net, tensors, "file.pth") == 120
    assert all(torch.equal(net.state_dict()[name], published[name]) for name in backbone_keys(net))
    assert describe_choice(net, tensors) == said


def test_a_teacher_that_is_another_network_is_not_taken(net, published):
    with torch.device("meta"):
        teacher = models.resnet50().state_dict()
    tensors = tensors_of(net, {"teacher": teacher, "student": published})
    assert (
        load_backbone(net, tensors, "file.pth") == 120
        and describe_choice(net, tensors) == "student.*"
    )


def test_the_key_encoder_does_not_stand_in_for_one_that_lacks_a_tensor(net, own, published):
    """An optimizer's tensors, or a dict that holds itself, do not stand in for one, either."""
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
def test_a_head_in_the_file_or_in_the_net_does_not_matter(net, published, head):
    net.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    before = net.fc[0].weight.clone()
    tensors = {name: t for name, t in published.items() if not name.startswith("fc.")}
    assert load_backbone(net, tensors | head, "file.pth") == 120
    assert torch.equal(net.layer4[1].bn2.running_var, published["layer4.1.bn2.running_var"])
    assert torch.equal(net.fc[0].weight, before)


def test_a_file_without_step_counters_loads(net, published):
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
def test_a_file_from_which_nothing_matches_is_an_error_that_shows_names(own, tensors):
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
def test_a_missing_tensor_is_an_error_that_names_it(net, own, published, prefix, name):
    tensors = {prefix + key: t for key, t in published.items() if key != name}
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
        load_backbone(net, tensors, "file.pth")
    assert "file.pth" in str(error.value)
    assert_unchanged(net, own)


def test_a_wrong_shape_is_an_error_that_names_the_tensor_and_both_shapes(net, own, published):
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
def test_a_deeper_network_of_the_same_widths_does_not_fit(net, own, resnet34, prefix):
    deeper = {prefix + name: zeros(t.shape) for name, t in resnet34.state_dict().items()}
    with pytest.raises(InputError, match=r"layer\d\.\d"):
        load_backbone(net, deeper, "file.pth")
    assert_unchanged(net, own)


def test_a_shallower_network_does_not_fit(resnet34, published):
    with pytest.raises(InputError, match=r"layer1\.2\.conv1\.weight"):
        load_backbone(resnet34, published, "file.pth")


@pytest.mark.parametrize("training", [False, True])
def test_features_are_torchvisions_forward_without_the_classifier(net, training):
    net.train(training)
    headless = copy.deepcopy(net)
    headless.fc = nn.Identity()
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, expected = features(net, images), headless(images)
    assert got.shape == (4, 512)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got[0], got[1], rtol=1e-3)
    for name, t in headless.state_dict().items():
        torch.testing.assert_close(
            net.state_dict()[name], t, msg=name
        )  # the same running statistics


def test_backbone_keys_are_all_but_the_head(net, own):
    names = backbone_keys(own)
    assert len(names) == 120 and set(own.state_dict()) - set(names) == {"fc.weight", "fc.bias"}
    net.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    assert backbone_keys(net) == names


@pytest.mark.parametrize(("out", "mlp"), [(5, False), (7, True)])
def test_resnet_has_a_head_of_the_wanted_size(out, mlp):
    net = resnet("resnet18", out, mlp)
    linear = [m for m in net.fc.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == ([(512, 512)] if mlp else []) + [
        (512, out)
    ]


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("resnet51", "resnet50"), ("resnet_18", "resnet18"), ("wide_resnet50", "wide_resnet50_2")],
)
def test_an_unknown_arch_is_an_error_that_names_the_nearest(wrong, nearest):
    with pytest.raises(InputError, match=f"'{wrong}'.*'{nearest}'"):
        resnet(wrong, 8)
    with pytest.raises(InputError, match=f"'{nearest}'"):
        check_arch(wrong)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_known_archs_pass(arch):
    check_arch(arch)


# blocks that are computed again for the gradient


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_recomputed_blocks_keep_less_and_change_nothing(arch):
    torch.manual_seed(0)
    kept = resnet(arch, 4, mlp=True)
    again = copy.deepcopy(kept)
    recompute_blocks(again)
    found = []
    for net in (kept, again):
        sizes = []
        images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        ):
            loss = net(images).square().sum()
        loss.backward()
        assert net.training and all(
            m.momentum == 0.1 for m in net.modules() if isinstance(m, nn.BatchNorm2d)
        )
        found.append(
            (sum(sizes), [*net.state_dict().values(), *(p.grad for p in net.parameters())])
        )
    (much, theirs), (little, ours) = found
    assert little < much / 3
    assert all(map(torch.equal, ours, theirs))
    assert again.state_dict().keys() == kept.state_dict().keys()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), kept(images))
    assert torch.equal(*(copy.deepcopy(net).eval()(images) for net in (again, kept)))


@pytest.mark.filterwarnings("ignore")
def test_recomputed_blocks_compile():
    torch.manual_seed(0)
    eager, images = resnet("resnet18", 4), torch.randn(2, 3, 32, 32)
    compiled = copy.deepcopy(eager)
    recompute_blocks(compiled)
    compiled.compile(
        backend="aot_eager"
    )  # traces as the usual backend does, and needs no C++ compiler
    for net in (eager, compiled):
        net(images).square().sum().backward()
    # versions of PyTorch that count twice are refused
    if not torch.equal(
        compiled.bn1.num_batches_tracked, compiled.layer1[0].bn1.num_batches_tracked
    ):
        with pytest.raises(InputError, match="--compile with --grad-checkpoint"):
            check_compiled_recomputation()
        return
    check_compiled_recomputation()
    for name, mine in compiled.state_dict().items():
        torch.testing.assert_close(mine, eager.state_dict()[name], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_mean_and_std_of_a_checkpoint_are_read_if_they_are_possible():
    """A mean of 0 and a std of 1 leave colours as they are; a std of 0 divides by it."""

    def read(mean, std):
        found = metadata.read_metadata({"args": {"mean": mean, "std": std}})
        return found.mean, found.std

    assert read([0.0, 0.0, 0.0], (1.0, 1.0, 1.0)) == ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert read([0.5, 0.5, 1.5], [0.5, 0.0, 0.5]) == read([0.5, 0.5], ["0.5"] * 3) == (None, None)


def test_a_reader_says_that_imagenets_mean_and_std_are_used(tmp_path, capsys):
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
