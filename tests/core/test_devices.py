"""What `--device` and `--gpus` mean, and which errors say that a GPU is gone."""

from __future__ import annotations

import pytest
import torch

from qwen3vl_disagg.core import devices
from qwen3vl_disagg.core.devices import parse_gpus, raise_if_lost, resolve_device, use_device
from qwen3vl_disagg.core.errors import DeviceLost, InputError

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"


@pytest.fixture
def with_gpus(monkeypatch):
    def make(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return make


@pytest.mark.parametrize(
    ("text", "device", "ranks", "gpus"),
    [(None, "cpu", 3, ()), ("0", "auto", 1, (0,)), ("2,3", "auto", 2, (2, 3)), ("3, 0 ,1", "cuda", 3, (3, 0, 1))],
)
def test_a_list_of_gpus(text, device, ranks, gpus):
    assert parse_gpus(text, device, ranks) == gpus


@pytest.mark.parametrize(
    ("text", "device", "ranks", "problem"),
    [
        ("0,1", "cpu", 2, "not with --device cpu"),
        ("", "auto", 1, "must be the numbers"),
        ("0,", "auto", 2, "must be the numbers"),
        ("-1", "auto", 1, "must be the numbers"),
        ("٣", "auto", 1, "must be the numbers"),
        ("cuda:0", "auto", 1, "must be the numbers"),
        ("99999", "auto", 1, "must be the numbers"),
        ("1,1", "auto", 2, "names a GPU twice"),
        ("0,1", "auto", 4, "2 GPUs for 4 ranks"),
        ("0,1,2", "auto", 2, "3 GPUs for 2 ranks"),
    ],
)
def test_a_list_that_cannot_be(text, device, ranks, problem):
    with pytest.raises(InputError, match=problem) as raised:
        parse_gpus(text, device, ranks)
    assert raised.value.param == "gpus"


def test_each_rank_takes_the_gpu_that_was_named_for_it(with_gpus):
    with_gpus(4)
    found = [resolve_device("auto", local_rank=i, num_local_ranks=2, gpus=(3, 1)).index for i in range(2)]
    assert found == [3, 1]
    with pytest.raises(InputError, match=r"--gpus 3,4: GPUs 0 to 3 are visible here"):
        resolve_device("auto", local_rank=1, num_local_ranks=2, gpus=(3, 4))
    with_gpus(0)
    with pytest.raises(InputError, match=r"--gpus 0: no CUDA device is visible"):
        resolve_device("auto", gpus=(0,))


def test_for_a_lack_of_gpus_the_first_rank_says_so(with_gpus, caplog):
    with_gpus(2)
    assert [resolve_device("auto", local_rank=i, num_local_ranks=2).index for i in range(2)] == [0, 1]
    assert not caplog.messages
    assert {resolve_device("auto", local_rank=i, num_local_ranks=3).type for i in range(3)} == {"cpu"}
    assert caplog.messages == ["--device auto takes the CPU: 2 GPUs here, and 3 ranks, which need one each"]


def test_gpus_that_this_pytorch_cannot_use_are_not_passed_over_in_silence(with_gpus, caplog, monkeypatch, tmp_path):
    with_gpus(0)
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", tmp_path / "version")
    assert resolve_device("auto").type == "cpu"
    assert not caplog.messages
    devices.NVIDIA_DRIVER.touch()
    assert {resolve_device("auto", local_rank=i, num_local_ranks=2).type for i in range(2)} == {"cpu"}
    assert caplog.messages == [
        f"--device auto takes the CPU: PyTorch {torch.__version__} finds none of this host's GPUs"
    ]


def test_a_thread_takes_its_device(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    use_device(torch.device("cpu"))
    use_device(torch.device("cuda", 2))
    assert taken == [torch.device("cuda", 2)]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(ILLEGAL),
        torch.AcceleratorError("device-side assert triggered"),
        RuntimeError(ILLEGAL),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    ],
)
def test_a_broken_context_is_a_lost_device(error):
    with pytest.raises(DeviceLost, match=str(error).splitlines()[0]) as raised:
        raise_if_lost(error)
    assert "\n" not in str(raised.value)
    wrapped = ValueError("item 3")
    wrapped.__cause__ = error
    with pytest.raises(DeviceLost):
        raise_if_lost(wrapped)
    with pytest.raises(DeviceLost):
        raise_if_lost(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Expected all tensors to be on the same device, but got cuda:0 and cpu"),
        ValueError("a request that asks for a CUDA error: by name"),
    ],
)
def test_what_costs_a_request_alone(error):
    raise_if_lost(error)
