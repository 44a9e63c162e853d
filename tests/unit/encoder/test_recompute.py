"""Blocks that are recomputed in the backward pass."""

import copy

import pytest
import torch
from torch import nn

from moco.encoder import networks
from moco.encoder.recompute import check_compiled_recomputation, recompute_blocks
from moco.encoder.resnets import resnet
from moco.errors import InputError


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_recomputed_blocks_save_memory_and_change_nothing(arch):
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


def test_a_transformer_with_batch_norm_in_its_head_is_recomputed():
    """MoCo v3's projector has batch norm. It is not recomputed, so its statistics are right."""
    torch.manual_seed(0)
    kept = networks.create("vit_tiny", 8, image_size=32)
    head = nn.Sequential(nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    networks.set_head(kept, head)
    again, found = copy.deepcopy(kept), []
    recompute_blocks(again)
    for net in (kept, again):
        sizes, images = [], torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        ):
            loss = net(images).square().sum()
        loss.backward()
        gradients = [p.grad for p in net.parameters() if p.requires_grad]
        found.append((sum(sizes), [*net.state_dict().values(), *gradients]))
    (much, theirs), (little, ours) = found
    assert little < much / 2 and all(map(torch.equal, ours, theirs))


@pytest.mark.filterwarnings("ignore")
def test_recomputed_blocks_compile():
    torch.manual_seed(0)
    eager, images = resnet("resnet18", 4), torch.randn(2, 3, 32, 32)
    compiled = copy.deepcopy(eager)
    recompute_blocks(compiled)
    # traces like the default backend, and needs no C++ compiler
    compiled.compile(backend="aot_eager")
    for net in (eager, compiled):
        net(images).square().sum().backward()
    # versions of PyTorch that update batch norm twice are refused
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
