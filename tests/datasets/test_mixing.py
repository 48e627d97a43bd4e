import math

import pytest
import torch
import torch.nn.functional as F

import fastlocal as fl
from fastlocal import models
from fastlocal.data import Mixing
from fastlocal.errors import ArgumentError

C = 5


def batch(count: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 3, 8, 10, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(C, (count,), generator=generator)


def onehot(y: torch.Tensor) -> torch.Tensor:
    return F.one_hot(y, C).double()


def test_mixup_against_a_loop():
    x, y = batch(7)
    lambdas = []
    for index in range(40):
        mixed, p = Mixing(mixup=0.4)(x, y, C, 2, index)
        # lambda from the first sample, whose partner is the last; then everything else must follow from it
        lam = ((mixed[0] - x[-1]) / (x[0] - x[-1])).median().item()
        for i in range(7):
            partner = 6 - i
            torch.testing.assert_close(mixed[i], lam * x[i] + (1 - lam) * x[partner])
            torch.testing.assert_close(p[i], lam * onehot(y)[i] + (1 - lam) * onehot(y)[partner])
        torch.testing.assert_close(p.sum(1), torch.ones(7, dtype=torch.float64))
        lambdas.append(lam)
    assert all(0 <= lam <= 1 for lam in lambdas) and len({round(lam, 9) for lam in lambdas}) == 40
    assert min(lambdas) < 0.1 and max(lambdas) > 0.9


def test_the_lambdas_follow_their_beta_distribution():
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    for a in (0.3, 1.0, 4.0):
        drawn = torch.tensor([Mixing(mixup=a)(x, torch.tensor([0, 1]), 2, 0, i)[0][0].item() for i in range(4000)])
        assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
        assert drawn.var().item() == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.06)


def test_cutmix_against_a_loop():
    x, y = batch()
    shares, cut_off = [], 0
    for index in range(200):
        mixed, p = Mixing(cutmix=1.0, seed=1)(x, y, C, 0, index)
        taken = (mixed != x).any(1)  # [B, H, W]
        assert (taken == taken[0]).all(), "one box for the whole batch"
        rows, columns = taken[0].any(1).nonzero().flatten(), taken[0].any(0).nonzero().flatten()
        area = len(rows) * len(columns)
        lam = 1 - area / 80
        expected = x.clone()
        for i in range(6):
            for r in rows.tolist():
                for c in columns.tolist():
                    expected[i, :, r, c] = x[5 - i, :, r, c]
            torch.testing.assert_close(p[i], lam * onehot(y)[i] + (1 - lam) * onehot(y)[5 - i])
        assert torch.equal(mixed, expected)
        if area:
            assert rows.tolist() == list(range(rows[0], rows[-1] + 1))
            whole = min(rows[0], columns[0]) > 0 and rows[-1] < 7 and columns[-1] < 9
            if whole:  # sides share the ratio of the image's, each rounded down to an even number of pixels
                side = [n // 2 for n in (len(rows), len(columns))]
                low = max(2 * n / size for n, size in zip(side, (8, 10)))
                high = min(2 * (n + 1) / size for n, size in zip(side, (8, 10)))
                assert low < high
            cut_off += not whole
        shares.append(area / 80)
    assert 0.2 < sum(shares) / 200 < 0.5 and 0 < cut_off < 200


def test_smoothing_is_that_of_cross_entropy():
    x, y = batch()
    logits = torch.randn(6, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for s in (0.0, 0.1, 1.0):
        same, p = Mixing(smoothing=s)(x, y, C, 0, 0)
        assert same is x
        torch.testing.assert_close(p, (1 - s) * onehot(y) + s / C)
        torch.testing.assert_close(F.cross_entropy(logits, p), F.cross_entropy(logits, y, label_smoothing=s))
    mixed, p = Mixing(mixup=1.0, smoothing=0.1)(x, y, C, 0, 5)
    _, plain = Mixing(mixup=1.0)(x, y, C, 0, 5)
    assert torch.equal(mixed, Mixing(mixup=1.0)(x, y, C, 0, 5)[0])
    torch.testing.assert_close(p, 0.9 * plain + 0.1 / C)


def test_probabilities_can_be_mixed_again():
    x, y = batch()
    given = torch.softmax(torch.randn(6, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1)
    mixed, p = Mixing(mixup=1.0, smoothing=0.2)(x, given, C, 0, 1)
    lam = ((mixed[0] - x[-1]) / (x[0] - x[-1])).median().item()
    smooth = 0.8 * given + 0.2 / C
    torch.testing.assert_close(p, lam * smooth + (1 - lam) * smooth.flip(0))
    again = Mixing(mixup=1.0, smoothing=0.2)(x, onehot(y), C, 0, 1)[1]
    torch.testing.assert_close(again, Mixing(mixup=1.0, smoothing=0.2)(x, y, C, 0, 1)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes_and_that_the_given_batch_stays(dtype):
    x, y = batch(dtype=dtype)
    before = x.clone(), y.clone()
    for mixing in (Mixing(mixup=1.0), Mixing(cutmix=1.0)):
        for index in range(5):
            mixed, p = mixing(x, y, C, 0, index)
            assert mixed.dtype == dtype and p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert mixed.shape == x.shape and mixed.is_contiguous()
            torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]))
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


def test_randomness_is_a_function_of_seed_epoch_and_index():
    x, y = batch()
    mixing = Mixing(mixup=0.8, cutmix=1.0, prob=0.7)
    outcomes = []
    for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        seed, epoch, index = key
        again = Mixing(mixup=0.8, cutmix=1.0, prob=0.7, seed=seed)
        first = again(x, y, C, epoch, index)
        torch.manual_seed(7)
        mixing(x, y, C, 9, 9)
        second = again(x, y, C, epoch, index)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        outcomes.append([Mixing(mixup=0.8, seed=seed)(x, y, C, epoch, index)[0]])
    assert not any(torch.equal(a[0], b[0]) for i, a in enumerate(outcomes) for b in outcomes[:i])
    state = torch.get_rng_state()
    mixing(x, y, C, 0, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_probability_and_switch():
    x, y = batch()
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for index in range(600):
        mixed, _ = Mixing(mixup=1.0, cutmix=1.0, prob=0.6)(x, y, C, 0, index)
        kept = (mixed == x).double().mean().item()
        taken = (mixed == x.flip(0)).double().mean().item()
        kinds["none" if mixed is x else "cutmix" if math.isclose(kept + taken, 1) else "mixup"] += 1
    assert kinds["none"] == pytest.approx(240, abs=45)
    assert kinds["mixup"] == pytest.approx(180, abs=45) and kinds["cutmix"] == pytest.approx(180, abs=45)
    assert Mixing(mixup=1.0, prob=0.0)(x, y, C, 0, 0)[0] is x


def test_the_host_reads_nothing_from_the_device():
    x, y = (tensor.to("meta") for tensor in batch())
    for mixing in (Mixing(mixup=1.0, smoothing=0.1), Mixing(cutmix=1.0)):
        mixed, p = mixing(x, y, C, 0, 0)
        assert mixed.device.type == p.device.type == "meta" and p.shape == (6, C)


@pytest.mark.parametrize(
    "options",
    [{"mixup": -0.1}, {"cutmix": math.inf}, {"mixup": math.nan}, {"prob": 1.1}, {"smoothing": True}, {"prob": "1"}],
)
def test_bad_settings(options):
    (name,) = options
    with pytest.raises(ArgumentError, match=f"^{name}: got .*; give a number from 0"):
        Mixing(**options)


def test_bad_batches():
    x, y = batch()
    cases = [
        (Mixing(mixup=1.0), (x.long(), y), "^x: is torch.int64; give .*floating-point"),
        (Mixing(cutmix=1.0), (x.flatten(1), y), r"^x: CutMix cuts images \[B, C, H, W\], got shape \[6, 240\]"),
        (Mixing(mixup=1.0), (x, y[:5]), r"^y: got torch.int64 of shape \[5\] for 6 inputs and 5 classes"),
        (Mixing(mixup=1.0), (x, onehot(y)[:, :4]), r"^y: got torch.float64 of shape \[6, 4\]"),
        (Mixing(smoothing=0.1), (x, y + 3), "^y: labels go from 3 to [5-7], but num_classes is 5; give 0 to 4"),
        (Mixing(smoothing=0.1), (x, y - 9), "^y: labels go from -"),
    ]
    for mixing, (given_x, given_y), message in cases:
        with pytest.raises(ArgumentError, match=message):
            mixing(given_x, given_y, C, 0, 0)
    assert Mixing(mixup=0.2, smoothing=0.1, seed=4).describe() == {
        "mixup": 0.2, "cutmix": 0.0, "prob": 1.0, "smoothing": 0.1, "seed": 4,
    }  # fmt: skip


METHODS = {
    "bp": {"blocks": 1},
    "dgl": {"blocks": 3},
    "predsim": {"blocks": 3},
    "predsim sim": {"blocks": 3, "losses": "sim"},
    "auglocal": {"blocks": 4, "depth": 1},
    "infopro": {"blocks": 3, "lam": (1.0, 1.0)},
    "infopro cross_entropy": {"blocks": 3, "lam": (1.0, 1.0), "loss": "cross_entropy"},
}


@pytest.mark.parametrize("case", METHODS)
def test_every_method_trains_on_probabilities(case):
    """Hard probabilities give the losses of their indices; mixed ones give others, finite, and every block moves."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)
    mixed, p = Mixing(mixup=1.0, smoothing=0.1)(x, y, 10, 0, 0)
    hard = Mixing()(x, y, 10, 0, 0)[1]

    def losses(x, target):
        torch.manual_seed(0)
        model = fl.localize(models.create("resnet20"), case.split()[0], sample=x[:2], **METHODS[case])
        engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.1))
        before = [{n: q.clone() for n, q in block.named_parameters()} for block in model.blocks]
        found = torch.stack(list(engine.step(x, target).losses))
        for old, block in zip(before, model.blocks, strict=True):
            assert any(not torch.equal(old[n], q) for n, q in block.named_parameters())
        return found

    torch.testing.assert_close(losses(x, hard), losses(x, y))
    soft = losses(mixed, p)
    assert soft.isfinite().all() and not torch.allclose(soft, losses(mixed, y))
