"""Other depths, numbers of blocks and classes, and head configurations, against numbers of the official code.

Each file of ``tests/data/compat`` was made by running the official code of the repository and commit that it names, on the
CPU in float64, on parameters filled as in ``tests/data/oracles``. A fingerprint is the sum over tensors of norm (and of
sum) times a factor from the tensor's name. "conditioning" is the largest relative change of all these numbers when every
initial parameter moves by one unit in the last place.
"""

import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from fastlocal.compat import auglocal, infopro
from tests.methods.oracles import make_batch, official_value

FILES = sorted((Path(__file__).parents[1] / "data" / "compat").glob("*.json"))
MODULES = {"auglocal": auglocal, "infopro": infopro}
CRITERION = nn.CrossEntropyLoss()


def factor(name):
    return 0.5 + zlib.crc32(name.encode()) / 2**32


def fingerprint(tensors):
    """[factor * norm, factor * sum, how many] over (name, tensor or None)."""
    real = [(factor(name), t.detach()) for name, t in tensors if t is not None]
    return [sum(f * float(t.norm()) for f, t in real), sum(f * float(t.sum()) for f, t in real), len(real)]


def names_and_shapes(network):
    listed = [[name, list(t.shape)] for name, t in network.state_dict().items()]
    return zlib.crc32(json.dumps(listed).encode())


def fill(network):
    with torch.no_grad():
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            tensor.copy_(official_value(name, tuple(tensor.shape)))


def build(golden):
    module, _, factory = golden["network"].partition(".")
    arguments = {k: tuple(v) if isinstance(v, list) and k != "layers" else v for k, v in golden["constructor"].items()}
    if "block" in arguments:
        arguments["block"] = getattr(MODULES[module], arguments["block"])
    return getattr(MODULES[module], factory)(**arguments)


def train_call(golden, network, x, y):
    """The official script's step up to ``optimizer.step()``; everything it sees, as one list of numbers."""
    if golden["call"] == "cifar":
        logits, loss = network(img=x, target=y, **golden["loss_weights"])[:2]
        return [loss.item(), *logits[0, :5].tolist()]
    if golden["call"] == "summed":
        logits, loss, record, last = network(x=x, target=y, criterion=CRITERION)
        loss.backward()
        return [loss.item(), last, *logits[0, :5].tolist(), *(scores.norm().item() for scores in record)]
    mean, std = (
        torch.tensor(v, dtype=x.dtype).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    image = (x * std + mean).clamp(0, 1)
    h, first = network(x=x, initial_image=image, target=y, criterion=CRITERION, layer_wise=0, **golden["loss_weights"])
    first.backward()
    logits, loss = network(x=h.detach(), target=y, criterion=CRITERION, layer_wise=1)
    loss.backward()
    return [first.item(), loss.item(), h.norm().item(), *logits[0, :5].tolist()]


def run(golden, network):
    """Some steps and an evaluation: what is compared, by name."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    numbers = {}
    for step in range(golden["steps"]):
        x, y = make_batch(golden, step)
        network.train()
        optimizer.zero_grad()
        numbers[f"call {step}"] = train_call(golden, network, x, y)
        if step == 0:
            numbers["gradients"] = fingerprint((n, p.grad) for n, p in network.named_parameters())
        optimizer.step()
        numbers[f"parameters {step}"] = fingerprint(network.named_parameters())
        numbers[f"buffers {step}"] = fingerprint((n, b.double()) for n, b in network.named_buffers())
    with torch.no_grad():
        result = network.eval()(x, y)
    numbers["eval"] = (result[0] if isinstance(result, tuple) else result).flatten()[:10].tolist()
    return numbers


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_numbers_of_the_official_code(file):
    golden = json.loads(file.read_text())
    assert golden["source"]["repository"].count("/") == 1 and len(golden["source"]["commit"]) == 40
    network = build(golden).double()
    assert (len(network.state_dict()), names_and_shapes(network)) == (golden["entries"], golden["names_and_shapes"])
    fill(network)
    numbers = run(golden, network)
    assert set(numbers) == set(golden["numbers"])
    tolerance = max(1e-9, 100 * golden["conditioning"])
    for what, expected in golden["numbers"].items():
        assert numbers[what] == pytest.approx(expected, rel=tolerance, abs=tolerance), what


def test_there_are_files():
    assert len(FILES) >= 6
