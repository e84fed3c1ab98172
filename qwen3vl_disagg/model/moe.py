"""Mixture of experts: router, experts, and the ways to run them.

An expert id of E or more is remote: its choice adds nothing to the sum here. How tokens get to experts on other ranks
is the dispatcher's business.

Dims: T tokens, D hidden, E experts, K experts per token, F expert width, R = T * K routed rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen3vl_disagg.kernels import gpu, ops
from qwen3vl_disagg.model.config import TextConfig
from qwen3vl_disagg.model.layers import Linear


def route(logits_TE: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, top K, renormalised -> weights `[T, K]` (the logits' dtype), ids `[T, K]` int64.

    Everything after the logits in float32.
    """
    weights_TK, ids_TK = logits_TE.float().softmax(-1).topk(num_experts_per_tok, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK.to(logits_TE.dtype), ids_TK


def run_one_by_one(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, num_experts: int, matrices: Callable[[int], tuple[Tensor, Tensor]]
) -> Tensor:
    """One expert after another, those alone that have rows. `matrices(e)`: gate and up `[2F, D]`, down `[D, F]`.

    Returns the weighted sum `[T, D]`, accumulated in float32.
    """
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for expert in ids_TK.unique().tolist():  # waits, on a GPU for each expert: for what no faster way takes
        if expert >= num_experts:
            continue  # remote
        token_R, choice_R = (ids_TK == expert).nonzero(as_tuple=True)
        gate_up_GD, down_DF = matrices(expert)
        gate, up = F.linear(x_TD.index_select(0, token_R), gate_up_GD).chunk(2, dim=-1)
        y_RD = F.linear(F.silu(gate) * up, down_DF)
        out_TD = out_TD.index_add(0, token_R, y_RD.float() * weights_TK[token_R, choice_R, None].float())
    return out_TD.to(x_TD.dtype)


def run_experts_loop(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """The reference, and what runs sizes, dtypes and devices that nothing else takes."""
    gate_up, down = gate_up_EGD.unbind(0), down_EDF.unbind(0)
    return run_one_by_one(x_TD, weights_TK, ids_TK, len(down), lambda expert: (gate_up[expert], down[expert]))


MAX_GATHERED_BYTES = 1 << 28
"""Matrices of routed rows that may be copied at once."""


def run_gathered(
    x_TD: Tensor,
    weights_TK: Tensor,
    ids_TK: Tensor,
    num_experts: int,
    matrices: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """As `run_one_by_one`, and the host waits for nothing: each routed row has a copy of its expert's matrices, which
    `matrices(experts [R])` makes. For few rows."""
    ids_R, num_choices = ids_TK.flatten(), ids_TK.shape[1]
    gate_up_RGD, down_RDF = matrices(ids_R.clamp(max=num_experts - 1))
    x_RD = x_TD[:, None].expand(-1, num_choices, -1).flatten(0, 1)
    gate, up = torch.bmm(gate_up_RGD, x_RD.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
    y_RD = torch.bmm(down_RDF, (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1).float()
    weighted_RD = y_RD * weights_TK.flatten().float().unsqueeze(-1)
    is_here_R1 = (ids_R < num_experts).unsqueeze(-1)
    return torch.where(is_here_R1, weighted_RD, 0).unflatten(0, ids_TK.shape).sum(1).to(x_TD.dtype)


def should_gather(device_type: str, num_rows: int, row_bytes: int) -> bool:
    """Beyond the CPU, where asking which experts have rows is a wait for each, and while there is room for copies."""
    return device_type != "cpu" and 0 < num_rows * row_bytes <= MAX_GATHERED_BYTES


def run_experts_ungrouped(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Same value, of what `grouped_mm` does not take: by copies of the matrices of few rows, else by the loop."""
    num_experts, row_bytes = len(down_EDF), (gate_up_EGD[0].nbytes + down_EDF[0].nbytes) if len(down_EDF) else 0
    if not should_gather(x_TD.device.type, ids_TK.numel(), row_bytes):
        return run_experts_loop(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF)
    return run_gathered(x_TD, weights_TK, ids_TK, num_experts, lambda ids_R: (gate_up_EGD[ids_R], down_EDF[ids_R]))


def used_experts(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Those that have rows, and as many as could have: their ids `[S]`, and each choice as a place among them
    `[T, K]`, remote ones as S. Sizes follow from sizes, so nothing is waited for; what is left of S is expert 0.

    Example: 6 experts, choices 4 2 4 and a remote one: S is 4, ids 2 4 0 0, places 1 0 1 4.
    """
    num_used = min(num_experts, ids_TK.numel())
    ids_TK = ids_TK.clamp(max=num_experts)
    is_used_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_TK.device).index_fill(0, ids_TK.flatten(), 1)
    place_E = torch.where(is_used_E > 0, is_used_E.cumsum(0) - 1, num_used).clamp(max=num_used)
    place_E[num_experts:] = num_used
    expert_E = torch.arange(num_experts + 1, device=ids_TK.device)
    used_S = expert_E.new_zeros(num_used + 1).index_copy(0, place_E, expert_E)[:num_used]
    return used_S, place_E[ids_TK]


def takes_grouped_mm(device_type: str, dtype: torch.dtype, hidden: int, width: int) -> bool:
    """Whether `grouped_mm` takes both projections: rows begin at multiples of 16 bytes, and beyond the CPU, or wherever
    the compiler looks inside, it is made for bfloat16 alone."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if device_type == "cpu" else (torch.bfloat16,)
    return dtype in dtypes and all(size * dtype.itemsize % 16 == 0 for size in (hidden, width))


def run_experts_grouped(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Same value: rows sorted by expert, one grouped matmul for each projection."""
    num_experts, num_choices = gate_up_EGD.shape[0], ids_TK.shape[1]
    if num_experts == 0:
        return torch.zeros_like(x_TD)
    ids_R = ids_TK.flatten().clamp(max=num_experts)  # remote ones come last
    order_R = ids_R.argsort(stable=True)
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=x_TD.device)
    counts_E = counts_E.scatter_add(0, ids_R, torch.ones_like(ids_R))
    offsets_E = counts_E[:-1].cumsum(0).to(torch.int32)
    if x_TD.device.type == "cpu":
        order_R = order_R[: int(offsets_E[-1])]  # on a CPU: nothing to wait for
    x_RD = x_TD[order_R // num_choices]
    gate, up = F.grouped_mm(x_RD, gate_up_EGD.transpose(1, 2), offs=offsets_E).chunk(2, dim=-1)
    y_RD = F.grouped_mm(F.silu(gate) * up, down_EDF.transpose(1, 2), offs=offsets_E)
    if x_TD.device.type != "cpu":  # rows past the last offset are whatever was in memory
        is_here_R = torch.arange(len(y_RD), device=y_RD.device) < offsets_E[-1]
        y_RD = torch.where(is_here_R.unsqueeze(-1), y_RD, 0)
    unsorted_RD = y_RD.new_zeros(len(ids_R), y_RD.shape[1]).index_copy(0, order_R, y_RD)
    y_TKD = unsorted_RD.unflatten(0, ids_TK.shape).float()
    return (y_TKD * weights_TK.float().unsqueeze(-1)).sum(1).to(x_TD.dtype)


# Opaque: on a CPU the compiler would gain nothing by looking inside `grouped_mm`, and which experts have rows, as the
# loop asks, is nothing that it could know.
_library = torch.library.Library("q3vl", "FRAGMENT")
for _name, _run, _device in (
    ("grouped_experts", run_experts_grouped, "CPU"),
    ("experts_ungrouped", run_experts_ungrouped, "CompositeExplicitAutograd"),
):
    _library.define(f"{_name}(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down) -> Tensor")
    _library.impl(_name, _run, _device)
    torch.library.register_fake(f"q3vl::{_name}", lambda x_TD, *_: torch.empty_like(x_TD))


def run_experts_kernel(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Same value: bfloat16 on a CPU, one call that reads each active expert's weights where they lie."""
    return ops.experts(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF)


def run_experts_triton(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Same value: bfloat16 on CUDA, few rows by one kernel that sorts nothing, more of them sorted."""
    if x_TD.shape[0] <= gpu.MAX_FEW_ROWS:
        return torch.ops.q3vl.gpu_few_rows(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF)
    return run_experts_sorted(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF)


def run_experts_sorted(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """As `run_experts_grouped`, with Triton kernels around the two products, which leave remote rows as they are."""
    if down_EDF.shape[0] == 0:
        return torch.zeros_like(x_TD)
    token_R, place_TK, end_E = torch.ops.q3vl.gpu_order(ids_TK, down_EDF.shape[0])
    x_RD = torch.ops.q3vl.gpu_pick(x_TD, token_R, end_E)
    gate_up_RG = F.grouped_mm(x_RD, gate_up_EGD.transpose(1, 2), offs=end_E)
    y_RD = F.grouped_mm(torch.ops.q3vl.gpu_swiglu(gate_up_RG, end_E), down_EDF.transpose(1, 2), offs=end_E)
    return torch.ops.q3vl.gpu_combine(y_RD, place_TK, weights_TK)


MAX_ROUTED_ROWS = 1 << 15
"""Choices of tokens of several ranks for which there is room at once: those of a chunk of 4,096 tokens with 8 each."""


def run_experts_in_slices(
    x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Same value, beyond the CPU, of tokens that came from several ranks. How many choices are of experts here only
    the device knows, and it may be all of them: room is made for those of so many tokens, one slice after another."""
    run = run_experts_sorted if gpu.takes(x_TD) else run_experts_grouped
    num_rows = max(MAX_ROUTED_ROWS // max(ids_TK.shape[1], 1), 1)
    slices = zip(x_TD.split(num_rows), weights_TK.split(num_rows), ids_TK.split(num_rows), strict=True)
    parts = [run(x, weights, ids, gate_up_EGD, down_EDF) for x, weights, ids in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# Opaque: into how many slices rows fall is no part of a graph, which is for any number of them.
_library.define("experts_in_slices(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down) -> Tensor")
_library.impl("experts_in_slices", run_experts_in_slices, "CompositeExplicitAutograd")
torch.library.register_fake("q3vl::experts_in_slices", lambda x_TD, *_: torch.empty_like(x_TD))


EXPERT_IMPLS = {"loop": run_experts_loop, "grouped": run_experts_grouped, "kernel": run_experts_kernel}


DispatchKind = Literal["gather", "all_to_all"]


@dataclass(frozen=True)
class DispatchPlan:
    """What ranks that share experts have agreed on for one step.

    `num_rows`: the rows that each rank brings; shorter batches are padded. `kind`: how rows travel.
    """

    num_rows: int
    kind: DispatchKind = "gather"


class Dispatcher:
    """Where experts are. This one: all of them here.

    `dispatch` gives the rows that the experts here have to see, with weights and ids of their choices; `combine` gives
    back, for each token that went in, the sum over all of its experts. What `combine` needs to know of a dispatch is
    returned by it and handed on, never kept.
    """

    @property
    def can_capture(self) -> bool:
        """Whether the device does it all, in the order of its stream."""
        return True

    def num_rows(self, num_tokens: int) -> int:
        """That the experts here see, where each rank brings so many tokens."""
        return num_tokens

    def local(self, weight: Tensor) -> Tensor:
        """The part of a parameter `[E, ..]` that is here."""
        return weight

    def dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, plan: DispatchPlan | None
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        return x_TD, weights_TK, ids_TK, None

    def combine(self, y_RD: Tensor, sent: Any) -> Tensor:
        return y_RD


class Experts(nn.Module):
    """Weights of all experts: `gate_up_proj [E, 2F, D]` (first half gate, second half up), `down_proj [E, D, F]`."""

    weight_names: tuple[str, ...] = ("gate_up_proj", "down_proj")
    """In the order in which the ways to run experts take them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        num_experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.impl: Literal["loop", "grouped", "kernel"] = "grouped"
        """`grouped` where `grouped_mm` takes it, else `loop`, or copies of matrices in its place."""
        self.dispatcher = Dispatcher()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)

    def local_weights(self) -> tuple[Tensor, ...]:
        """Those of the experts that are here."""
        return tuple(self.dispatcher.local(getattr(self, name)) for name in self.weight_names)

    def takes_few_rows(self, x: Tensor) -> bool:
        """Whether few rows like `x` have a kernel of their own: where all experts are here. Rows of several ranks come
        together in numbers of which a graph could not say whether they are few."""
        is_taken = takes_grouped_mm(x.device.type, x.dtype, *self.down_proj.shape[1:])
        return gpu.takes(x) and self.impl == "grouped" and is_taken and type(self.dispatcher) is Dispatcher

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, plan: DispatchPlan | None = None) -> Tensor:
        """The weighted sum over each token's experts `[T, D]`. `plan` is needed where experts are spread over ranks."""
        *rows, sent = self.dispatcher.dispatch(x_TD, weights_TK, ids_TK, plan)
        return self.dispatcher.combine(self.run(*rows, *self.local_weights()), sent)

    def run(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, *local_weights: Tensor) -> Tensor:
        """The sum over the experts that are here."""
        impl, device = self.impl, x_TD.device.type
        if impl == "grouped" and not takes_grouped_mm(device, x_TD.dtype, *local_weights[1].shape[1:]):
            impl = "loop"
        if impl == "grouped" and device != "cpu" and type(self.dispatcher) is not Dispatcher:
            return torch.ops.q3vl.experts_in_slices(x_TD, weights_TK, ids_TK, *local_weights)
        if impl == "grouped" and gpu.takes(x_TD):
            return run_experts_triton(x_TD, weights_TK, ids_TK, *local_weights)
        if impl == "loop" and torch.compiler.is_compiling():
            return torch.ops.q3vl.experts_ungrouped(x_TD, weights_TK, ids_TK, *local_weights)
        if impl == "loop":
            return run_experts_ungrouped(x_TD, weights_TK, ids_TK, *local_weights)
        if torch.compiler.is_compiling() and impl == "grouped" and device == "cpu":
            return torch.ops.q3vl.grouped_experts(x_TD, weights_TK, ids_TK, *local_weights)
        if impl == "kernel":  # rows of other ranks have no say in the bits of this one's
            gate_up_EGD, down_EDF = local_weights
            may_tile = type(self.dispatcher) is Dispatcher
            return ops.experts(x_TD, weights_TK, ids_TK, gate_up_EGD, down_EDF, may_tile)
        return EXPERT_IMPLS[impl](x_TD, weights_TK, ids_TK, *local_weights)


class SparseMoe(nn.Module):
    """Router and experts: each token goes to `num_experts_per_tok` of them; none is dropped."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)
        self.use_kernel = False

    def forward(self, x_TD: Tensor, plan: DispatchPlan | None = None) -> Tensor:
        is_kernel = self.use_kernel and not torch.compiler.is_compiling()
        logits_TE, num_choices = self.gate(x_TD), self.num_experts_per_tok
        if gpu.takes(logits_TE):
            weights_TK, ids_TK = torch.ops.q3vl.gpu_route(logits_TE, num_choices)
        else:
            weights_TK, ids_TK = (ops.route if is_kernel else route)(logits_TE, num_choices)
        return self.experts(x_TD, weights_TK, ids_TK, plan)

    def waits(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """Whether the host waits for CUDA in a step in which each rank brings so many tokens: in the loop over
        experts."""
        experts = self.experts
        if experts.impl == "grouped" and takes_grouped_mm("cuda", dtype, *experts.down_proj.shape[1:]):
            return False
        one = sum(math.prod(getattr(experts, name).shape[1:]) for name in ("gate_up_proj", "down_proj"))
        num_rows = experts.dispatcher.num_rows(num_tokens) * self.num_experts_per_tok
        return not should_gather("cuda", num_rows, one * dtype.itemsize)

    def take_part(self, plan: DispatchPlan) -> None:
        """Serve the tokens of other ranks, without any of one's own."""
        x_0D = self.gate.weight.new_empty(0, self.gate.in_features)
        weights_0K = x_0D.new_empty(0, self.num_experts_per_tok)
        self.experts(x_0D, weights_0K, weights_0K.long(), plan)
