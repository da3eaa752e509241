"""The named devices, and measuring this one."""

import pytest
import torch

from fxpipe.costs.devices import DEVICES, device, measure_this_device, processor_name
from fxpipe.errors import OptionError


def test_datasheet_numbers():
    h100, a100, mi300x = device("H100"), device("A100"), device("MI300X")
    assert (h100.flops_per_second["bfloat16"], h100.flops_per_second["float32"]) == (989e12, 67e12)
    assert (h100.memory_bytes_per_second, h100.memory_bytes) == (3.35e12, 80 * 10**9)
    assert (a100.flops_per_second["bfloat16"], a100.flops_per_second["float32"]) == (312e12, 19.5e12)
    assert (a100.memory_bytes_per_second, a100.memory_bytes) == (2.039e12, 80 * 10**9)
    assert (mi300x.flops_per_second["bfloat16"], mi300x.flops_per_second["float32"]) == (1307.4e12, 163.4e12)
    assert (mi300x.memory_bytes_per_second, mi300x.memory_bytes) == (5.3e12, 192 * 10**9)


@pytest.mark.parametrize("name", DEVICES)
def test_each_says_where_its_numbers_come_from(name):
    assert device(name).name == name
    assert "datasheet" in device(name).source


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match="unknown device 'H900'; known: A100, H100, MI300X, cpu"):
        device("H900")


def test_this_device_is_measured_and_leaves_no_trace():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = measure_this_device(seconds=0.03)
    assert torch.equal(before, torch.get_rng_state())
    assert found.name == processor_name() != ""
    assert found.source.startswith("measured")
    assert 1e8 < found.flops_per_second["float32"] < 1e15
    assert 1e8 < found.memory_bytes_per_second < 1e13
    assert 2**28 < found.memory_bytes < 2**50
    assert 0 < found.launch_seconds < 0.1
