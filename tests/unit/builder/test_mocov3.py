"""MoCo v3: its loss against a slow version on one and two ranks, and its authors' checkpoints."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, on_two_ranks
from torch import nn

import main_mocov3
from moco import distributed
from moco.builder.mocov3 import MoCoV3
from moco.config import replaced
from moco.encoder import networks, pretrained
from moco.encoder.timm_networks import sine_positions
from moco.engine import initial
from moco.loss.in_batch import in_batch_info_nce
from moco.rng import Progress

B, DIM = 5, 4


def unit_rows(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def slow_direction(q, k, T, queries):
    """Return the loss of some queries of the joint batch, one query after the other."""
    loss = 0
    for i in queries:
        terms = [torch.exp((q[i] * k[j]).sum() / T) for j in range(len(k))]
        loss = loss - 2 * T * torch.log(terms[i] / sum(terms)) / len(queries)
    return loss


# the loss


@pytest.mark.parametrize("T", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("first", [0, 3, 7])
def test_the_loss_is_the_slow_one(first, T):
    torch.manual_seed(first)
    q, k = unit_rows(12, DIM).requires_grad_(), unit_rows(12, DIM)
    mine = range(first, first + B)
    loss, slow = in_batch_info_nce(q[mine] @ k.T, first, T), slow_direction(q, k, T, mine)
    torch.testing.assert_close(loss, slow, rtol=0, atol=1e-10)
    ours, theirs = (torch.autograd.grad(one, q)[0] for one in (loss, slow))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert not ours[[i for i in range(12) if i not in mine]].any()


def build(rises=True):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(27, 8), nn.BatchNorm1d(8), nn.Linear(8, DIM))
    return MoCoV3(encoder, nn.Linear(DIM, DIM, bias=False), 0.9, rises, 0.3).double()


def views(n):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]


def ours(rank):
    """Return the loss and gradients on a rank's half of the joint batch; None: on all of it."""
    model = build()
    ddp = distributed.data_parallel(distributed.sync_batch_norm(model, torch.device("cpu")))
    mine = slice(None) if rank is None else slice(B * rank, B * rank + B)
    loss, metrics = ddp([view[mine] for view in views(2 * B)], torch.arange(B), Progress())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "metrics": metrics, "gradients": gradients}


def slow():
    """Return the same of the joint batch, by the slow loss."""
    model = build()
    q, k = (
        [F.normalize(f(view), dim=1) for view in views(2 * B)]
        for f in (lambda x: model.predictor(model.base_encoder(x)), model.momentum_encoder)
    )
    k = [one.detach() for one in k]
    loss = sum(slow_direction(q[view], k[1 - view], 0.3, range(2 * B)) for view in range(2))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    similar = [q[view] @ k[1 - view].T for view in range(2)]
    first = torch.cat([s.argmax(1) == torch.arange(2 * B) for s in similar]).double().mean()
    return {"loss": loss.detach(), "gradients": gradients, "acc1": first}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    return on_two_ranks({"ours": (ours,)}, tmp_path_factory.mktemp("mocov3"))("ours")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_losses_and_gradients_are_those_of_the_slow_version(processes, request):
    found = [ours(None)] if processes == 1 else request.getfixturevalue("on_ranks")
    want = slow()
    loss, acc1 = (
        torch.stack([torch.as_tensor(value) for value in values]).double().mean()
        for values in ([one["loss"] for one in found], [one["metrics"]["acc1"] for one in found])
    )
    torch.testing.assert_close(loss, want["loss"], rtol=0, atol=1e-10)
    torch.testing.assert_close(acc1, want["acc1"], rtol=0, atol=1e-6)
    names = {name for name, _ in build().named_parameters() if "momentum" not in name}
    for one in found:  # gradients are averaged over ranks
        assert one["gradients"].keys() == want["gradients"].keys() == names
        for name, gradient in want["gradients"].items():
            torch.testing.assert_close(one["gradients"][name], gradient, rtol=0, atol=1e-10)


def test_hardness_is_the_similarity_to_the_nearest_other_key():
    q, k = unit_rows(6, DIM), unit_rows(6, DIM)
    _, metrics = build().direction(q, k, Progress(), 0)
    others = (q @ k.T)[~torch.eye(6, dtype=bool)].view(6, 5)
    torch.testing.assert_close(metrics["hardness"], others.amax(1).mean())
    torch.testing.assert_close(metrics["alignment"], (q - k).square().sum(1).mean())


def test_only_weights_are_averaged_and_the_momentum_may_rise():
    for rises, weights in ((True, (0.1 * 0.5, 0)), (False, (0.1, 0.1))):
        model = build(rises)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        with torch.no_grad():
            for p in model.base_encoder.parameters():
                p += 1
        model.base_encoder[2].running_mean += 1
        for step, weight in zip((0, 1), weights, strict=True):  # two steps, one epoch
            progress = Progress(step=step, steps_per_epoch=2, epochs=1)
            assert model.schedules(progress)["momentum"] == pytest.approx(1 - weight)
            model._progress = progress
            model.after_step()
            if step == 0:
                for name, p in model.momentum_encoder.named_parameters():
                    old = before[f"momentum_encoder.{name}"]
                    torch.testing.assert_close(p, old + weight, rtol=0, atol=1e-12)
        assert torch.equal(
            model.momentum_encoder[2].running_mean,
            before["momentum_encoder.2.running_mean"],
        )


# the networks of the recipes, and the authors' checkpoints


def recipe(name, *words):
    config = main_mocov3.parser().parse(["photos", "--cfg", f"{ROOT}/configs/{name}.yaml", *words])
    return main_mocov3.complete(replaced(config, stem="imagenet"))


def norm(name, width, affine=True):
    """Return the shapes of a batch norm's tensors by name."""
    shapes = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
    shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)} if affine else {}
    return shapes | {f"{name}.num_batches_tracked": ()}


def mlp(name, widths, last_norm):
    """Return those of a head: linear layers without bias, each followed by batch norm and ReLU."""
    shapes, index = {}, 0
    for width, out in pairwise(widths):
        shapes[f"{name}.{index}.weight"] = (out, width)
        last = index // 3 == len(widths) - 2
        if not last or last_norm:
            shapes |= norm(f"{name}.{index + 1}", out, affine=not last)
        index += 3
    return shapes


def resnet50():
    """Return the shapes of the tensors of MoCo v3's ResNet-50."""
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    width = 64
    for layer, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            at, out = f"layer{layer}.{block}", 4 * inner
            convolutions = ((inner, width, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1))
            for i, shape in enumerate(convolutions, 1):
                shapes[f"{at}.conv{i}.weight"] = shape
                shapes |= norm(f"{at}.bn{i}", shape[0])
            if block == 0:
                shapes[f"{at}.downsample.0.weight"] = (out, width, 1, 1)
                shapes |= norm(f"{at}.downsample.1", out)
            width = out
    return shapes | mlp("fc", (2048, 4096, 256), last_norm=True)


def vit(width):
    """Return those of MoCo v3's ViT with 12 blocks and patches of 16 pixels."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for block in range(12):
        linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, into) in linear.items():
            shapes[f"blocks.{block}.{name}.weight"] = (out * width, into * width)
            shapes[f"blocks.{block}.{name}.bias"] = (out * width,)
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.{one}": (width,) for one in ("weight", "bias")}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return shapes | mlp("head", (width, 4096, 4096, 256), last_norm=True)


RELEASES = {  # the encoder, and whether the predictor ends with batch norm
    "resnet50": ("mocov3_r50_100", resnet50(), False),
    "vit_small": ("mocov3_vit_small", vit(384), True),
    "vit_base": ("mocov3_vit_base", vit(768), True),
}
LAYOUTS = [
    ("resnet50", "state_dict"),
    ("vit_small", "state_dict"),
    ("vit_small", "model"),
    pytest.param("vit_base", "state_dict", marks=pytest.mark.slow),
]


def released(arch):
    """Return the `state_dict` of a checkpoint with the names and shapes of the authors' code."""
    _, encoder, last = RELEASES[arch]
    shapes = {
        f"module.{name}.{key}": shape
        for name in ("base_encoder", "momentum_encoder")
        for key, shape in encoder.items()
    }
    shapes |= mlp("module.predictor", (256, 4096, 256), last)
    torch.manual_seed(3)
    state = {
        name: torch.tensor(7)
        if name.endswith("num_batches_tracked")
        else torch.rand(shape) / 10 + 0.05
        for name, shape in shapes.items()
    }
    for name, x in state.items():
        if name.endswith("pos_embed"):
            x[0] = torch.cat([torch.zeros(1, x.shape[2]), sine_positions(14, 14, x.shape[2])])
    return state


@pytest.mark.parametrize("arch", RELEASES)
def test_the_method_has_the_tensors_of_the_authors_checkpoint(arch):
    with torch.device("meta"):
        model = main_mocov3.build(recipe(RELEASES[arch][0]))
    state = released(arch)
    own = {f"module.{name}": tuple(x.shape) for name, x in model.state_dict().items()}
    assert own == {name: tuple(x.shape) for name, x in state.items()}
    frozen = {
        name
        for name, p in model.base_encoder.named_parameters()
        if not p.requires_grad and name != "pos_embed"
    }
    projection = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert frozen == (set() if arch == "resnet50" else projection)


@pytest.mark.parametrize(("arch", "layout"), LAYOUTS)
def test_every_tensor_of_the_authors_encoder_matches(arch, layout, tmp_path):
    """The layout "model" is that of their conversion for DeiT's code."""
    state, start = released(arch), "module.base_encoder."
    backbone = {
        name.removeprefix(start): x
        for name, x in state.items()
        if name.startswith(start) and not re.match(r"\S+encoder\.(fc|head)\.", name)
    }
    whole = {"epoch": 300, "arch": arch, "state_dict": state, "optimizer": {}, "scaler": {}}
    torch.save({"model": backbone} if layout == "model" else whole, tmp_path / "x.pth.tar")
    named = arch if layout == "model" else None  # a converted file does not name its network
    found = pretrained.read(str(tmp_path / "x.pth.tar"), named)
    assert found.arch == arch and not found.resized
    own = found.net.state_dict()
    assert own.keys() == backbone.keys()
    assert all(torch.equal(own[name], x) for name, x in backbone.items())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "vit_small"])
def test_training_and_head_features_start_from_the_authors_checkpoint(arch, tmp_path, capsys):
    state, file = released(arch), tmp_path / "x.pth.tar"
    torch.save({"epoch": 300, "arch": arch, "state_dict": state}, file)
    config = recipe(RELEASES[arch][0], "--init", str(file))
    model = main_mocov3.build(config)
    initial.load(model, config)
    head = "fc" if arch == "resnet50" else "head"
    said = f"the head {head} matched, too; the head predictor matched, too"
    assert said in capsys.readouterr().out
    for name, x in model.state_dict().items():
        source = name.replace("momentum_encoder", "base_encoder")  # the average starts as a copy
        assert torch.equal(x, state[f"module.{source}"]), name

    net = pretrained.read(str(file)).net
    tensors = pretrained.tensors_of(net, {"state_dict": state})
    pretrained.load_projection(net, tensors, "x")
    model.eval()
    x = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(net.eval()(x), model.base_encoder(x))
    assert len(networks.head(net)) == len(networks.head(model.base_encoder))
