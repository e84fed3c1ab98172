import pytest
import torch

from qwen3vl_disagg.model.layers import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 256), (5, 4, 64), (3, 100)])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_the_norm_is_its_formula_by_the_bit(dtype, shape, scale):
    norm = RMSNorm(shape[-1], 1e-6)
    norm.weight.data = torch.randn(shape[-1], generator=torch.Generator().manual_seed(1)).to(dtype)
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * scale).to(dtype)
    x32 = x.float()
    expected = norm.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert torch.equal(norm(x), expected)
