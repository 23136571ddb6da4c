"""Memory of large results goes from one to the next, and never to two at once."""

from __future__ import annotations

import gc
import os
import resource
import sys
import threading

import pytest
import torch

import spicerack
from spicerack.kernels import pool
from spicerack.nn.linear import QLinear
from spicerack.numerics import rounding
from spicerack.numerics.scheme import parse

TYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE = (512, 1024)


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    gc.collect()
    spicerack.release_memory()


@pytest.fixture
def layer() -> QLinear:
    return QLinear.of(rounding.to_nearest(torch.randn(1024, 256), parse("w8"), range_="absmax", threads=1))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_tensor_like_any_other(dtype: torch.dtype) -> None:
    tensor = pool.empty(SHAPE, dtype)
    assert tensor.shape == SHAPE and tensor.dtype == dtype and tensor.is_contiguous() and not tensor.requires_grad
    assert tensor.data_ptr() % 64 == 0
    values = torch.randn(SHAPE).to(dtype)
    assert torch.equal(tensor.copy_(values), values)
    tensor.mul_(2).requires_grad_()
    tensor.float().sum().backward()
    assert tensor.grad is not None


def test_memory_is_passed_on_and_given_back() -> None:
    first = pool.empty(SHAPE, torch.float32)
    place = first.data_ptr()
    row = first[3]  # shares the memory
    del first
    assert spicerack.release_memory() == 0
    other = pool.empty(SHAPE, torch.float32)
    assert other.data_ptr() != place
    row.fill_(7)
    other.zero_()
    assert row.eq(7).all()
    del row
    assert pool.empty(SHAPE, torch.float16).data_ptr() == place  # the smallest that holds it, and it was free
    assert spicerack.release_memory() >= 4 * SHAPE[0] * SHAPE[1]
    assert spicerack.release_memory() == 0


def test_what_is_kept_is_bounded() -> None:
    tensors = [pool.empty((32 << 20,), torch.float32) for _ in range(3)]  # 128 MB each, never touched
    del tensors
    assert 0 < spicerack.release_memory() <= 256 << 20
    larger = pool.empty((80 << 20,), torch.float32)
    del larger
    assert spicerack.release_memory() == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_compute_the_same_into_it(layer: QLinear, mode: type[torch.no_grad]) -> None:
    """Large results are those of their rows alone, also when the memory held something else before."""
    x = torch.randn(600, 256)
    with mode():
        for _ in range(3):
            y = layer(x)
            assert y.numel() >= pool.LARGE
            assert torch.equal(y, torch.cat([layer(part) for part in x.split(100)]))
            y.fill_(float("nan"))
            del y


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its counters")
def test_no_fresh_pages_for_large_results(layer: QLinear) -> None:
    """Four results of 25 MB at once, which malloc hands back to the system: after the first round no page is new."""
    x = torch.randn(6000, 256)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        results = [layer(x) for _ in range(4)]
        del results
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with torch.no_grad():
        later = [faults() for _ in range(4)][1:]
    assert max(later) < 500  # of 24,000 small pages, or 48 huge ones where malloc has those


def test_four_threads_never_share(layer: QLinear) -> None:
    x = torch.randn(4, 300, 256)
    with torch.no_grad():
        want = [torch.cat([layer(part) for part in rows.split(100)]) for rows in x]
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(layer(x[number]), want[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_has_its_own() -> None:
    kept = pool.empty(SHAPE, torch.float32).fill_(1)
    del kept
    child = os.fork()
    if child == 0:
        mine = pool.empty(SHAPE, torch.float32).fill_(2)
        os._exit(0 if bool(mine.eq(2).all()) else 1)
    mine = pool.empty(SHAPE, torch.float32).fill_(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool(mine.eq(3).all())


def test_sizes_that_cannot_be() -> None:
    with pytest.raises((ValueError, MemoryError)):
        pool.empty((1 << 40, 1 << 40), torch.float32)
    assert pool.empty((0, 5), torch.float32).shape == (0, 5)
