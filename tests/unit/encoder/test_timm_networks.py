"""timm's networks: MoCo v3's ViTs, stochastic depth and dropout."""

import math
from unittest import mock

import pytest
import timm
import torch
from conftest import ROOT
from encoder_helpers import RECIPES, settings

import main_moby
from moco.encoder import networks, timm_networks
from moco.engine import pretrain
from moco.errors import InputError

# networks


def test_vit_small_is_moco_v3s():
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
    for index in (0, 1, width, height * width - 1):
        row, column = divmod(index, width)
        quarter = dim // 4
        frequencies = [1 / 10_000 ** (i / quarter) for i in range(quarter)]
        slow = [
            f(coordinate * frequency)
            for coordinate in (row, column)
            for f in (math.sin, math.cos)
            for frequency in frequencies
        ]
        torch.testing.assert_close(table[index], torch.tensor(slow), rtol=0, atol=1e-5)
    net = networks.create("vit_tiny", 0, 32)
    assert not net.pos_embed[0, 0].any()  # the position of the class token
    assert torch.equal(net.pos_embed[0, 1:], timm_networks.sine_positions(2, 2, 192))


@pytest.mark.parametrize(
    "arch", ["vit_tiny", "swin_tiny", "convnext_atto", "resnet18", "resnet26d"]
)
def test_features_heads_and_names_of_each_architecture(arch):
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
    """Return the nonzero rates of stochastic depth, and those of dropout."""
    modules = list(net.modules())
    paths = [module.drop_prob for module in modules if getattr(module, "drop_prob", 0)]
    dropouts = [
        module.p for module in modules if isinstance(module, torch.nn.modules.dropout._DropoutNd)
    ]
    functional = [getattr(module, "drop_rate", 0) for module in modules]
    return paths, [rate for rate in dropouts + functional if rate]


RECIPE_OF = {settings(path)["arch"]: path for path in RECIPES}


@pytest.mark.parametrize("arch", RECIPE_OF)
def test_only_the_online_encoder_of_a_recipe_has_stochastic_depth(arch):
    given = ("DIR", "--cfg", RECIPE_OF[arch], "--mlp-dim", 8, "--queue", 256)
    for options, online in (
        ((), 0.2),
        (("--online-drop-path", 0), 0.0),
        (("--online-drop-path", 0.1), 0.1),
    ):
        words = [str(word) for word in (*given, *options)]
        config = main_moby.parser().parse(words)
        with mock.patch.object(pretrain, "complete", lambda config, *_: config):
            config = main_moby.complete(config)
        model = main_moby.build(config)
        paths, dropouts = rates(model.encoder)
        assert max(paths, default=0) == pytest.approx(online) and not dropouts
        assert rates(model.encoder_k) == ([], [])
        if arch.endswith("base"):
            break  # creating a large model takes seconds


ARCHITECTURES = sorted(
    {settings(path).get("arch") for path in ROOT.glob("configs/*.yaml")} - {None}
)


# by timm's defaults, the first group has stochastic depth, the second dropout, the third neither
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
def test_dropout_and_stochastic_depth_are_off_by_default(arch):
    """Every evaluation creates its network without rates."""
    assert rates(networks.create(arch, 5, 256 if "256" in arch else 224)) == ([], [])


@pytest.mark.parametrize("arch", FAMILIES)
def test_drop_path_rate_is_applied_or_refused(arch):
    try:
        net = networks.create(arch, 0, 256 if "256" in arch else 224, drop_path=0.3)
    except InputError as error:
        assert arch in WITHOUT_DEPTH and "has no stochastic depth; set --online-drop-path" in str(
            error
        )
        return
    paths, dropouts = rates(net)
    assert arch not in WITHOUT_DEPTH and 0.25 < max(paths) <= 0.3 + 1e-6 and not dropouts


WITHOUT_DEPTH = {"ghostnet_100", "legacy_seresnet18", "repghostnet_050"}


@pytest.mark.parametrize(
    "arch", ["swin_tiny", "focalnet_tiny_srf", "ghostnet_100", "coatnet_rmlp_nano_rw_224"]
)
def test_network_in_training_draws_no_random_numbers(arch):
    """This also covers modules whose class is no known kind of dropout."""
    net, images = networks.create(arch, 0, 224), torch.randn(4, 3, 224, 224)
    before = torch.get_rng_state()
    with torch.no_grad():
        net.train()(images)
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_of_the_smallest_vit_have_the_given_sizes():
    config = main_moby.parser().parse(
        ["photos", "-a", "vit_tiny", "--image-size", "32", "--mlp-dim", "8", "--queue", "8"]
    )
    model = main_moby.build(main_moby.complete(config))
    assert max(rates(model.encoder)[0]) == pytest.approx(0.2) and rates(model.encoder_k) == ([], [])
    assert model.predictor[-1].weight.shape == (256, 8) and model.projector[0].weight.shape == (
        8,
        192,
    )
