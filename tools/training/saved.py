"""What a training run needs to go on after it was ended: weights, moments of the optimiser, and where it stood."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

_WEIGHT = "weight/"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Saved:
    """Where a run stands: `step` steps of stage `stage` are done.

    `settings` must be the same to go on; `resumed` counts how often that was done. `form_losses` are those of the last
    steps.
    """

    settings: dict[str, int]
    stage: int = 0
    step: int = 0
    seconds: float = 0.0
    resumed: int = 0
    losses: list[float] = field(default_factory=list)
    form_losses: dict[str, float] = field(default_factory=dict)


def save_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: Saved) -> None:
    """Write the file `path`, by a rename at the end."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[_WEIGHT + name] = parameter.detach().contiguous()
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}/{name}"] = value.contiguous()
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata={"run": json.dumps(asdict(run))})
    part.replace(path)


def load_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, int]) -> Saved:
    """Fill `model` and `optimizer` from the file `path`. SystemExit if it is of other settings, or no such file."""
    try:
        with safe_open(path, "pt") as file:
            run = Saved(**json.loads((file.metadata() or {})["run"]))
            if run.settings != settings:
                raise SystemExit(f"{path} is of a run with {run.settings}, this one has {settings}")
            known = set(file.keys())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(_WEIGHT + name))
                    if f"step/{name}" in known:  # it had a gradient
                        optimizer.state[parameter] = {m: file.get_tensor(f"{m}/{name}") for m in _MOMENTS}
    except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} is no state of a run: {error}") from None
    run.resumed += 1
    return run
