"""Golden numbers of official implementations, and how to compare a fastlocal model with them.

Each file of ``tests/data/oracles`` was made by running the official code of the repository and commit it names, in
float64 on the CPU, on parameters filled by a rule that depends on their names only: three training steps, then an
evaluation. It says how in its own "fill_rule", "data", "step", "optimizer" and "layout"; "conditioning" is how much the
numbers move when every initial parameter moves by one unit in the last place, and sets the tolerance.

``check(name, localize, make_step)`` builds our network and heads, maps our tensors to the official names, fills them,
runs the three steps and compares everything the file holds. ``localize`` is ``fastlocal.localize`` or
``plain_localize``; ``make_step`` takes the model and an optimizer factory (list of parameters -> optimizer) and returns
``run_step(x, y) -> StepRecord``.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlocal import models
from fastlocal.blocks.heads import NoHead
from fastlocal.blocks.links import fire
from fastlocal.blocks.losses import cross_entropy
from fastlocal.methods import Method, Site, StepContext, get_method

FOLDER = Path(__file__).parents[1] / "data" / "oracles"


@dataclass
class Case:
    """What to build for an oracle. The last of ``blocks`` blocks has no head."""

    net: Callable[[], nn.Module]
    method: str
    blocks: int
    options: dict[str, Any] = field(default_factory=dict)


def _resnet32() -> nn.Module:
    return models.resnet32()


CASES: dict[str, Case] = {
    "bp_resnet32": Case(_resnet32, "bp", 1),
    **{f"auglocal_resnet32_K16_d{d}": Case(_resnet32, "auglocal", 16, {"depth": d}) for d in (1, 2, 3)},
    "auglocalrepo_dgl_resnet32_K16": Case(_resnet32, "dgl", 16, {"head": "auglocal"}),
    "auglocalrepo_predsim_resnet32_K16": Case(_resnet32, "predsim", 16, {"variant": "auglocal"}),
    "auglocalrepo_infoproce_resnet32_K16": Case(_resnet32, "infopro", 16, {"loss": "cross_entropy"}),
    "infopro_resnet32_K4_contrast": Case(_resnet32, "infopro", 4),
    "infopro_resnet32_K16_contrast": Case(_resnet32, "infopro", 16),
    "dglrepo_cnn_mlpsr_f16": Case(lambda: models.dgl_cnn(feature_size=16), "dgl", 6),
    "dglrepo_cnn_mlpsr_f128": Case(lambda: models.dgl_cnn(feature_size=128), "dgl", 6),
    "man_infopro_resnet32_K8": Case(_resnet32, "man", 8),
    "man_infopro_resnet32_K16": Case(_resnet32, "man", 16),
    "manpp_infopro_resnet32_K16": Case(_resnet32, "man_plus_plus", 16),
    "manpp_dgl_resnet32_K16": Case(_resnet32, "man_plus_plus", 16, {"head": "dgl"}),
    "hpff_infopro_resnet32_K16": Case(_resnet32, "hpff", 16),
    "mlaan_resnet32_K15": Case(_resnet32, "mlaan", 15),
    "localloss_predsim_vgg8b": Case(lambda: models.vgg8b(), "predsim", 8),
    "localloss_predsim_vgg8b_small": Case(lambda: models.vgg8b(feat_mult=0.25, num_hidden=128), "predsim", 8),
}


CASCADES = ("hpff_infopro_resnet32_K16", "mlaan_resnet32_K15")  # their losses reach over several blocks

FULL_SIZE = (
    "dglrepo_cnn_mlpsr_f128",
    "localloss_predsim_vgg8b",
)  # half a minute each; a narrow twin of each is in CASES


@dataclass
class StepRecord:
    """One training step of K blocks; None for what a runner cannot say.

    ``losses``: what backward started from, per block. ``terms``: as in LocalLoss, per block. ``logits``: of the whole
    net, in training. ``gradients``: before the update, by the names of ``named_tensors``.
    """

    losses: list[Tensor]
    terms: list[dict[str, tuple[Tensor, float]]] | None = None
    logits: Tensor | None = None
    gradients: dict[str, Tensor | None] | None = None


MakeStep = Callable[
    [Any, Callable[[list[nn.Parameter]], torch.optim.Optimizer]], Callable[[Tensor, Tensor], StepRecord]
]


def load(name: str) -> dict[str, Any]:
    with gzip.open(FOLDER / f"{name}.json.gz", "rt") as file:
        return json.load(file)


# --- a plain model and step, to check the heads without the library's own ---------------------------------------------


@dataclass
class PlainBlock:
    name: str
    fns: list[Callable[[Tensor], Tensor]]


class PlainModel:
    """Backbone, heads, blocks, method and links, as a LocalModel has them."""

    def __init__(
        self,
        backbone: nn.Module,
        heads: list[nn.Module],
        blocks: list[PlainBlock],
        method: Method,
        links: Sequence[Any],
    ) -> None:
        self.backbone, self.heads, self.blocks, self.method = backbone, nn.ModuleList(heads), blocks, method
        self.links = links


def plain_localize(
    net: nn.Module, method: str, *, blocks: int, sample: Tensor, mode: str = "paper", **options: Any
) -> PlainModel:
    """Cuts at every unit, or where the method's table says; no other partition."""
    recipe = get_method(method)(mode, **options)
    units = net.units()
    names = [name for name, _ in units]
    keep = recipe.prepare(blocks, len(units))
    cuts = recipe.cuts(keep, names, net)
    if cuts is None:
        assert blocks in (1, len(units))
        cuts = list(range(keep - 1))
    ends = [*cuts, len(units) - 1]
    starts = [0, *(c + 1 for c in cuts)]
    shapes = []
    h = sample
    with torch.no_grad():
        for _, fn in units:
            h = fn(h)
            shapes.append(tuple(h.shape[1:]))
        classes = net.readout(h).shape[-1]
    sites = [
        Site(
            index=k,
            blocks=len(ends),
            unit=ends[k],
            units=len(units),
            name=names[ends[k]],
            shape=shapes[ends[k]],
            input_shape=tuple(sample.shape[1:]),
            num_classes=classes,
            dense=False,
            widths=net.widths,
            net=net,
            first_unit=starts[k],
            unit_names=tuple(names),
        )
        for k in range(len(cuts))
    ]
    recipe.resolve(sites)
    heads = [recipe.head(site).to(sample.dtype) for site in sites]
    links = recipe.links(sites, heads)
    parts = [PlainBlock(names[end], [fn for _, fn in units[start : end + 1]]) for start, end in zip(starts, ends)]
    return PlainModel(net, heads, parts, recipe, links)


def plain_step(
    model: PlainModel, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> Callable[[Tensor, Tensor], StepRecord]:
    """Detach between blocks, one backward per block, one optimizer step at the end."""
    opt = optimizer([*model.backbone.parameters(), *model.heads.parameters()])

    def run(x: Tensor, y: Tensor) -> StepRecord:
        model.backbone.train()
        model.heads.train()
        opt.zero_grad(set_to_none=True)
        ctx = StepContext(target=y, input=x, criterion=cross_entropy)
        losses, terms = [], []
        for k, block in enumerate(model.blocks):
            x = x.detach()
            for fn in block.fns:
                x = fn(x)
            if k < len(model.heads):
                local = model.heads[k](x, ctx)
                loss = local.loss
                terms.append(local.terms)
            else:
                logits = model.backbone.readout(x)
                task = ctx.criterion(logits, y)
                loss = task * model.method.final_weight
                terms.append({"task": (task.detach(), model.method.final_weight)})
            fire(model.links, "between_forward_and_backward", k)
            loss.backward()
            fire(model.links, "after_backward", k)
            losses.append(loss.detach())
        gradients = {
            name: None if p.grad is None else p.grad.clone()
            for name, p in named_tensors(model)
            if isinstance(p, nn.Parameter)
        }
        opt.step()
        return StepRecord(losses, terms, logits.detach(), gradients)

    return run


# --- names ------------------------------------------------------------------------------------------------------------


def named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, as ``backbone.*`` and ``heads.{k}.*``."""
    for prefix, module in (("backbone.", model.backbone), ("heads.", model.heads)):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield prefix + name, tensor


def _family_name(unit: str) -> str:
    """``stem`` -> ``0_0``, ``layer2.1`` -> ``2_1``."""
    return "0_0" if unit == "stem" else unit.removeprefix("layer").replace(".", "_")


def _man_prefixes(k: int, unit: str, scaled: bool) -> dict[str, str]:
    """MAN's and MAN++'s: the copies by number, the heads by the unit after the cut, as a ResNet-32 has it."""
    of_stem = unit == "stem"
    stage, _, index = unit.removeprefix("layer").partition(".")
    after = "0_0" if of_stem else f"{int(stage) + 1}_0" if index == "4" else f"{stage}_{int(index) + 1}"
    copy = "_first" if of_stem else f".{k - scaled}"
    return {
        "fusion.lb.": f"LB{copy}.",
        "fusion.ema.": f"EMA{copy}." if of_stem else f"EMA_Net{copy}.",
        "head.decoder.": f"decoder_{after}.",
        "head.classifier.": f"aux_classifier_{after}.",
        "head.net.": f"aux_classifier_{after}.",
    }


def _hpff_prefixes(unit: str) -> dict[str, str]:
    name = f"{_family_name(unit)}."
    return {
        "own.classifier.": f"net_classifier_{name}",
        "shared.decoder.": f"aux_decoder_{name}",
        "shared.classifier.": f"aux_classifier_{name}",
    }


def _mlaan_prefixes(k: int, unit: str, units: int) -> dict[str, str]:
    """``units``: of the chain, whose first is there twice."""
    name = _family_name(unit)
    return {
        "own.net.": f"net_classifier_{name}.",
        "shared.net.0.lb.": f"Aug_Net.{k}.0.",
        "shared.net.0.ema.": f"EMA_Net.{k}.0.",
        **{f"shared.net.{j}.": f"Aug_Net.{k}.{j}." for j in range(1, units)},
        f"shared.net.{units + 1}.": f"aux_classifier_{name}_{k}.",
    }


def _head_prefixes(case: str, method: str, k: int, unit: str) -> dict[str, str]:
    """Which official module holds what in head k: our prefix -> official prefix."""
    if method in ("man", "man_plus_plus"):
        return _man_prefixes(k, unit, method == "man_plus_plus")
    if method == "hpff":
        return _hpff_prefixes(unit)
    if case.startswith("dglrepo"):
        return {"net.": f"auxillary_nets.{k}."}
    if case.startswith("localloss"):
        return {"pred.": f"{unit}.decoder_y.", "sim.": f"{unit}.{'conv' if 'features' in unit else 'linear'}_loss."}
    aux, decoder = (f"{part}_{_family_name(unit)}." for part in ("aux_classifier", "decoder"))
    return {
        "auglocal": {"net.": aux},
        "dgl": {"net.": aux},
        "predsim": {"pred.": aux, "sim.": decoder},
        "infopro": {"decoder.": decoder, "classifier.": aux},
    }[method]


def official_names(case: str, model: Any, oracle: dict[str, Any]) -> dict[str, str]:
    """Our name -> official name, for every parameter and every BatchNorm buffer of the model.

    Inside one official module, tensors are matched in order of registration; kind and shape must agree.
    """
    listed = [(name, tuple(shape)) for name, shape in oracle["parameters"] + oracle["buffers"]]
    unused = {
        name for name, _ in listed if case.startswith("dglrepo") and ".bn." in name
    }  # the repository never runs them
    mapping: dict[str, str] = {}

    def match(ours: list[tuple[str, Tensor]], prefix: str) -> None:
        for kinds in (("weight", "bias"), ("running_mean",), ("running_var",), ("num_batches_tracked",)):
            theirs = [
                (name, shape)
                for name, shape in listed
                if name.startswith(prefix) and name not in unused and name.rsplit(".", 1)[-1] in kinds
            ]
            own = [(name, t) for name, t in ours if name.rsplit(".", 1)[-1] in kinds]
            assert len(own) == len(theirs), (prefix, kinds, [n for n, _ in own], theirs)
            for (name, tensor), (official, shape) in zip(own, theirs):
                assert name.rsplit(".", 1)[-1] == official.rsplit(".", 1)[-1], (name, official)
                assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), official, shape)
                mapping[name] = official

    tensors = list(named_tensors(model))
    shapes = dict(listed)
    for name, tensor in tensors:
        if name.startswith("backbone."):
            official = name.removeprefix("backbone.")
            if case.startswith("dglrepo") and official.startswith("classifier."):
                official = "auxillary_nets.5." + official
            if case.startswith(("man", "hpff", "mlaan")) and official.startswith("fc."):
                official = "fc64." + official.removeprefix("fc.")
            assert shapes[official] == tuple(tensor.shape), (official, shapes[official], tuple(tensor.shape))
            mapping[name] = official
    for k in range(len(model.heads)):
        if isinstance(model.heads[k], NoHead):
            continue
        unit = model.blocks[k].name
        if case.startswith("mlaan"):
            prefixes = _mlaan_prefixes(k, unit, len(model.heads[k].shared.net) - 2)
        else:
            prefixes = _head_prefixes(case, CASES[case].method, k, unit)
        for ours, theirs in prefixes.items():
            prefix = f"heads.{k}.{ours}"
            own = [(name, t) for name, t in tensors if name.startswith(prefix)]
            if own or not case.startswith("man"):  # MAN's heads are of two kinds
                match(own, theirs)
        if f"heads.{k}.fusion.scale" in dict(tensors):
            mapping[f"heads.{k}.fusion.scale"] = "ema_s_first" if k == 0 else f"ema_s.{k - 1}"
    assert len(set(mapping.values())) == len(mapping)
    leftover = {name for name, _ in tensors} - set(mapping)
    assert {name.rsplit(".", 1)[-1] for name in leftover} <= {"mean", "std"}, leftover  # constants of ours
    return mapping


def official_value(name: str, shape: tuple[int, ...]) -> Tensor:
    """The fill rule of the oracles."""
    if name.endswith("running_var"):
        return torch.ones(shape, dtype=torch.float64)
    if name.endswith(("running_mean", "num_batches_tracked")):
        return torch.zeros(shape, dtype=torch.float64)
    if not shape:  # MAN++'s scales
        return torch.ones(shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    r = torch.randn(shape, generator=generator, dtype=torch.float64)
    if len(shape) >= 2:
        return r * (0.5 * math.sqrt(2.0 / (r.numel() / shape[0])))
    return 1.0 + 0.1 * r if name.endswith("weight") else 0.1 * r


def make_batch(oracle: dict[str, Any], step: int) -> tuple[Tensor, Tensor]:
    data = oracle["data"]
    x = torch.randn(data["shape"], generator=torch.Generator().manual_seed(data["x_seed"] + step), dtype=torch.float64)
    rows = data["shape"][0]
    y = torch.randint(0, data["label_high"], (rows,), generator=torch.Generator().manual_seed(data["y_seed"] + step))
    if data["clamp_image_to"] is not None:
        mean = torch.tensor([125.3, 123.0, 113.9], dtype=torch.float64).div(255.0).view(1, 3, 1, 1)
        std = torch.tensor([63.0, 62.1, 66.7], dtype=torch.float64).div(255.0).view(1, 3, 1, 1)
        low, high = data["clamp_image_to"]
        x = torch.minimum(torch.maximum(x, (low - mean) / std), (high - mean) / std)
    return x, y


def make_optimizer(oracle: dict[str, Any], params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The oracle's optimizer over ``params``. Where the official code has one per layer, they are alike."""
    o = oracle["optimizer"]
    if o["type"] == "SGD":
        return torch.optim.SGD(
            params, lr=o["lr"], momentum=o["momentum"], nesterov=o["nesterov"], weight_decay=o["weight_decay"]
        )
    assert o["type"] == "Adam"
    return torch.optim.Adam(params, lr=o["lr"], betas=tuple(o["betas"]), eps=o["eps"], weight_decay=o["weight_decay"])


# --- comparison -------------------------------------------------------------------------------------------------------


class Comparison:
    """Collects the largest deviation per quantity, in units of its tolerance; a value above 1 fails at once."""

    def __init__(self, case: str) -> None:
        self.case = case
        self.worst: dict[str, float] = {}

    def close(self, what: str, ours: float, theirs: float, allowed: float, where: str = "") -> None:
        ratio = abs(ours - theirs) / allowed if allowed > 0 else (0.0 if ours == theirs else math.inf)
        assert ratio <= 1, (
            f"{self.case}, {what} {where}: {ours!r}, official {theirs!r}, {ratio:.3g} times the tolerance"
        )
        self.worst[what] = max(self.worst.get(what, 0.0), ratio)

    def relative(self, what: str, ours: float, theirs: float, tolerance: float, where: str = "") -> None:
        self.close(what, ours, theirs, tolerance * (1 + abs(theirs)), where)


def _tolerance(conditioning: float) -> float:
    return max(1e-9, 100 * conditioning)


# Official term name -> ours. In the InfoPro family, PredSim too calls its parts decoder and aux_classifier.
def _term(case: Case, official: str, last: bool) -> str:
    if last:
        return "task"
    if official.endswith(("/pred", "/sim")):
        return official.rsplit("/", 1)[-1]
    if case.method == "predsim":
        return "sim" if official.startswith("decoder") else "pred"
    if case.method in ("man", "man_plus_plus") and case.options.get("head") != "dgl":
        contrast = official == "aux_classifier_0_0"
        return "reconstruction" if official.startswith("decoder") else ("contrast" if contrast else "task")
    if case.method == "infopro":
        contrast = case.options.get("loss", "contrast") == "contrast"
        return "reconstruction" if official.startswith("decoder") else ("contrast" if contrast else "task")
    return "task"


def _check_losses(compare: Comparison, record: StepRecord, golden: dict[str, Any], tolerance: float) -> None:
    case = CASES[compare.case]
    if compare.case in CASCADES:  # the first block has no loss of its own, and no entry
        assert float(record.losses[0]) == 0 and record.terms is None
        record = replace(record, losses=record.losses[1:])
    assert len(record.losses) == len(golden["blocks"])
    for k, (loss, block) in enumerate(zip(record.losses, golden["blocks"])):
        where = f"block {k}"
        compare.relative("loss", float(loss), block["total"], tolerance, where)
        if record.terms is None:
            continue
        ours = record.terms[k]
        assert len(ours) == len(block["terms"])
        for (name, value), weight in zip(block["terms"], block["weights"]):
            own_value, own_weight = ours[_term(case, name, k == len(record.losses) - 1)]
            weighted = compare.case.startswith("localloss") and weight == 1.0  # its file holds weighted terms
            scale = own_weight if weighted else 1.0
            compare.relative("term", float(own_value) * scale, value, tolerance, f"{where} {name}")
            if not weighted:
                compare.close("weight", own_weight, weight, 1e-12, f"{where} {name}")
    if record.logits is not None:
        for ours_, theirs in zip(record.logits[0, :5].tolist(), golden["logits_0_5"]):
            compare.relative("logits", ours_, theirs, tolerance)


def _check_gradients(compare: Comparison, record: StepRecord, names: dict[str, str], oracle: dict[str, Any]) -> None:
    golden = dict(zip((n for n, _ in oracle["parameters"]), oracle["steps"][0]["grad_norm"]))
    noise = set(oracle["conditioning"]["rounding_only_gradients"])
    tolerance = _tolerance(oracle["conditioning"]["grad_norm_step0"])
    for official in set(golden) - set(names.values()):
        assert golden[official] is None, f"{official} is trained officially but has no counterpart"
    if record.gradients is None:
        return
    for name, gradient in record.gradients.items():
        official = names[name]
        assert (gradient is None) == (golden[official] is None), official
        if gradient is None:
            continue
        if official in noise:
            compare.close("gradient (zero)", float(gradient.norm()), golden[official], 1e-10, official)
        else:
            compare.relative("gradient", float(gradient.norm()), golden[official], tolerance, official)


def _check_state(
    compare: Comparison, model: Any, names: dict[str, str], golden: dict[str, Any], oracle: dict[str, Any], step: int
) -> None:
    conditioning = oracle["conditioning"]
    norms = dict(zip((n for n, _ in oracle["parameters"]), zip(golden["param_norm"], golden["param_sum"])))
    stats = dict(zip(oracle["bn_stats_order"], zip(golden["bn_norm"], golden["bn_sum"])))
    for name, tensor in named_tensors(model):
        tensor = tensor.detach()
        official = names.get(name, "")
        table, what = (norms, "parameter") if official in norms else (stats, "statistic")
        if official not in table:
            continue
        norm, total = table[official]
        figure = conditioning["param_norm_per_step"][step] if what == "parameter" else conditioning["bn_norm_last_step"]
        compare.relative(f"{what} norm", float(tensor.norm()), norm, _tolerance(figure), official)
        compare.close(f"{what} sum", float(tensor.sum()), total, 1e-9 * norm * math.sqrt(tensor.numel()), official)


def check(name: str, localize: Callable[..., Any], make_step: MakeStep) -> dict[str, float]:
    """Runs oracle ``name``, asserts that all agrees, returns the largest deviation over tolerance per quantity."""
    oracle, case = load(name), CASES[name]
    compare = Comparison(name)
    torch.manual_seed(0)
    sample, _ = make_batch(oracle, 0)
    net = case.net().double()
    model = localize(net, case.method, blocks=case.blocks, sample=sample[:2], mode="official", **case.options)
    model.heads.double()
    names = official_names(name, model, oracle)

    order = {n: i for i, (n, _) in enumerate(oracle["parameters"])}
    with torch.no_grad():
        for own, tensor in named_tensors(model):
            if own in names:
                tensor.copy_(official_value(names[own], tuple(tensor.shape)))
                if names[own] in order:
                    i = order[names[own]]
                    compare.relative("filled", float(tensor.norm()), oracle["initial"]["norm"][i], 1e-12, own)
                    compare.relative("filled", float(tensor.sum()), oracle["initial"]["sum"][i], 1e-11, own)

    run_step = make_step(model, lambda params: make_optimizer(oracle, params))
    for step, golden in enumerate(oracle["steps"]):
        x, y = make_batch(oracle, step)
        assert y.tolist() == golden["y"]
        compare.relative("input", float(x.sum()), golden["x_sum"], 1e-11)
        compare.relative("input", float(x.norm()), golden["x_norm"], 1e-12)
        record = run_step(x, y)
        _check_losses(compare, record, golden, _tolerance(oracle["conditioning"]["losses_logits_per_step"][step]))
        if step == 0:
            _check_gradients(compare, record, names, oracle)
        _check_state(compare, model, names, golden, oracle, step)

    tracked = dict(oracle["num_batches_tracked"])
    for own, tensor in named_tensors(model):
        if own.endswith("num_batches_tracked"):
            assert int(tensor) == tracked[names[own]], own
    x, _ = make_batch(oracle, 0)
    with torch.no_grad():
        logits = model.backbone.eval()(x)
    tolerance = _tolerance(oracle["conditioning"]["eval_logits"])
    for own_row, row in zip(logits.tolist(), oracle["eval"]["logits"]):
        for ours, theirs in zip(own_row, row):
            compare.relative("eval logits", ours, theirs, tolerance)
    return compare.worst
