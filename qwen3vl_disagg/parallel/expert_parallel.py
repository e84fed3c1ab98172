"""The plan of the language ranks carried out: experts over all of them, everything else on each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from qwen3vl_disagg.model.moe import Experts
from qwen3vl_disagg.parallel.collectives import Collectives, GroupCollectives
from qwen3vl_disagg.parallel.dispatch import ExpertDispatcher
from qwen3vl_disagg.parallel.expert_placement import placements, shard_rows


class ExpertParallel(ParallelStyle):
    """`Experts` whose weights are `Shard(0)` over a mesh of one axis; installs the dispatcher that goes with it.

    Weights that are whole are cut (on the meta device: by shape alone); those that were loaded as shards are kept.
    """

    def __init__(self, collectives: Collectives) -> None:
        super().__init__()
        self._collectives = collectives

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Experts):
            raise ValueError(f"ExpertParallel is for Experts, not for {type(module).__name__}")
        if device_mesh.ndim != 1:
            raise ValueError(f"experts are spread over one mesh axis, the mesh has {device_mesh.ndim}")
        num_experts = module.gate_up_proj.shape[0]
        rows = shard_rows(num_experts, device_mesh.size(), device_mesh.get_local_rank())
        for name in module.weight_names:
            weight = getattr(module, name)
            if isinstance(weight, DTensor):
                if list(weight.placements) != [Shard(0)]:
                    raise ValueError(f"{name} is {weight.placements}, must be {[Shard(0)]}")
                continue
            sharded = shard(weight.detach()[rows.start : rows.stop], device_mesh, weight.shape)
            if isinstance(weight, nn.Parameter):
                setattr(module, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))
            else:
                setattr(module, name, sharded)
        module.dispatcher = ExpertDispatcher(self._collectives, num_experts)
        return module


class ExpertShards:
    """What a language rank reads of a checkpoint, and how it holds it: the `Shards` of loading."""

    def __init__(self, mesh: DeviceMesh, collectives: Collectives | None = None) -> None:
        self._mesh, self._collectives = mesh, collectives or mesh_collectives(mesh)

    def rows(self, name: str, shape: tuple[int, ...]) -> range | None:
        is_cut = placements([name])[name] == Shard(0)
        return shard_rows(shape[0], self._mesh.size(), self._mesh.get_local_rank()) if is_cut else None

    def hold(self, name: str, local: Tensor, shape: tuple[int, ...]) -> Tensor:
        return shard(local, self._mesh, shape)

    def finish(self, module: nn.Module) -> None:
        parallelize(module, self._mesh, self._collectives)


def shard(local: Tensor, mesh: DeviceMesh, shape: tuple[int, ...]) -> DTensor:
    """This rank's rows as a DTensor `Shard(0)` of a global shape, which may divide unevenly."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


def mesh_collectives(mesh: DeviceMesh) -> GroupCollectives:
    group = mesh.get_group()
    is_native = mesh.device_type == "cuda"
    return GroupCollectives(group.group_name, mesh.get_local_rank(), mesh.size(), has_native=is_native)


def parallelize(module: nn.Module, mesh: DeviceMesh, collectives: Collectives | None = None) -> nn.Module:
    """Apply the plan to a decoder in place. ValueError for a parameter whose placement the plan does not say."""
    placements(name for name, _ in module.named_parameters(remove_duplicate=False))
    style = ExpertParallel(collectives or mesh_collectives(mesh))
    names = [name for name, part in module.named_modules() if isinstance(part, Experts)]
    return parallelize_module(module, mesh, dict.fromkeys(names, style))
