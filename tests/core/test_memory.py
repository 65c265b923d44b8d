"""How much memory there is."""

import pytest
import torch

from funcbayes.core import memory


@pytest.fixture
def driver(monkeypatch):
    """Two CUDA devices that count how often their driver is asked, and a clock."""
    asked = {0: 0, 1: 0}
    clock = [1000.0]

    def mem_get_info(index):
        asked[index] += 1
        return 100 * (index + 1), 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 20)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(memory.time, "monotonic", lambda: clock[0])
    memory._available_on_cuda.cache_clear()
    yield asked, clock
    memory._available_on_cuda.cache_clear()


def test_what_torch_keeps_on_cuda_is_available(driver):
    assert memory.available_bytes(torch.device("cuda", 0)) == 100 + 30
    assert memory.available_bytes(torch.device("cuda", 1)) == 200 + 30
    assert memory.available_bytes(torch.device("cuda")) == 200 + 30


def test_the_driver_is_asked_once_in_a_while_for_each_device(driver):
    asked, clock = driver
    for _ in range(3):
        for index in range(2):
            memory.available_bytes(torch.device("cuda", index))
    assert asked == {0: 1, 1: 1}
    clock[0] += 1
    memory.available_bytes(torch.device("cuda", 0))
    assert asked == {0: 2, 1: 1}


@pytest.mark.cuda
def test_freed_memory_on_cuda_counts():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    memory._available_on_cuda.cache_clear()
    before = memory.available_bytes(device)
    size = 2**28
    x = torch.empty(size, dtype=torch.uint8, device=device)
    memory._available_on_cuda.cache_clear()
    held = memory.available_bytes(device)
    del x
    memory._available_on_cuda.cache_clear()
    # Others may use the device: within half of what was taken.
    assert held < before - size // 2
    assert memory.available_bytes(device) > held + size // 2
