import functools
import math

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal.errors import ArgumentError
from fastlocal.trainer import CheckpointStore, cosine
from fastlocal.trainer.schedule import NAMES, PerStep, make


def test_warm_up_then_cosine_on_every_block():
    model = fl.localize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "dgl", blocks=2, sample=torch.zeros(2, 4))
    engine = fl.Engine(model, lambda named: torch.optim.SGD(named, lr=0.5))
    scheduler = cosine(engine.optimizer, 12, warmup=2)
    seen = []
    for _ in range(12):
        rates = {group["lr"] for inner in engine.optimizer.blocks for group in inner.param_groups}
        assert len(rates) == 1
        seen += rates
        engine.step(torch.randn(4, 4), torch.tensor([0, 1, 0, 1]))
        scheduler.step()
    expected = [1 / 3, 2 / 3] + [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert seen == pytest.approx([0.5 * factor for factor in expected])
    assert scheduler.get_last_lr()[0] == pytest.approx(0)


def test_the_state_of_a_schedule_continues_it():
    def build():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, cosine(optimizer, 10, 2)

    optimizer, scheduler = build()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    other, resumed = build()
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for o, s in ((optimizer, scheduler), (other, resumed)):
        o.step()
        s.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr() != [1.0]


@pytest.mark.parametrize(("steps", "warmup", "name"), [(0, 0, "steps"), (5, 6, "warmup"), (5, -1, "warmup")])
def test_bad_numbers(steps, warmup, name):
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        cosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), steps, warmup)


# --- make ------------------------------------------------------------------------------------------------------------


def optimizer(*lrs, kind=torch.optim.SGD, **options):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (0.1,)]
    return kind(groups, lr=lrs[0] if lrs else 0.1, **options)


def rates(schedule, epochs, steps, metric=None):
    """The rates of every step, group by group."""
    seen = []
    for epoch in range(epochs):
        for _ in range(steps):
            seen.append(schedule.lrs)
            schedule.optimizer.step()
            schedule.after_step()
        schedule.after_epoch(None if metric is None else metric(epoch))
    return seen


def by_epoch(spec, epochs, lr=0.1):
    return [row[0] for row in rates(make(spec, optimizer(lr), epochs=epochs, steps_per_epoch=1), epochs, 1)]


def half(t, whole, top=0.1, low=0.0):
    return low + (top - low) * math.cos(math.pi / 2 * t / whole) ** 2


# What the authors' functions set, epoch by epoch (24 epochs, lr 0.1), and at epochs of the published runs (lr 0.8).
LOCAL_24 = [
    0.01, 0.01882962913144534, 0.027238795325112867, 0.034990381056766585, 0.0418670668058247, 0.04767766952966369,
    0.05226284287026163, 0.055500000000000015, 0.0573073372946036, 0.05764685702961344, 0.05652630961100259, 0.05,
    0.04347369038899743, 0.03705904774487397, 0.030865828381745525, 0.025000000000000012, 0.01956192854956397,
    0.014644660940672627, 0.010332332985438248, 0.006698729810778065, 0.0038060233744356634, 0.00170370868554659,
    0.0004277569313094809, 0.0,
]  # fmt: skip
AT = (0, 1, 4, 9, 10, 11, -2, -1)
LOCAL_160 = [
    0.01, 0.08896916144962892, 0.3252295562675515, 0.714082700945163, 0.790706352528349, 0.7889479681590706,
    7.710380717407261e-05, 0.0,
]  # fmt: skip
LOCAL_400 = [
    0.01, 0.08899506529926643, 0.3258766457985157, 0.7198902401439261, 0.7985081505971765, 0.798224785841232,
    1.2336942084134606e-05, 0.0,
]  # fmt: skip


@pytest.mark.parametrize("name", ["infopro", "auglocal"])
def test_the_cifar_recipe_is_the_authors_bitwise(name):
    assert by_epoch(name, 24) == LOCAL_24
    for epochs, expected in ((160, LOCAL_160), (400, LOCAL_400)):
        seen = by_epoch(name, epochs, 0.8)
        assert [seen[i] for i in AT] == expected


def test_the_imagenet_recipe_is_the_authors_bitwise():
    expected = [
        0.4, 0.38477590650225735, 0.3414213562373095, 0.276536686473018, 0.2, 0.12346331352698206, 0.05857864376269051,
        0.015224093497742654,
    ]  # fmt: skip
    assert by_epoch("auglocal-imagenet", 8, 0.4) == by_epoch("infopro-imagenet", 8, 0.4) == expected


def test_step_lists_of_predsim_and_dgl():
    seen = by_epoch("predsim", 400, 5e-4)
    assert [seen[i] for i in (0, 199, 200, 299, 300, 350, 374, 375, 399)] == [
        5e-4 * 0.25**n for n in (0, 0, 1, 1, 2, 3, 3, 4, 4)
    ]
    seen = by_epoch("dgl", 50)
    assert [seen[i] for i in (0, 14, 15, 29, 30, 45, 49)] == [
        0.1, 0.1, 0.020000000000000004, 0.020000000000000004, 0.004000000000000001, 0.0008000000000000003,
        0.0008000000000000003,
    ]  # fmt: skip
    assert by_epoch("dgl-imagenet", 30)[::5] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-14)


def test_cosine_of_every_step():
    schedule = make(("cosine", {"min_lr": 0.01}), optimizer(0.1), epochs=3, steps_per_epoch=4)
    assert [r[0] for r in rates(schedule, 3, 4)] == pytest.approx([half(t, 12, low=0.01) for t in range(12)])
    assert schedule.lrs == [0.01]
    schedule.after_step()
    assert schedule.lrs == [0.01]  # after the end it stays


def test_cosine_of_every_epoch():
    schedule = make(("cosine", {"per_step": False}), optimizer(0.1), epochs=3, steps_per_epoch=2)
    assert [r[0] for r in rates(schedule, 3, 2)] == pytest.approx([half(t, 3) for t in (0, 0, 1, 1, 2, 2)])


@pytest.mark.parametrize(("option", "low"), [({"warmup_lr": 0.02}, 0.02), ({"warmup_factor": 0.5}, 0.05), ({}, 1e-5)])
def test_warm_up(option, low):
    """timm's: linear to the top, with the cosine running on beneath; or beginning after it."""
    seen = by_epoch(("cosine", {"warmup_epochs": 4, **option}), 10)
    rise = [low + (0.1 - low) * t / 4 for t in range(4)]
    assert seen == pytest.approx(rise + [half(t, 10) for t in range(4, 10)])
    seen = by_epoch(("cosine", {"warmup_epochs": 4, "warmup_prefix": True, **option}), 10)
    assert seen == pytest.approx(rise + [half(t, 6) for t in range(6)])


def test_warm_up_of_every_step():
    spec = ("constant", {"warmup_epochs": 2, "warmup_lr": 0.0, "per_step": True})
    schedule = make(spec, optimizer(0.1), epochs=3, steps_per_epoch=5)
    assert [r[0] for r in rates(schedule, 3, 5)] == pytest.approx([min(0.1, 0.01 * t) for t in range(15)])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("constant", [0.1] * 6),
        (("step", {"decay_epochs": 2, "decay_rate": 0.5}), [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]),
        (("step", {"decay_epochs": 2, "decay_rate": 0.5, "min_lr": 0.04}), [0.1, 0.1, 0.05, 0.05, 0.04, 0.04]),
        (("multistep", {"milestones": [1, 4]}), [0.1, 0.01, 0.01, 0.01, 0.001, 0.001]),
        (("exponential", {"decay_rate": 0.9}), [0.1 * 0.9**t for t in range(6)]),
        (("poly", {"power": 2.0, "min_lr": 0.01}), [0.01 + 0.09 * (1 - t / 6) ** 2 for t in range(6)]),
        ("poly", [0.1 * (1 - t / 6) for t in range(6)]),
        ("tanh", [0.05 * (1 - math.tanh(-7 + 10 * t / 6)) for t in range(6)]),
        ([(0, 0.1), (2, 0.03), (5, 0.0)], [0.1, 0.1, 0.03, 0.03, 0.03, 0.0]),
        (["multistep", {"milestones": (3,)}], [0.1, 0.1, 0.1, 0.01, 0.01, 0.01]),
    ],
)
def test_shapes(spec, expected):
    assert by_epoch(spec, 6) == pytest.approx(expected, rel=1e-12)


def test_none_leaves_the_rates_to_the_caller():
    opt = optimizer(0.1)
    schedule = make(None, opt, epochs=2, steps_per_epoch=2)
    opt.param_groups[0]["lr"] = 0.7
    assert rates(schedule, 2, 2) == [[0.7]] * 4


@pytest.mark.parametrize("spec", ["cosine", "auglocal", ("constant", {"warmup_epochs": 2}), [(0, 1.0), (2, 0.5)]])
def test_groups_keep_their_proportions(spec):
    for row in rates(make(spec, optimizer(0.1, 0.025, 0.3, 0.0), epochs=4, steps_per_epoch=2), 4, 2):
        assert row == pytest.approx([row[0], row[0] / 4, row[0] * 3, 0.0])


def test_a_list_of_rates_is_absolute_for_the_optimizers_own_rate():
    seen = rates(make([(0, 1.0), (1, 0.5)], optimizer(0.1, 0.05), epochs=2, steps_per_epoch=1), 2, 1)
    assert seen == [[1.0, 0.5], [0.5, 0.25]]


def test_a_tensor_rate_is_written_in_place():
    opt = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    rate = opt.param_groups[0]["lr"]
    schedule = make(("multistep", {"milestones": [1]}), opt, epochs=2, steps_per_epoch=1)
    schedule.after_step()
    schedule.after_epoch()
    assert opt.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.01)


def test_an_epoch_shorter_than_announced():
    schedule = make("cosine", optimizer(0.1), epochs=4, steps_per_epoch=10)
    schedule.after_step()
    schedule.after_epoch()
    assert schedule.lrs == pytest.approx([half(1, 4)])


def test_plateau():
    schedule = make(("plateau", {"patience": 1, "decay_rate": 0.5}), optimizer(0.1, 0.2), epochs=8, steps_per_epoch=1)
    metrics = [0.1, 0.2, 0.2, 0.2, None, 0.2, 0.3, 0.3]
    seen = [row[0] for row in rates(schedule, 8, 1, lambda e: metrics[e])]
    assert seen == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]  # after two epochs without a better one
    assert schedule.lrs[1] == 2 * schedule.lrs[0]
    falling = make(("plateau", {"patience": 0, "mode": "min"}), optimizer(0.1), epochs=3, steps_per_epoch=1)
    assert [r[0] for r in rates(falling, 3, 1, lambda e: [3.0, 2.0, 2.5][e])] == [0.1, 0.1, 0.1]
    assert falling.lrs == pytest.approx([0.01])


def test_onecycle_is_torchs_for_each_group():
    ours, theirs = optimizer(0.1, 0.4, momentum=0.9), optimizer(0.1, 0.4, momentum=0.9)
    schedule = make("onecycle", ours, epochs=3, steps_per_epoch=4)
    expected = torch.optim.lr_scheduler.OneCycleLR(theirs, [0.1, 0.4], total_steps=12)
    for row in rates(schedule, 3, 4):
        assert row == [g["lr"] for g in theirs.param_groups]
        theirs.step()
        expected.step()
    schedule.after_step()  # one more than torch allows


def test_schedulers_of_torch():
    from torch.optim import lr_scheduler as torchs

    def cos(opt):
        return torchs.CosineAnnealingLR(opt, 6)

    expected = [half(t, 6) for t in range(6)]
    assert by_epoch(cos, 6) == pytest.approx(expected)
    assert by_epoch(functools.partial(torchs.CosineAnnealingLR, T_max=6), 6) == pytest.approx(expected)
    schedule = make(PerStep(cos), optimizer(0.1), epochs=2, steps_per_epoch=3)
    assert [row[0] for row in rates(schedule, 2, 3)] == pytest.approx(expected)
    opt = optimizer(0.1)
    assert make(cos(opt), opt, epochs=6, steps_per_epoch=1).lrs == [0.1]
    plateau = make(lambda opt: torchs.ReduceLROnPlateau(opt, patience=0), optimizer(0.1), epochs=3, steps_per_epoch=1)
    assert [r[0] for r in rates(plateau, 3, 1, lambda e: 1.0)] == pytest.approx([0.1, 0.1, 0.01])


SPECS = {
    "none": None,
    "cosine": ("cosine", {"warmup_epochs": 1}),
    "auglocal": "auglocal",
    "list": [(0, 0.1), (2, 0.02)],
    "plateau": ("plateau", {"patience": 0}),
    "onecycle": "onecycle",
    "multistep": lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [1, 3]),
    "exponential": PerStep(lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)),
    "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch)),
    "cyclic": PerStep(lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=3)),
    "restarts": lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [
            torch.optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(opt, 3),
        ],
        [2],
    ),
}


@pytest.mark.parametrize("late", [False, True], ids=["made before the load", "made after"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_resumed_bitwise_through_a_store(name, late, tmp_path):
    """In the middle of an epoch, on an engine's fused optimizer with two groups a block and a rate for each block."""

    def build():
        torch.manual_seed(0)
        model = fl.localize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "dgl", blocks=2, sample=torch.zeros(2, 4))

        def make_optimizer(named):
            lr = 0.1 if named[0][0].startswith("backbone.0") else 0.05
            weights, biases = [p for _, p in named if p.dim() > 1], [p for _, p in named if p.dim() == 1]
            return torch.optim.SGD(
                [{"params": weights}, {"params": biases, "lr": lr / 3}], lr=lr, momentum=0.9, weight_decay=0.01
            )

        return fl.Engine(model, make_optimizer)

    def batch(i):
        gen = torch.Generator().manual_seed(i)
        return torch.randn(4, 4, generator=gen), torch.randint(2, (4,), generator=gen)

    def run(engine, schedule, start, stop):
        seen = []
        for i in range(start, stop):
            seen.append((schedule.lrs, [g["momentum"] for g in engine.optimizer.param_groups]))
            engine.step(*batch(i))
            schedule.after_step()
            if (i + 1) % 3 == 0:
                schedule.after_epoch(0.5)
        return seen

    engine = build()
    schedule = make(SPECS[name], engine.optimizer, epochs=4, steps_per_epoch=3)
    whole = run(engine, schedule, 0, 7)
    store = CheckpointStore(tmp_path)
    store.save(7, engine.model, engine, extra={"schedule": schedule.state_dict()})
    after = run(engine, schedule, 7, 12)
    assert name == "none" or len({str(row) for row in whole + after}) > 1

    other = build()
    resumed = None if late else make(SPECS[name], other.optimizer, epochs=4, steps_per_epoch=3)
    extra = store.load(other.model, other).extra
    if resumed is None:
        resumed = make(SPECS[name], other.optimizer, epochs=4, steps_per_epoch=3)
    resumed.load_state_dict(extra["schedule"])
    assert run(other, resumed, 7, 12) == after
    assert all(torch.equal(p, q) for p, q in zip(engine.model.parameters(), other.model.parameters(), strict=True))
    assert resumed.lrs == schedule.lrs and resumed.state_dict() == schedule.state_dict()


def test_the_state_of_another_schedule_or_optimizer():
    state = make("cosine", optimizer(0.1), epochs=2, steps_per_epoch=1).state_dict()
    with pytest.raises(ArgumentError, match=r"'cosine'.*'poly'"):
        make("poly", optimizer(0.1), epochs=2, steps_per_epoch=1).load_state_dict(state)
    for spec in ("cosine", "onecycle"):
        state = make(spec, optimizer(0.1, momentum=0.9), epochs=2, steps_per_epoch=1).state_dict()
        with pytest.raises(ArgumentError, match="1 parameter groups, the optimizer 2"):
            make(spec, optimizer(0.1, 0.2, momentum=0.9), epochs=2, steps_per_epoch=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosin", "no 'cosin'. Did you mean \"cosine\""),
        (("cosine", {"warm_epochs": 3}), "no option 'warm_epochs'. Did you mean \"warmup_epochs\""),
        (("cosine", {"min_lr": -1}), "min_lr must be a number from 0, got -1"),
        (("cosine", {"per_step": 1}), "per_step must be True or False"),
        (("cosine", {"warmup_epochs": -1}), "warmup_epochs must be a number from 0"),
        (PerStep(torch.optim.lr_scheduler.ReduceLROnPlateau), "without PerStep"),
        (("cosine", {"warmup_epochs": 1, "warmup_lr": 0.1, "warmup_factor": 0.1}), "not both"),
        ("step", "'step' needs decay_epochs"),
        (("step", {"decay_epochs": 0}), "decay_epochs must be above 0"),
        (("multistep", {"milestones": 3}), "milestones must be a list"),
        (("multistep", {"milestones": [3, 1]}), "milestones must rise"),
        (("tanh", {"lb": 3, "ub": 3}), "lb must be below ub"),
        (("auglocal", {"min_lr": 0.1}), "no option 'min_lr'"),
        (("plateau", {"decay_rate": 1.5}), "'plateau' refuses"),
        (("plateau", {"mode": "maximum"}), "'plateau' refuses"),
        (("plateau", {"milestones": []}), "no option 'milestones'"),
        (("onecycle", {"pct_start": 2.0}), "'onecycle' refuses"),
        (("onecycle", {"total_steps": 2}), "no option 'total_steps'"),
        ([(1, 0.1)], "for epoch 0 first"),
        ([], "for epoch 0 first"),
        ([(0, 0.1), (0, 0.2)], "then rising epochs"),
        ([(0, "a")], "an \\(epoch, rate\\)"),
        (3, "got int"),
        (lambda opt: None, "returned NoneType"),
        (lambda opt: torch.optim.lr_scheduler.ConstantLR(optimizer(0.1)), "of another optimizer"),
    ],
)
def test_refusals_of_make(spec, message):
    with pytest.raises(ArgumentError, match=message):
        make(spec, optimizer(0.1, momentum=0.9), epochs=4, steps_per_epoch=2)


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("epochs", 1.5), ("steps_per_epoch", True)])
def test_refusals_of_numbers(name, value):
    with pytest.raises(ArgumentError, match=f"^{name}: got"):
        make("cosine", optimizer(0.1), **{"epochs": 2, "steps_per_epoch": 2, name: value})


def test_per_step_wants_a_function():
    opt = optimizer(0.1)
    with pytest.raises(ArgumentError, match=r"^make: expected a function"):
        PerStep(torch.optim.lr_scheduler.ConstantLR(opt))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_trainings_of_a_few_steps(name, steps):
    """As short as a dry run; warm-ups longer than that only rise."""
    needs = {"step": {"decay_epochs": 3}, "multistep": {"milestones": [9]}, "exponential": {"decay_rate": 0.9}}
    spec = (name, needs.get(name, {}))
    if name in ("cosine", "poly", "constant"):
        spec = (name, {"warmup_epochs": 5})
    seen = rates(make(spec, optimizer(0.1, momentum=0.9), epochs=1, steps_per_epoch=steps), 1, steps, lambda e: 0.5)
    assert len(seen) == steps and all(0 < row[0] <= 0.1 for row in seen)
