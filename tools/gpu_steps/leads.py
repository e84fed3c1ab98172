"""What the installed PyTorch has that this project does not use yet: whether it is there, and whether it runs."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from torch import Tensor

from tools.gpu_steps.runner import REPO
from tools.gpu_steps.sizes import least_ms
from tools.gpu_steps.step import Check

PEER_S = 25.0
WORD = 1234.0
ROWS, DEPTH, WIDTH, EXPERTS = 256, 512, 256, 4


def available(check: Check) -> None:
    with check.part("float8_grouped"):
        float8_grouped(check)
    with check.part("varlen"):
        varlen(check)
    with check.part("ipc"):
        between_processes(check)
    if check.needs_gpu("memory_summary"):
        (check.out / "memory_summary.txt").write_text(torch.cuda.memory_summary())


def float8_grouped(check: Check) -> None:
    """Rows and columns with scales of their own, as float8 checkpoints could be computed."""
    name = "_scaled_grouped_mm"
    check.say(has_scaled_grouped_mm=hasattr(torch, name))
    x = torch.randn(ROWS, DEPTH, device=check.device).to(torch.float8_e4m3fn)
    weight = torch.randn(EXPERTS, WIDTH, DEPTH, device=check.device).to(torch.float8_e4m3fn).transpose(1, 2)
    row_scale, column_scale = torch.ones(ROWS, device=check.device), torch.ones(EXPERTS, WIDTH, device=check.device)
    offsets = torch.arange(1, EXPERTS + 1, device=check.device, dtype=torch.int32) * (ROWS // EXPERTS)
    if check.needs_gpu("float8_grouped"):

        def product() -> torch.Tensor:
            return getattr(torch, name)(x, weight, row_scale, column_scale, offs=offsets, out_dtype=torch.bfloat16)

        first = x[: ROWS // EXPERTS].float() @ weight[0].float()
        off = (product()[: ROWS // EXPERTS].float() - first).abs().max().item()
        check.say(float8_grouped={"us": least_ms(check, product) * 1e3, "largest difference": off})


def varlen(check: Check) -> None:
    """One call for frames of several lengths, at the tower's size of heads."""
    from torch.nn.attention import varlen as module

    lengths = torch.tensor([0, 64, 192, 448], dtype=torch.int32, device=check.device)
    q, k, v = (torch.randn(448, 16, 72, device=check.device, dtype=torch.bfloat16) for _ in "qkv")
    check.say(has_varlen_attn=hasattr(module, "varlen_attn"))
    if check.needs_gpu("varlen"):
        out: Tensor = module.varlen_attn(q, k, v, lengths, lengths, 256, 256)  # type: ignore[assignment]
        q, k, v = (x[:64].float().transpose(0, 1) for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        check.say(varlen={"largest difference": (out[:64].float() - expected).abs().max().item()})


def between_processes(check: Check) -> None:
    """A child opens this process's memory by its handle and writes into it; then it is read here."""
    tensor = torch.zeros(1 << 20, device=check.device)
    if not check.needs_gpu("ipc"):
        return
    parts = tensor.untyped_storage()._share_cuda_()
    message = json.dumps([{"hex": part.hex()} if isinstance(part, bytes) else part for part in parts])
    command = [sys.executable, "-m", "tools.gpu_steps.leads"]
    done = subprocess.run(command, cwd=REPO, input=message, capture_output=True, text=True, timeout=PEER_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-400:])
    check.say(ipc={"all written": bool((tensor == WORD).all())})


def write_into_shared(message: str) -> None:
    """The child's side."""
    parts = [bytes.fromhex(part["hex"]) if isinstance(part, dict) else part for part in json.loads(message)]
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(*parts)
    torch.empty(0, device="cuda").set_(storage).fill_(WORD)
    torch.cuda.synchronize()


if __name__ == "__main__":
    write_into_shared(sys.stdin.read())
