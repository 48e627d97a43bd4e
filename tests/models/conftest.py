import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

DATA = Path(__file__).parents[1] / "data" / "models"


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def published():
    """Reads tests/data/models/NAME.json: parameter names and shapes (and logits) of the official network."""
    return lambda name: json.loads((DATA / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def shapes():
    return lambda net: {name: list(p.shape) for name, p in net.named_parameters()}


@pytest.fixture(scope="session")
def count():
    return lambda net: sum(p.numel() for p in net.parameters())


@pytest.fixture(scope="session")
def official_logits():
    """First five training-mode logits of a float64 net on a fixed batch, after filling every parameter from its name.

    The same rule filled the official networks, whose logits are in tests/data/models.
    """

    def run(net: nn.Module, rename=lambda name: name) -> Tensor:
        net = net.double().train()
        for own_name, p in net.named_parameters():
            name = rename(own_name)
            r = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=p.dtype)
            if p.ndim >= 2:
                r *= 0.5 * math.sqrt(2.0 / (p.numel() / p.shape[0]))
            else:
                r = 0.1 * r + (1.0 if name.endswith("weight") else 0.0)
            p.data.copy_(r)
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1234), dtype=torch.float64)
        return net(x).detach()[0, :5]

    return run
