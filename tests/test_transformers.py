"""main_moby.py and transformers in the evaluation scripts: published commands, exact resume, other software's files, mistakes."""

import json
import math
import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, in_process, shell
from test_cli import refused
from test_named import WRITERS, Tree
from test_runs import facts, load, same, succeeded
from test_voc07 import write_voc

import main_lincls
import main_moby
from moco.encoder import networks, pretrained, recompute, timm_networks
from moco.engine import checkpoint
from moco.errors import InputError

# the smallest networks of their kinds, at a size that they get through in moments
SIZES = ("--image-size", 32, "-b", 8, "-j", 0, "--epochs", 1, "--mlp-dim", 32, "--moco-dim", 16)
QUEUE = ("--queue", 40)
SMALL = (*SIZES, "-a", "test_vit", "--online-drop-path", 0.2)
VIT = (*SIZES, "-a", "vit_tiny")
SYNCO = (
    "--n-hard",
    8,
    *(word for i in range(1, 7) for word in (f"--n{i}", 2)),
    "--synthetic-first",
    1,
    "--synthetic-last",
    2,
)
METHODS = {"moby": QUEUE, "synco": (*SYNCO, *QUEUE), "byol": ("--moco-m", 0.9)}
ARCHS = {"moby": "swin_tiny", "synco": "test_vit", "byol": "vit_tiny"}


# networks


def test_the_small_vit_is_moco_v3s():
    net = networks.create("vit_small", 0)
    assert {block.attn.num_heads for block in net.blocks} == {12} and len(net.blocks) == 12
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(21.7e6, rel=0.01)
    assert not net.pos_embed.requires_grad and all(
        p.requires_grad for n, p in net.named_parameters() if n != "pos_embed"
    )
    assert (
        networks.num_features(net) == 384
        and networks.num_features(networks.create("swin_tiny", 5, 64)) == 768
    )


@pytest.mark.parametrize(("height", "width", "dim"), [(3, 5, 8), (14, 14, 384)])
def test_positions_are_sines_and_cosines_of_row_and_column(height, width, dim):
    table = timm_networks.sine_positions(height, width, dim)
    assert table.shape == (height * width, dim)
    for place in (0, 1, width, height * width - 1):
        row, column = divmod(place, width)
        quarter = dim // 4
        rates = [1 / 10_000 ** (i / quarter) for i in range(quarter)]
        slow = [
            f(where * rate)
            for where in (row, column)
            for f in (math.sin, math.cos)
            for rate in rates
        ]
        torch.testing.assert_close(table[place], torch.tensor(slow), rtol=0, atol=1e-5)
    net = networks.create("vit_tiny", 0, 32)
    assert not net.pos_embed[0, 0].any()  # the class token's
    assert torch.equal(net.pos_embed[0, 1:], timm_networks.sine_positions(2, 2, 192))


@pytest.mark.parametrize(
    "arch", ["vit_tiny", "swin_tiny", "convnext_atto", "resnet18", "resnet26d"]
)
def test_features_heads_and_names_of_every_kind(arch):
    net = networks.create(arch, 7, 64)
    images = torch.randn(2, 3, 64, 64)
    net.eval()
    x = networks.features(net, images)
    assert x.shape == (2, networks.num_features(net))
    torch.testing.assert_close(net(images), networks.classifier(net)(x))
    names = set(networks.backbone_keys(net))
    assert set(net.state_dict()) - names == {
        f"{networks.head_name(net)}.weight",
        f"{networks.head_name(net)}.bias",
    }
    bare = networks.create(arch, 0, 64)
    assert set(bare.state_dict()) == names and bare.eval()(images).shape == x.shape
    networks.set_head(
        net, torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(networks.num_features(net), 3))
    )
    assert networks.classifier(net).out_features == 3 and net(images).shape == (2, 3)


def rates(net):
    """Return the rates above 0 of a network in training: of stochastic depth, and of dropout."""
    modules = list(net.modules())
    paths = [module.drop_prob for module in modules if getattr(module, "drop_prob", 0)]
    dropouts = [
        module.p for module in modules if isinstance(module, torch.nn.modules.dropout._DropoutNd)
    ]
    functional = [getattr(module, "drop_rate", 0) for module in modules]
    return paths, [rate for rate in dropouts + functional if rate]


def settings(path):
    return yaml.safe_load(path.read_text())


RECIPES = sorted(ROOT.glob("configs/*_vit_*.yaml")) + sorted(ROOT.glob("configs/*_swin_*.yaml"))
RECIPE_OF = {settings(path)["arch"]: path for path in RECIPES}


@pytest.mark.parametrize("arch", RECIPE_OF)
def test_only_the_online_encoder_of_a_recipe_has_stochastic_depth(arch):
    given = ("DIR", "--cfg", RECIPE_OF[arch], "--mlp-dim", 8, "--queue", 256)
    for options, online in (
        ((), 0.2),
        (("--online-drop-path", 0), 0.0),
        (("--online-drop-path", 0.1), 0.1),
    ):
        args = main_moby.parser().parse([str(word) for word in (*given, *options)])
        model = main_moby.build(args, torch.device("cpu"))
        paths, dropouts = rates(model.encoder)
        assert max(paths, default=0) == pytest.approx(online) and not dropouts
        assert rates(model.encoder_k) == ([], [])
        if arch.endswith("base"):
            break  # it takes seconds to make one


ARCHITECTURES = sorted(
    {settings(path).get("arch") for path in ROOT.glob("configs/*.yaml")} - {None}
)
# timm's default is stochastic depth in the first row, dropout in the second; both are 0 in the third
FAMILIES = [
    *(
        "swinv2_tiny_window8_256",
        "focalnet_tiny_srf",
        "fasternet_t1",
        "tiny_vit_5m_224",
        "nextvit_small",
        "nest_tiny",
    ),
    *(
        "ghostnet_100",
        "legacy_seresnet18",
        "repghostnet_050",
        "rexnet_100",
        "coatnet_rmlp_nano_rw_224",
        "bat_resnext26ts",
    ),
    *(
        "convnext_atto",
        "efficientnet_b0",
        "regnetx_002",
        "mixer_s32_224",
        "xcit_nano_12_p16_224",
        "resnet26d",
    ),
]
FAMILIES = [arch for arch in FAMILIES if timm.is_model(arch)]  # older versions lack some


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *FAMILIES])
def test_no_network_drops_anything_unless_it_is_told_to(arch):
    """The network of every evaluation, made by `create` with no rate."""
    assert rates(networks.create(arch, 5, 256 if "256" in arch else 224)) == ([], [])


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_rate_is_applied_or_refused(arch):
    try:
        net = networks.create(arch, 0, 256 if "256" in arch else 224, drop_path=0.3)
    except InputError as error:
        assert arch in WITHOUT_DEPTH and "has no stochastic depth; leave --online-drop-path" in str(
            error
        )
        return
    paths, dropouts = rates(net)
    assert arch not in WITHOUT_DEPTH and 0.25 < max(paths) <= 0.3 + 1e-6 and not dropouts


WITHOUT_DEPTH = {"ghostnet_100", "legacy_seresnet18", "repghostnet_050"}


@pytest.mark.parametrize(
    "arch", ["swin_tiny", "focalnet_tiny_srf", "ghostnet_100", "coatnet_rmlp_nano_rw_224"]
)
def test_a_network_in_training_gives_the_same_features_twice(arch):
    """No module draws random numbers, whatever its class is called."""
    net, images = networks.create(arch, 0, 224), torch.randn(4, 3, 224, 224)
    before = torch.get_rng_state()
    with torch.no_grad():
        net.train()(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_of_the_smallest_vit():
    args = main_moby.parser().parse(
        ["photos", "-a", "vit_tiny", "--image-size", "32", "--mlp-dim", "8", "--queue", "8"]
    )
    main_moby.check(args)
    model = main_moby.build(args, torch.device("cpu"))
    assert max(rates(model.encoder)[0]) == pytest.approx(0.2) and rates(model.encoder_k) == ([], [])
    assert model.predictor[-1].weight.shape == (256, 8) and model.projector[0].weight.shape == (
        8,
        192,
    )


# files


def as_other_software_names_it(name):
    """The Swins of MoBY's code reduce at the end of a stage, timm's at the beginning of the next."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(["encoder", *parts])


def test_a_moby_checkpoint_of_other_software(tmp_path, script, shared_images):
    torch.manual_seed(1)
    theirs = networks.create("swin_tiny", 0, 32)
    model = {
        as_other_software_names_it(name): tensor for name, tensor in theirs.state_dict().items()
    }
    assert (
        "encoder.layers.0.downsample.reduction.weight" in model
        and "encoder.layers.3.downsample.norm.weight" not in model
    )
    model |= {
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49),
        "queue1": torch.zeros(256, 4096),
    }
    model |= {
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(
            49, 49, dtype=torch.long
        )
    }
    model |= {
        name.replace("encoder.", "encoder_k."): tensor
        for name, tensor in model.items()
        if name.startswith("encoder.")
    }
    model |= {"projector.linear_out.weight": torch.zeros(256, 4096)}
    torch.save({"model": model, "epoch": 299}, tmp_path / "ckpt_epoch_299.pth")
    ours = networks.create("swin_tiny", 3, 32)
    count = len(networks.backbone_keys(ours))
    assert pretrained.load_backbone(ours, model, "file") == count
    assert all(
        torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items()
    )
    options = (
        "--pretrained",
        tmp_path / "ckpt_epoch_299.pth",
        "-a",
        "swin_tiny",
        "--image-size",
        32,
        "-b",
        8,
        "-j",
        0,
    )
    status, out, err = script(
        "main_knn", shared_images, *options, "--k", 5, "--save-dir", tmp_path / "knn"
    )
    assert status == 0 and f"{count} of {count} backbone tensors matched" in out, err
    del model["encoder.layers.2.blocks.3.mlp.fc1.weight"]
    with pytest.raises(
        InputError, match=r"missing tensors \(1\): layers\.2\.blocks\.3\.mlp\.fc1\.weight"
    ):
        pretrained.load_backbone(ours, model, "file")
    with pytest.raises(InputError, match=r"vit\.pt"):
        pretrained.load_backbone(networks.create("vit_tiny", 3, 32), model, "vit.pt")


def test_positions_for_another_size_are_interpolated():
    small, large = networks.create("vit_tiny", 3, 64), networks.create("vit_tiny", 3, 96)
    with torch.no_grad():
        small.pos_embed.normal_()
    pretrained.load_backbone(
        large, {f"encoder.{name}": tensor for name, tensor in small.state_dict().items()}, "file"
    )
    assert torch.equal(large.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    grid = small.pos_embed[:, 1:].transpose(1, 2).view(1, 192, 4, 4)
    wider = (
        F.interpolate(grid, (6, 6), mode="bicubic", antialias=True, align_corners=False)
        .flatten(2)
        .transpose(1, 2)
    )
    torch.testing.assert_close(
        large.pos_embed, torch.cat([small.pos_embed[:, :1], wider], 1), rtol=0, atol=1e-5
    )


def test_what_is_another_network_is_not_loaded():
    """Of the same shapes but with six heads; with other patches."""
    theirs = timm.create_model("vit_small_patch16_224", img_size=32).state_dict()
    with pytest.raises(
        InputError, match=r"f\.pt: its positions are learned, .* -a vit_small_patch16_224"
    ):
        pretrained.load_backbone(networks.create("vit_small", 3, 32), theirs, "f.pt")
    assert (
        pretrained.load_backbone(networks.create("vit_small_patch16_224", 3, 32), theirs, "f.pt")
        == 150
    )
    mine = networks.create("vit_small", 3, 64)
    for row_first in (True, False):
        table = timm_networks.sine_positions(2, 2, 384)
        theirs["pos_embed"][0, 1:] = (
            table if row_first else table.view(2, 2, 384).transpose(0, 1).reshape(4, 384)
        )
        assert pretrained.load_backbone(mine, theirs, "f.pt") == 150
    finer = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8).state_dict()
    with pytest.raises(
        InputError,
        match=r"wrong shapes \(1\): patch_embed\.proj\.weight is \(192, 3, 8, 8\), expected \(192, 3, 16, 16\)",
    ):
        pretrained.load_backbone(networks.create("vit_tiny", 3, 32), finer, "f.pt")


def test_settings_in_a_swin_style_file_are_no_hindrance(tmp_path):
    """yacs' CfgNode, a dict with attributes; nothing of it is imported or run."""
    module = types.ModuleType("yacs.config")
    node = module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    settings = node(MODEL=node(TYPE="moby"), EPOCHS=300)
    settings.__dict__["__immutable__"] = True
    state = {"model": {"encoder.x": torch.ones(2)}, "epoch": 299, "config": settings}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "yacs.config", module)
        torch.save(state, tmp_path / "ckpt_epoch_299.pth")
    found = checkpoint.load(str(tmp_path / "ckpt_epoch_299.pth"))
    assert torch.equal(found["model"]["encoder.x"], torch.ones(2))
    assert found["config"]["MODEL"]["TYPE"] == "moby" and found["config"]["EPOCHS"] == 300


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, shared_images):
    """One of each method, each of another network."""
    files = {}
    for method, options in METHODS.items():
        run = tmp_path_factory.mktemp(method)
        command = (
            shared_images,
            *SIZES,
            "--method",
            method,
            *options,
            "-a",
            ARCHS[method],
            "--knn-every",
            1,
        )
        assert in_process("main_moby", *command, "--save-dir", run)[0] == 0
        files[method] = run / "checkpoint_0000.pth.tar"
    return files


def test_an_encoder_is_timms_own(checkpoints):
    tensors = {
        name.removeprefix("module.encoder."): tensor
        for name, tensor in load(checkpoints["moby"])["state_dict"].items()
        if name.startswith("module.encoder.")
    }
    plain = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32)
    assert str(plain.load_state_dict(tensors)) == "<All keys matched successfully>"


@pytest.mark.parametrize("method", METHODS)
def test_every_evaluation_reads_the_checkpoint(
    method, checkpoints, script, shared_images, tmp_path
):
    file = checkpoints[method]
    calls = {
        "main_lincls": (shared_images, "--lr", 0.1, 0.01, "--epochs", 1),
        "main_semisup": (shared_images, "--epochs", 1, "--train-percent", 10, "--ft-proj", 1),
        "main_knn": (shared_images, "--k", 5),
        "main_voc07": (write_voc(tmp_path / "voc", 30, 12), "--c", 1),
    }
    for evaluation, options in calls.items():
        run = tmp_path / evaluation
        status, out, err = script(
            evaluation,
            *options,
            "--image-size",
            32,
            "-b",
            4,
            "-j",
            0,
            "--pretrained",
            file,
            "--save-dir",
            run,
        )
        assert status == 0, err
        found = json.loads((run / "results.json").read_text())
        assert (found["method"], found["arch"]) == (method, ARCHS[method])
        assert all(
            0 <= value <= 1 or name.startswith("best") for name, value in found["metrics"].items()
        )
        count = len(networks.backbone_keys(networks.create(found["arch"], 1, 32)))
        assert f"{count} of {count} backbone tensors matched" in out


# runs


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_never_stopped(method, script, shared_images, tmp_path):
    """Stochastic depth, queues and the target's momentum included."""
    command = (
        shared_images,
        *SMALL,
        "--epochs",
        3,
        "--method",
        method,
        *METHODS[method],
        "-p",
        1,
        "--accumulation-steps",
        2,
    )
    for run, more in (
        ("whole", ()),
        ("parts", ("--resume", tmp_path / "whole" / "checkpoint_0001.pth.tar")),
    ):
        status, _, err = script("main_moby", *command, "--save-dir", tmp_path / run, *more)
        assert status == 0, err
    a, b = (load(tmp_path / run / "checkpoint_0002.pth.tar") for run in ("whole", "parts"))
    for key in ("epoch", "state_dict", "optimizer", "scaler", "progress"):
        assert same(a[key], b[key]), key
    lines = facts(tmp_path / "whole")
    assert facts(tmp_path / "parts") == lines  # the first ones are those of the run it began from
    assert {"grad_encoder", "grad_projector", "grad_predictor"} < lines[0].keys()
    assert ("cosine" if method == "byol" else "acc1") in lines[0]


def test_blocks_computed_again_change_nothing(script, shared_images, tmp_path):
    net, calls = networks.create("test_vit", 3, 32), []
    net.blocks[2].register_forward_pre_hook(lambda *_: calls.append(1))
    recompute.recompute_blocks(net)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 2
    for arch, words in (
        ("resnet26d", "has batch norm"),
        ("cs3darknet_focus_s", "--grad-checkpoint"),
    ):
        with pytest.raises(InputError, match=words):
            recompute.recompute_blocks(networks.create(arch, 3, 64))
    states = []
    for name in ("--no-stop-grad-conv1", "--use-checkpoint"):
        status, _, err = script(
            "main_moby", shared_images, *SMALL, name, "--save-dir", tmp_path / name
        )
        assert status == 0, err
        states.append(load(tmp_path / name / "checkpoint_0000.pth.tar")["state_dict"])
    assert same(*states)


def test_a_frozen_patch_projection_stays(script, shared_images, tmp_path):
    status, _, err = script(
        "main_moby",
        shared_images,
        *VIT,
        "--epochs",
        2,
        "--stop-grad-conv1",
        "--wd",
        0.5,
        "--save-dir",
        tmp_path,
    )
    assert status == 0, err
    first, second = (load(tmp_path / f"checkpoint_000{i}.pth.tar")["state_dict"] for i in range(2))
    kept = ["patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"]
    for name in kept:
        for part in ("encoder", "encoder_k"):
            assert torch.equal(first[f"module.{part}.{name}"], second[f"module.{part}.{name}"])
        assert torch.equal(second[f"module.encoder.{name}"], second[f"module.encoder_k.{name}"])
    assert not torch.equal(first["module.encoder.cls_token"], second["module.encoder.cls_token"])
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    weight = second["module.encoder.patch_embed.proj.weight"]
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(
        bound / 3**0.5, rel=0.02
    )  # as it was drawn
    refused(
        script("main_moby", shared_images, *SIZES, "-a", "resnet18", "--stop-grad-conv1"),
        "resnet18 has no patch projection",
    )


def test_clipping(script, shared_images, tmp_path):
    """SGD without momentum moves by the rate times the gradient, whose length is clipped."""
    moves = []
    for clip in (0, 0.01):
        run = tmp_path / str(clip)
        plain = "--optimizer sgd --momentum 0 --wd 0 --lr 1 --learning-rate-scaling none --no-cos"
        options = (
            *plain.split(),
            *"--lr-warmup-epochs 0 -b 24 --epochs 2 --accumulation-steps 2 -p 1 --clip-grad".split(),
            clip,
            "--save-dir",
            run,
        )
        status, _, err = script("main_moby", shared_images, *SMALL, *options)
        assert status == 0, err
        first, second = (load(run / f"checkpoint_000{i}.pth.tar")["state_dict"] for i in range(2))
        trained = [n for n in first if ".encoder." in n or ".projector." in n or ".predictor." in n]
        trained = [n for n in trained if "running" not in n and "num_batches" not in n]
        moves.append(
            math.sqrt(sum(float((second[n] - first[n]).double().square().sum()) for n in trained))
        )
        lengths = [
            math.hypot(*(line[f"grad_{part}"] for part in ("encoder", "projector", "predictor")))
            for line in facts(run)
        ]
        assert moves[-1] == pytest.approx(min(lengths[1], clip or math.inf), rel=1e-3)
    assert moves[1] == pytest.approx(0.01, rel=1e-3) and moves[0] > 0.1


# published commands


RESULTS = ("imagenet-freeze", "cifar10-finetune")
LAUNCH = ("-m", "torch.distributed.launch", "--nproc_per_node=2", "--master_port=12345")


def test_published_commands_run(shared_images, tmp_path):
    """Pre-training, the linear probe on its run, fine-tuning on another data set; ViT-tiny at 32 pixels in place of 224."""
    small = ("--image-size", 32, "--epochs", 1, "--workers", 0)
    run = ("--output", tmp_path, "--tag", "T")
    data = ("--data-path", shared_images)
    command = (
        *LAUNCH,
        "main_moby.py",
        "--cfg",
        "configs/moby_vit_tiny.yaml",
        *data,
        "--batch-size",
        8,
        *run,
    )
    out = succeeded(shell(*command, *small, "--mlp-dim", 64, "--amp", "off"))
    assert (
        "total batch 16 = 8 per process x 2 processes x 1 accumulation; lr after scaling 3.125e-05"
        in out
    )
    assert (tmp_path / "T" / "checkpoint_0000.pth.tar").exists()
    command = (
        *LAUNCH,
        "main_lincls.py",
        "--cfg",
        "configs/moby_vit_tiny.yaml",
        *data,
        "--batch-size",
        8,
        *run,
    )
    out = succeeded(shell(*command, *small))
    assert "150 of 150 backbone tensors matched" in out and "lr after scaling 0.015625" in out
    WRITERS["cifar10"](Tree(tmp_path / "cifar"))
    command = tuple(tmp_path / "cifar" if word == shared_images else word for word in command)
    out = succeeded(shell(*command, *small, "--dataset", "cifar10", "--weights", "finetune"))
    assert "150 of 150 backbone tensors matched" in out
    found = [
        json.loads((tmp_path / "T" / f"lincls-{name}" / "results.json").read_text())
        for name in RESULTS
    ]
    assert [(one["method"], one["arch"], one["dataset"], one["protocol"]) for one in found] == [
        ("moby", "vit_tiny", str(shared_images), "linear"),
        ("moby", "vit_tiny", "cifar10", "finetune"),
    ]


def test_opts_are_spelled_as_options(script, shared_images, tmp_path):
    given = (
        "--data-path",
        shared_images,
        "--opts",
        "DATA.DATASET",
        "cifar10",
        "LINEAR_EVAL.WEIGHTS",
        "finetune",
    )
    refused(script("main_lincls", *given), "give --dataset cifar10 --weights finetune instead")
    given = ("--opts", "TRAIN.EPOCHS", 5, "AMP_OPT_LEVEL", "O1", "DATA.DATASET", "cifar10", "-b", 3)
    refused(
        script("main_moby", "DIR", *given),
        "give --epochs 5 --dataset cifar10 instead; here is nothing like AMP_OPT_LEVEL\n",
    )
    given = ("--opts", "TRAIN.BASE_LR", 0.001, "TRAIN.USE_CHECKPOINT", True, "DATA.BATCH_SIZE", 64)
    same = "--lr 0.0005 --learning-rate-scaling linear --grad-checkpoint --batch-size 64"
    refused(script("main_moby", "DIR", *given), f"give {same} instead\n")
    refused(script("main_lincls", "DIR", *given), f"give {same} x processes instead\n")
    refused(
        script("main_moby", "DIR", "--opts"), "each setting is an option of its own; leave it out\n"
    )


def test_an_evaluation_finds_the_run_or_says_that_there_is_none(
    script, shared_images, checkpoints, tmp_path
):
    small = (shared_images, "--image-size", 32, "-b", 8, "-j", 0, "--k", 5)
    refused(
        script("main_knn", *small, "--output", tmp_path, "--tag", "T"),
        f"no checkpoint_*.pth.tar in {tmp_path / 'T'}",
    )
    refused(script("main_knn", *small, "--tag", "T"), "--tag T", "give --output DIR")
    run = checkpoints["synco"].parent
    found = (
        "--output",
        run.parent,
        "--tag",
        run.name,
        "--cfg",
        ROOT / "configs" / "synco_vit_small.yaml",
        "-a",
        "test_vit",
    )
    status, out, err = script("main_knn", *small, *found, "--save-dir", tmp_path / "elsewhere")
    assert (
        status == 0
        and "checkpoint_0000.pth.tar: 78 of 78" in out
        and (tmp_path / "elsewhere" / "results.json").exists()
    ), err
    status, out, err = script("main_knn", *small, *found, "--image-size", 16)
    assert (
        status == 0
        and "pre-trained at 32 pixels, and sees 16 here" in out
        and (run / "knn-imagenet").exists()
    ), err


def test_a_checkpoint_of_another_network_says_of_which(
    script, shared_images, checkpoints, tmp_path
):
    small = (shared_images, "--image-size", 32, "--pretrained", checkpoints["byol"])
    refused(
        script("main_knn", *small, "-a", "test_vit"),
        "contains vit_tiny, not test_vit; give -a vit_tiny",
    )
    result = shell(
        "detection/convert-pretrain-to-detectron2.py", checkpoints["byol"], tmp_path / "x.pkl"
    )
    assert (
        result.returncode == 2
        and "is of vit_tiny, and the detectors here are built on ResNets" in result.stderr
    )


def test_each_method_has_its_own_settings():
    for method, settings in (
        ("moby", (0.99, 5e-4, 0.05)),
        ("synco", (0.99, 5e-4, 0.05)),
        ("byol", (0.996, 1e-4, 0.03)),
    ):
        args = main_moby.parser().parse(
            ["photos", "--method", method, "--image-size", "32", "-a", "vit_tiny"]
        )
        main_moby.check(args)
        assert (args.moco_m, args.lr, args.wd) == settings and args.online_drop_path == 0.2
    args = main_moby.parser().parse(
        ["photos", "--method", "byol", "--lr", "1", "--wd", "0", "--moco-m", "0", "-a", "resnet18"]
    )
    main_moby.check(args)
    assert (args.moco_m, args.lr, args.wd, args.online_drop_path) == (0, 1, 0, 0)


def test_there_is_a_recipe_for_every_method_and_network():
    archs = ("vit_small", "vit_base", "swin_tiny", "swin_small", "swin_base")
    assert {path.stem for path in RECIPES} == {
        f"{method}_{arch}" for method in METHODS for arch in archs
    } | {"moby_vit_tiny"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_the_published_settings(recipe):
    args = main_moby.parser().parse(["DIR", "--cfg", str(recipe)])
    method, arch = recipe.stem.split("_", 1)
    assert (args.method, args.arch, args.epochs, args.batch_size, args.recipe) == (
        method,
        arch,
        300,
        128,
        "byol",
    )
    batch = 4 * 128
    rates = (args.lr * batch / 256, args.lr_final * batch / 256, args.wd, args.moco_m)
    assert rates == pytest.approx(
        (2e-4, 5e-6, 0.03, 0.996) if method == "byol" else (1e-3, 5e-6, 0.05, 0.99)
    )
    assert (args.optimizer, args.clip_grad, args.lr_warmup_epochs, args.lr_by, args.cos) == (
        "adamw",
        5,
        5,
        "step",
        True,
    )
    assert (args.online_drop_path, args.target_drop_path, args.queue, args.moco_t) == (
        0.2,
        0,
        4096,
        0.2,
    )
    if method == "synco":
        assert [getattr(args, f"n{i}") for i in range(1, 7)] == [128] * 6
        assert (args.n_hard, args.sigma, args.delta, args.eta) == (256, 0.1, 0.01, 0.01)
        assert (args.synthetic_first, args.synthetic_last) == (30, 100)
    probe = main_lincls.parser()
    probe.prog = "main_lincls.py"
    args = probe.parse(["DIR", "--cfg", str(recipe)])
    assert (args.arch, args.lr, args.learning_rate_scaling, args.epochs, args.wd) == (
        arch,
        [0.5],
        "linear",
        100,
        [0],
    )
    assert args.clip_grad == 5


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("main_moby", ("-a", "swin_tyny"), ("swin_tyny", "nearest is 'swin_tiny'")),
        ("main_moby", ("--method", "mocov3"), ("--method", "synco")),
        (
            "main_moby",
            ("--online-drop-path", 1),
            ("--online-drop-path: 1 is not below 1", "[0, 1)"),
        ),
        ("main_moby", ("--moco-m", 2), ("--moco-m",)),
        (
            "main_moby",
            ("--method", "synco", "--n-hard", 50, *QUEUE),
            ("--n-hard 50", "40 rows (--queue)"),
        ),
        (
            "main_moby",
            ("--method", "synco", "--n-hard", 8, "--synthetic-first", 100),
            ("--synthetic-first 100", "below"),
        ),
        (
            "main_moby",
            ("--method", "synco", "--queue", 400, *(f"--n{i}=0" for i in range(1, 7))),
            ("--n1 to --n6 are all 0",),
        ),
        ("main_moby", ("--image-size", 24), ("--image-size 24", "multiple", "16 pixels")),
        (
            "main_moby",
            ("-a", "resnet18"),
            ("resnet18: has no stochastic depth; leave --online-drop-path",),
        ),
        ("main_moby", ("-a", "densenet121"), ("densenet121: has no stochastic depth",)),
        ("main_moby", ("-a", "deit_tiny_distilled_patch16_224"), ("not one linear layer",)),
        ("main_moby", ("--amp-opt-level", "O1"), ("--amp-opt-level: use --amp fp16",)),
        ("main_moby", ("--recipe", "multicrop"), ("6 views, but two are needed",)),
        (
            "main_synco",
            ("-a", "swin_tiny", "--image-size", 32),
            ("--arch swin_tiny", "main_moby.py"),
        ),
    ],
)
def test_mistakes_are_one_line(name, options, words, script, shared_images):
    base = SMALL if name == "main_moby" else ("-b", 8)
    refused(script(name, shared_images, *base, *options), *words)
