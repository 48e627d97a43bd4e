import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastlocal.triton_kernels import configs

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KEY = {"channels": 16, "layout": "nchw", "wide": True}


class Config(NamedTuple):
    block_k: int
    warps: int
    split: bool = False


DEFAULT = Config(64, 4)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device of a name that no table is shipped for; write(...) writes one."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: asked.append(d) or "Some GPU 80GB/x")
    monkeypatch.setenv("FASTLOCAL_TABLES", str(tmp_path))
    caches = (configs._tuned, configs._table, configs._warn)
    for cache in caches:
        cache.cache_clear()

    def write(text):
        (tmp_path / "Some_GPU_80GB_x.json").write_text(text)
        for cache in caches:
            cache.cache_clear()

    write.asked = asked
    yield write
    for cache in caches:
        cache.cache_clear()


def table(config=None, default=None, kernel="ema_update", **top):
    config = {"block_k": 128, "warps": 8, "split": True} if config is None else config
    entry = {"kernel": kernel, "key": KEY, "config": config, "default": default or DEFAULT._asdict(), "seconds": {}}
    return json.dumps({"format": configs.FORMAT, "device": "Some GPU 80GB/x", "entries": [entry]} | top)


def test_without_a_table_it_is_the_default(device):
    assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) is DEFAULT


def test_an_entry_of_the_table_is_taken_and_read_once(device):
    device(table())
    found = configs.tuned("ema_update", CUDA, KEY, DEFAULT)
    assert found == Config(128, 8, True) and type(found) is Config
    assert configs.tuned("ema_update", CUDA, dict(reversed(KEY.items())), DEFAULT) == found
    assert configs.tuned("ema_update", CUDA, KEY | {"channels": 17}, DEFAULT) is DEFAULT
    assert configs.tuned("fused_sgd", CUDA, KEY, DEFAULT) is DEFAULT
    asked = len(device.asked)
    assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) is found and len(device.asked) == asked


def test_cpu_tensors_ask_no_device_and_no_table(device):
    device(table())
    assert configs.tuned("ema_update", CPU, KEY, DEFAULT) is DEFAULT and not device.asked


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"table"',
        "\x00\x01",
        table(format=0),
        table(entries={}),
        table(entries=[3]),
        table(entries=[{"kernel": "ema_update"}]),
        table(entries=[{"kernel": "ema_update", "key": "ab", "config": {}, "default": {}}]),
        table(entries=[{"kernel": "ema_update", "key": {"a": [1]}, "config": {}, "default": {}}]),
        table({"block_k": 96, "warps": 8, "split": True}),
        table({"block_k": 128, "warps": 0, "split": True}),
        table({"block_k": 128, "warps": "8", "split": True}),
        table({"block_k": 128.0, "warps": 8, "split": True}),
        table(kernel="no_such_kernel"),
        table({"block_k": 128, "warps": 8}),
        table({"block_k": 128, "warps": 8, "split": True, "stages": 2}),
        table({"block_k": 128, "warps": 8, "split": 1}),
        table({"block_k": True, "warps": 8, "split": True}),
        table(default={"block_k": 32, "warps": 4, "split": False}),
    ],
)
def test_a_table_that_is_wrong_or_old_is_left_out_with_one_warning(device, text, caplog):
    device(text)
    with caplog.at_level(logging.WARNING, "fastlocal"):
        for _ in range(3):
            assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) is DEFAULT
    assert len(caplog.records) == 1 and "is not used" in caplog.text


def test_a_folder_in_place_of_a_table(device, tmp_path, caplog):
    (tmp_path / "Some_GPU_80GB_x.json").mkdir()
    assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) is DEFAULT and "is not used" in caplog.text


def test_tables_are_left_out_on_request(device, monkeypatch):
    device(table())
    with configs.forced():
        assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) is DEFAULT
    with configs.forced({"ema_update": Config(2, 1)}):
        assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) == Config(2, 1)
        assert configs.tuned("ema_update", CPU, KEY, DEFAULT) == Config(2, 1)
        assert configs.tuned("fused_sgd", CPU, KEY, DEFAULT) is DEFAULT
    asked = []
    with configs.forced({"ema_update": Config(2, 1)}, asked):
        assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) == Config(2, 1)
    assert asked == [("ema_update", KEY, DEFAULT)]
    assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) == Config(128, 8, True) and len(asked) == 1
    monkeypatch.setenv("FASTLOCAL_TABLES", "0")
    configs._tuned.cache_clear()
    configs._table.cache_clear()
    assert configs.tuned("ema_update", CUDA, KEY, DEFAULT) is DEFAULT


def test_shipped_tables_are_sound():
    """Each can be read, and is named as its device is."""
    for path in (configs.HERE / "tables").glob("*.json"):
        text = path.read_text()
        assert configs.parse(text) and configs.file_name(json.loads(text)["device"]) == path.name


def test_file_names():
    assert configs.file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"
    assert "/" not in configs.file_name("a/b\\c")


def test_importing_it_asks_no_device():
    code = "import torch; import fastlocal.triton_kernels.configs as c; assert not torch.cuda.is_initialized()"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2])
    assert run.returncode == 0


def test_lists_take_a_configuration_and_mix_none():
    """The chunks follow the configuration, and those of another one are never taken for them."""
    pytest.importorskip("triton")
    from fastlocal.triton_kernels import multi_tensor

    tensors = [torch.zeros(5000), torch.zeros(7)]
    default = multi_tensor.plan([tensors], kernel="ema_update")
    assert default.config == multi_tensor.config(8192, 1) and default.programs == 4
    with configs.forced({"ema_update": multi_tensor.Config(512, 2)}):
        small = multi_tensor.plan([tensors], kernel="ema_update")
        assert small.config == (512, 2) and small.programs == 11
        assert multi_tensor.plan([tensors], kernel="fused_sgd").config == default.config
    assert multi_tensor.plan([tensors], kernel="ema_update") == default
