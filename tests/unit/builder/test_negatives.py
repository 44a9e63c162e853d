"""The epochs that have synthetic negatives, and the ramp of their number or weight."""

import math

import pytest
import torch
import torch.nn.functional as F

import main_moby
import main_synco
from moco.builder.negatives import mixture
from moco.builder.synco import SynCo
from moco.loss.contrastive import normalize
from moco.loss.hardest import hardest
from moco.loss.synthetic import Synthetic, draw, similarities
from moco.rng import NEGATIVES, Progress
from moco.sections_negatives import Ramp, Schedule

CONFIG = Synthetic(n_hard=6, counts=(10, 8, 6, 4, 2, 0))
STEPS = 5  # in an epoch
T = 0.2


def at(step):
    return Progress(seed=1, epoch=step // STEPS, step=step, steps_per_epoch=STEPS, epochs=9)


@pytest.mark.parametrize("of", ["number", "weight"])
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_ramp_rises_with_each_step_from_the_first_epoch_to_the_full_height(shape, of):
    schedule = Schedule(CONFIG, first=2, last=7, ramp=Ramp(3, shape, of))
    for step in range(9 * STEPS):
        found = schedule.at(at(step))
        if not 2 * STEPS <= step < 7 * STEPS:
            assert found is None
            continue
        x = min((step - 2 * STEPS + 1) / (3 * STEPS), 1)
        height = x if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * x)
        if of == "weight":
            assert found.counts == CONFIG.counts
            assert found.weight == pytest.approx(height, abs=1e-12)
        else:
            counts = [round(height * count) for count in CONFIG.counts]
            assert (found is None and not any(counts)) or list(found.counts) == counts
            assert found is None or found.weight == 1
        if step >= 5 * STEPS - 1:  # the last step of the ramp, and those after it
            assert found is CONFIG


def test_the_values_are_the_numbers_of_the_types_in_use_times_their_weight():
    ramp = {of: Schedule(CONFIG, 0, None, Ramp(1, "linear", of)) for of in ("number", "weight")}
    # the second of five steps: height .4
    assert ramp["number"].values(at(1)) == {"n1": 4, "n2": 3, "n3": 2, "n4": 2, "n5": 1}
    weighted = {"n1": 4, "n2": 3.2, "n3": 2.4, "n4": 1.6, "n5": 0.8}
    assert ramp["weight"].values(at(1)) == pytest.approx(weighted)
    assert set(Schedule(CONFIG, first=1).values(at(0)).values()) == {0}
    assert Schedule().values(at(0)) == {}


@pytest.mark.parametrize("seed", range(3))
def test_the_weight_multiplies_the_exponentials_of_the_synthetic_negatives(seed):
    torch.manual_seed(seed)
    schedule = Schedule(CONFIG, 0, None, Ramp(2, "linear", "weight"))
    model = SynCo(torch.nn.Identity, 7, 30, T=T, synthetic=schedule).double()
    q = normalize(torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    k = normalize(torch.randn(5, 7, dtype=torch.float64))
    step = 3  # of ten: weight .4
    loss, _ = model.contrast(q, k, at(step))
    (gradient,) = torch.autograd.grad(loss, q)

    bank, s = model.queue, q @ model.queue.T
    draws = draw(CONFIG, 5, 7, at(step).generator(NEGATIVES, "cpu", 0), torch.float64)
    extra = similarities(q, bank, s, hardest(s, CONFIG.n_hard), CONFIG, draws)
    logits = [(q * k).sum(1, keepdim=True) / T, s / T, extra / T + math.log(0.4)]
    expected = F.cross_entropy(torch.cat(logits, 1), torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    (other,) = torch.autograd.grad(expected, q)
    torch.testing.assert_close(gradient, other, rtol=0, atol=1e-10)


def test_each_step_draws_other_negatives_and_a_ramp_of_the_number_makes_fewer():
    q, bank = (normalize(torch.randn(n, 7, dtype=torch.float64)) for n in (5, 30))
    s = q @ bank.T
    schedule = Schedule(CONFIG, 0, None, Ramp(2))
    sizes, found = [], []
    for step in (4, 8, 9, 10):
        config = schedule.at(at(step))
        made = mixture(config, q, bank, s, hardest(s, 6), at(step))
        sizes.append(made.of_q.shape[1])
        found.append(made.dot(q, s)[0, 0].item())
    assert sizes == [5 + 4 + 3 + 2 + 1, 9 + 7 + 5 + 4 + 2, 30, 30]
    assert len(set(found)) == 4


def test_the_options_set_the_ramp_in_both_scripts():
    words = "--n-hard 8 --n1 4 --synthetic-ramp-epochs 5 --synthetic-ramp cosine"
    words = f"photos {words} --synthetic-ramp-of weight".split()
    c = main_synco.complete(main_synco.parser().parse(words))
    synco = main_synco.build(c).synthetic
    assert (synco.first, synco.last, synco.ramp) == (10, None, Ramp(5, "cosine", "weight"))
    words += "--method synco -a vit_tiny --image-size 64 --mlp-dim 10 --queue 16".split()
    c = main_moby.complete(main_moby.parser().parse(words))
    moby = main_moby.build(c).synthetic
    assert (moby.first, moby.last, moby.ramp) == (30, 100, Ramp(5, "cosine", "weight"))
