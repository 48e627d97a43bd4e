"""What all networks of fl.compat share: modules, modes, copies, devices, loss weights, and clear errors."""

import copy
import io
import pickle
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastlocal as fl
from fastlocal.compat import auglocal, infopro
from fastlocal.compat._official import AvgPool, in_layout, interpolated
from fastlocal.errors import ArgumentError

WEIGHTS = {"ixx_1": 5, "ixy_1": 0.5, "ixx_2": 0.25, "ixy_2": 2}


def small(module=infopro, **kwargs):
    torch.manual_seed(0)
    if module is auglocal:
        options = {"rule": "PredSim", "aux_net_config": "PredSim", "local_module_num": 4} | kwargs
    else:
        options = {"local_module_num": 3, "local_loss_mode": "cross_entropy"} | kwargs
    return module.resnet32(batch_size=4, **options)


def batch(seed=0, n=4):
    torch.manual_seed(seed)
    return torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))


def gradients(network):
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def one_step(network, x, y, **weights):
    network.train().zero_grad()
    logits, loss, *_ = network(img=x, target=y, **(weights or WEIGHTS))
    return logits, loss, gradients(network)


@pytest.mark.parametrize("module", [auglocal, infopro])
def test_the_local_model_runs_the_registered_modules(module):
    network = small(module)
    assert {id(p) for p in network.parameters()} == {id(p) for p in network.local.parameters()}
    assert not any(name.startswith("_local") or name.startswith("local.") for name in network.state_dict())
    assert network.local.training and not network.eval().local.training and network.train().local.training


def test_gradients_are_added_like_those_of_backward():
    network, (x, y) = small(), batch()
    once = one_step(network, x, y)[2]
    network(x, y, **WEIGHTS)
    for name, g in gradients(network).items():
        torch.testing.assert_close(g, 2 * once[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("module", [auglocal, infopro])
def test_loss_weights_of_each_call_count(module):
    x, y = batch()
    other = {"ixx_1": 0.5, "ixy_1": 1, "ixx_2": 2, "ixy_2": 0}
    network = small(module)
    one_step(network, x, y)
    changed = one_step(network, x, y, **other)[2]
    fresh = one_step(small(module), x, y, **other)[2]
    before = one_step(small(module), x, y)[2]
    assert changed.keys() == fresh.keys() == before.keys()
    for name, g in fresh.items():
        torch.testing.assert_close(changed[name], g, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(before["conv1.weight"], fresh["conv1.weight"], rtol=1e-2)
    # a gradient is linear in the weights
    parts = [
        one_step(small(module), x, y, **{k: other[k] * (k[:3] == kind) for k in other})[2] for kind in ("ixx", "ixy")
    ]
    name = "conv1.weight"
    torch.testing.assert_close(parts[0][name] + parts[1][name], fresh[name], rtol=1e-3, atol=1e-5)


def test_weights_go_linearly_from_the_first_head_to_the_last():
    assert interpolated(3, 1, 2, 3, 6) == [(1, 2), (2, 4), (3, 6)]
    assert interpolated(1, 1, 2, 3, 6) == [(1, 2)]
    assert interpolated(0, 1, 2, 3, 6) == []


def test_the_official_defaults_of_the_weights_are_zero():
    network, (x, y) = small(), batch()
    network.train()
    network(x, y)
    assert float(network.conv1.weight.grad.norm()) == 0 and float(network.fc.weight.grad.norm()) > 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_whole_and_of_their_own(how):
    network, (x, y) = small(), batch()
    if how == "deepcopy":
        twin = copy.deepcopy(network)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(network))
    else:
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert list(twin.state_dict()) == list(network.state_dict())
    assert {id(p) for p in twin.parameters()} == {id(p) for p in twin.local.parameters()}
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}
    want, got = one_step(network, x, y), one_step(twin, x, y)
    assert torch.equal(want[0], got[0]) and all(torch.equal(g, got[2][n]) for n, g in want[2].items())


def test_moves_take_the_constants_of_the_heads_along():
    network = small().to(torch.float64)
    head = network.local.heads[0]
    assert all(t.dtype == torch.float64 for t in (*network.parameters(), head.mean, head.std))
    assert head.mean.flatten().tolist() == [125.3 / 255, 123.0 / 255, 113.9 / 255]  # not those rounded to float32
    x, y = batch()
    logits, loss, grads = one_step(network, x.double(), y)
    assert logits.dtype == loss.dtype == torch.float64 and all(g.dtype == torch.float64 for g in grads.values())
    meta = network.to("meta")
    assert all(t.is_meta for t in (*meta.local.parameters(), *meta.local.buffers()))


def test_maps_are_channels_last_on_a_cpu_only():
    network, (x, y) = small().double(), batch()
    assert network.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    network.layer2[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    grads = one_step(network, x.double(), y)[2]
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    twin = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # who wants the other layout gets it
    assert twin.layer1[0].conv1.weight.is_contiguous()
    for name, g in one_step(twin, x.double(), y)[2].items():
        torch.testing.assert_close(grads[name], g, rtol=1e-8, atol=1e-9, msg=name)
    assert all(p.is_contiguous() for p in network.to("meta").parameters())


def test_half_of_the_network_may_be_frozen():
    network, (x, y) = small(), batch()
    network.layer1.requires_grad_(False)
    grads = one_step(network, x, y)[2]
    assert not any(name.startswith("layer1.") for name in grads) and "conv1.weight" in grads and "fc.weight" in grads


def test_data_parallel_without_devices_passes_through():
    network, (x, y) = small(), batch()
    want = one_step(network, x, y)
    wrapped = nn.DataParallel(network)
    network.zero_grad()
    logits, _loss = wrapped(img=x, target=y, **WEIGHTS)
    assert torch.equal(logits, want[0])
    assert next(iter(wrapped.state_dict())) == "module.conv1.weight"


def test_data_parallel_with_several_devices_is_refused():
    with pytest.raises(ArgumentError, match=r"one device.*DistributedDataParallel\(model\.local\)"):
        small()._replicate_for_data_parallel()


def test_distributed_data_parallel_takes_the_local_model(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        network, (x, y) = small(), batch()
        want = one_step(network, x, y)[2]
        with pytest.raises(ArgumentError, match=r"wrap model\.local"):
            nn.parallel.DistributedDataParallel(network)(x, y, **WEIGHTS)
        network.zero_grad()
        nn.parallel.DistributedDataParallel(network.local)(x, y).loss.backward()
        got = gradients(network)
    finally:
        torch.distributed.destroy_process_group()
    assert got.keys() == want.keys()
    for name, g in want.items():
        torch.testing.assert_close(got[name], g, rtol=1e-5, atol=1e-7, msg=name)


def test_an_engine_takes_the_same_steps():
    def sgd(params):
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)

    network, (x, y) = small(), batch()
    twin = copy.deepcopy(network)
    optimizer = sgd(network.parameters())
    twin.set_loss_weights(**WEIGHTS)
    engine = fl.Engine(twin.local, lambda named: sgd([p for _, p in named]))
    for _ in range(2):
        one_step(network, x, y)
        optimizer.step()
        engine.step(x, y)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_evaluation_is_the_backbone_and_leaves_no_trace():
    network, (x, y) = small(auglocal), batch()
    network.eval()
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        logits, loss, *rest = network(img=x, target=y)
    assert rest == [[], [], []] and not logits.requires_grad
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, y))
    assert torch.equal(logits, network.local.backbone(x))
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert network(x)[1] is None and network(x)[0].requires_grad
    assert small(infopro).eval()(x)[1] is None


def test_training_under_no_grad_fails_as_officially():
    network, (x, y) = small(), batch()
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        network(x, y, **WEIGHTS)


@pytest.mark.parametrize("training", [True, False])
def test_features_of_all_units(training):
    network, (x, y) = small(auglocal).train(training), batch()
    *_, features = network(x, y, **WEIGHTS, return_features=True)
    shapes = [tuple(f.shape[1:]) for f in features]
    assert shapes == [(16, 32, 32)] * 6 + [(32, 16, 16)] * 5 + [(64, 8, 8)] * 5 + [(10,)]
    assert not any(f.requires_grad for f in features)
    stem = torch.relu(network.bn1(network.conv1(x)))
    torch.testing.assert_close(features[0], stem)
    torch.testing.assert_close(features[2], network.layer1[1](network.layer1[0](stem)))
    assert len(network(x, y, **WEIGHTS)) == 5
    assert not network.layer1[0]._forward_pre_hooks and not network.layer3[4]._forward_hooks


@pytest.mark.parametrize("config", ["unifSamp", "DGL", "InfoPro", "PredSim", "0c1f"])
def test_registered_containers_compute_what_their_heads_do(config):
    network = small(auglocal, aux_net_config=config, hidden_dim=128, aux_net_depth=2).double().eval()
    h = torch.randn(3, 16, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(network.aux_classifier_0_0.head(h), network.local.heads[0].pred(h))
    decoder = small(infopro).eval()
    torch.testing.assert_close(decoder.aux_classifier_1_4.head(h.float()), decoder.local.heads[0].classifier(h.float()))


def test_a_replaced_module_is_refused():
    x, y = batch()
    for change in (lambda net: setattr(net, "fc", nn.Linear(64, 10)), nn.SyncBatchNorm.convert_sync_batchnorm):
        network = small()
        change(network)
        for mode in (True, False):
            with pytest.raises(ArgumentError, match="replaced after construction"):
                network.train(mode)(x, y, **WEIGHTS)


def test_a_target_is_needed_in_training():
    with pytest.raises(ArgumentError, match=r"target: .*model\.eval\(\)"):
        small()(batch()[0])


def test_initial_values_follow_the_official_distributions():
    network = small(auglocal, rule="InfoPro", aux_net_config="unifSamp", aux_net_config_aux_loss="2c", aux_net_depth=3)
    for name, m in network.named_modules():
        if isinstance(m, nn.Conv2d):
            deviation = (2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)) ** 0.5
            if m.weight.numel() > 2000:
                assert m.weight.std().item() == pytest.approx(deviation, rel=0.1), name
            assert m.bias is None or m.bias.abs().sum() > 0, name  # as torch draws it
        elif isinstance(m, nn.BatchNorm2d):
            assert m.weight.eq(1).all() and m.bias.eq(0).all(), name
        elif isinstance(m, nn.Linear):
            bound = m.in_features**-0.5
            assert 0.9 * bound < m.weight.abs().max().item() <= bound, name
    assert any(isinstance(m, nn.Conv2d) and m.bias is not None for m in network.modules())


@pytest.mark.parametrize(
    ("depth", "blocks", "counts"), [(3, 13, {3: 6, 2: 6}), (5, 50, {5: 12, 4: 25, 3: 12}), (0, 5, {1: 4})]
)
def test_depth_of_the_heads_falls_as_officially(depth, blocks, counts):
    recipe = auglocal.Auxiliary(depth=depth, pyramid=True, pyramid_coeff=0.5)
    depths = [recipe.depth_at(SimpleNamespace(index=i, blocks=blocks)) for i in range(blocks - 1)]
    assert Counter(depths) == counts and depths == sorted(depths, reverse=True)


def test_layouts():
    linear, conv = nn.Linear(2, 3), nn.Conv2d(1, 2, 1)
    assert [type(m).__name__ for m in in_layout([conv, AvgPool(), linear])] == [
        "Conv2d",
        "AdaptiveAvgPool2d",
        "Flatten",
        "Linear",
    ]
    laid = in_layout([conv, nn.ReLU(), AvgPool(), linear], nn.Identity(), None, nn.Flatten(), None, also=[nn.Sigmoid()])
    assert laid[1] is conv and laid[3] is linear and len(laid) == 5
    with pytest.raises(AssertionError, match="1 places for 2 modules"):
        in_layout([conv, linear], None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small(auglocal, local_module_num=17), "local_module_num: got 17; resnet32 has 16 units"),
        (lambda: small(auglocal, aux_net_config="1c2f"), "aux_net_config: got '1c2f'"),
        (lambda: small(auglocal, aux_net_config="0c1f", aux_net_widen=2), "aux_net_widen: got 2"),
        (lambda: small(auglocal, wide_list=(32, 32, 64, 128)), "wide_list: got"),
        (lambda: small(infopro, local_module_num=5), "local_module_num: got 5; .* into 1, 2, 3, 4, 8, 16 of blocks"),
        (lambda: small(infopro, balanced_memory=True), "balanced_memory on cifar10 into no number of blocks"),
        (lambda: infopro.resnet101(pretrained=True), "pretrained: weights are not downloaded"),
        (lambda: auglocal.resnet34(local_module_num=4), "local_module_num: got 4; .* into 1 or 17 blocks"),
        (lambda: auglocal.resnet34(local_module_num=17, groups=2), "groups, width_per_group: a BasicBlock"),
    ],
)
def test_arguments_that_no_official_network_has_are_refused(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


def test_scripts_find_the_factories_where_they_look():
    assert auglocal.resnet.resnet110 is auglocal.resnet110 and auglocal.vgg.vgg13 is auglocal.vgg13
    assert infopro.resnet.resnext101_32x8d is infopro.resnext101_32x8d
    assert fl.compat.auglocal is auglocal
    with pytest.raises(AttributeError, match="no attribute 'auglokal'"):
        _ = fl.compat.auglokal


# --- ImageNet ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return auglocal.ResNet(auglocal.BasicBlock, [1, 1, 1, 1], "tiny", local_module_num=5, num_classes=7)


PLACES = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]


def test_block_by_block_gives_the_gradients_of_the_whole_step(tiny):
    criterion = nn.CrossEntropyLoss()
    tiny.train().zero_grad()
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, 64, 64), torch.randint(0, 7, (4,))
    logits, loss, record, last = tiny(x=x, target=y, criterion=criterion)
    assert [tuple(scores.shape) for scores in record] == [(4, 1000)] * 4 and isinstance(last, float)
    assert all(p.grad is None for p in tiny.parameters())
    (2 * loss).backward()
    whole = gradients(tiny)
    tiny.zero_grad()
    tiny.layerwise_train = True
    h, total, scores = x, 0.0, []
    for stage, layer in PLACES:
        h, one, scores = tiny(
            x=h, target=y, criterion=criterion, stage_i=stage, layer_i=layer, hidden_logits_record=scores
        )
        one.backward()
        total += one.item()
    tiny.layerwise_train = False
    assert total == pytest.approx(loss.item(), rel=1e-5) and one.item() == pytest.approx(last, rel=1e-5)
    torch.testing.assert_close(h, logits, rtol=1e-4, atol=1e-5)
    for a, b in zip(scores, record, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, g in gradients(tiny).items():
        torch.testing.assert_close(2 * g, whole[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_scripts_criterion_is_that_of_the_last_block_only(tiny):
    tiny.train()
    x, y = torch.randn(4, 3, 64, 64), torch.randint(0, 7, (4,))
    logits, loss, record, last = tiny(x=x, target=y, criterion=nn.CrossEntropyLoss(label_smoothing=0.3))
    smoothed = nn.functional.cross_entropy(logits, y, label_smoothing=0.3).item()
    assert last == pytest.approx(smoothed, rel=1e-5)
    heads = sum(nn.functional.cross_entropy(scores, y).item() for scores in record)
    assert loss.item() == pytest.approx(smoothed + heads, rel=1e-5)


def test_evaluation_of_imagenet_networks_gives_logits(tiny):
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert tuple(tiny.eval()(x).shape) == (2, 7)
    with pytest.raises(ArgumentError, match="target: "):
        tiny.train()(x)
    tiny.layerwise_train = True
    with pytest.raises(ArgumentError, match="stage_i, layer_i: got 4 and 1"):
        tiny(x, torch.tensor([0, 1]), stage_i=4, layer_i=1)
    tiny.layerwise_train = False


def test_infopro_imagenet_wants_its_two_calls():
    torch.manual_seed(0)
    network = infopro.ResNet(
        infopro.Bottleneck, [1, 1, 1, 1], k2_infopro=0, groups=4, width_per_group=32, num_classes=7
    )
    assert network.layer1[0].conv2.groups == 4 and tuple(network.layer1[0].conv2.weight.shape) == (128, 32, 3, 3)
    x, y = torch.zeros(2, 3, 224, 224), torch.tensor([0, 1])
    for arguments in ({}, {"layer_wise": 0, "target": y}, {"layer_wise": 1}):
        with pytest.raises(ArgumentError, match="layer_wise: a training step is two calls"):
            network(x, **arguments)
    with pytest.raises(ArgumentError, match="block: the heads read 512 channels"):
        infopro.ResNet(infopro.BasicBlock, [1, 1, 1, 1], k2_infopro=0)


def test_names_of_a_full_imagenet_network():
    listed = list(auglocal.resnet34(local_module_num=17).state_dict())
    assert (len(listed), zlib.crc32(" ".join(listed).encode())) == (526, 3674238381)  # of the official network


def test_infopro_imagenet_factories(monkeypatch):
    monkeypatch.setattr(infopro, "ResNet", lambda block, layers, **kwargs: (block, layers, kwargs))
    block = infopro.Bottleneck
    assert infopro.resnet101() == (block, [3, 4, 23, 3], {"k2_infopro": 0})
    assert infopro.resnet152(num_classes=5) == (block, [3, 8, 36, 3], {"k2_infopro": 5, "num_classes": 5})
    wide = {"k2_infopro": 2, "groups": 32, "width_per_group": 8}
    assert infopro.resnext101_32x8d() == (block, [3, 4, 23, 3], wide)
