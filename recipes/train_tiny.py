"""Train the small checkpoint inside the package, on CPU, from a seed, and measure what it learned.

    python recipes/train_tiny.py --out qwen3vl_disagg/assets/tiny
    python recipes/train_tiny.py --out qwen3vl_disagg/assets/tiny --evaluate-only

It takes under an hour on two cores. docs/tiny.md has the loss curve and the figures.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.assets import tiny_folder
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.model.moe import Experts
from tools.training.evaluate import Report, evaluate
from tools.training.folder import load_model, load_weights, read_config, save_weights, write_settings
from tools.training.lessons import FINISHING, SEARCHING, SEEING, Lesson, Lessons, Mix, lesson_loss


@dataclass(frozen=True)
class Stage:
    """`share` of all steps with one mix of questions and an optimiser of its own.

    The learning rate rises to `peak` and falls along a cosine; the stage uses the first `cycle` of that schedule.
    """

    mix: Mix
    share: float
    peak: float
    cycle: float = 1.0


STAGES = (
    Stage(SEEING, share=5 / 12, peak=1.2e-3, cycle=6 / 11),
    Stage(SEARCHING, share=5 / 12, peak=1.0e-3),
    Stage(FINISHING, share=1 / 6, peak=7e-4),
)

MIN_STEPS = 240  # the rise of each stage's learning rate needs a few


@dataclass(frozen=True)
class Settings:
    """Train the small checkpoint."""

    out: Path = field(default_factory=tiny_folder)
    """The checkpoint's folder."""
    steps: int = 7200
    """Of all stages together."""
    from_stage: int = 0
    """Start with this stage (0, 1 or 2), from the weights in `out`."""
    seed: int = 0
    num_scenes: int = 32
    """Balanced questions in a batch; each brings others about the same pictures."""
    weight_decay: float = 0.01
    evaluate_only: bool = False
    evaluation_seed: int = 1_000_003
    """Seed of the unseen scenes."""
    evaluation_count: int = 500
    save_every: int = 300
    """Steps between saves of the weights."""
    threads: int = 2
    plot: Path | None = None
    """Where to draw the loss curve (PNG or SVG by its suffix); needs matplotlib."""


def initialise(model: nn.Module) -> None:
    """Linears at 1 / sqrt(fan in), the outputs of residual branches at half of that; with 0.02 it learns little."""
    residual_ends = ("o_proj.weight", "down_proj", "attn.proj.weight", "mlp.linear_fc2.weight")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "embed_tokens" in name or "pos_embed" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() >= 2:
            fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
            std = fan_in**-0.5 * (0.5 if name.endswith(residual_ends) else 1.0)
            nn.init.normal_(parameter, std=std)


def train(settings: Settings) -> list[float]:
    """Write the folder; returns the loss of each step."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    weights = settings.out / "model.safetensors"
    write_settings(settings.out)
    model = Qwen3VLMoeForConditionalGeneration(read_config(settings.out))
    for module in model.modules():
        if isinstance(module, Experts):
            module.impl = "loop"  # its backward is the faster one on CPU
    initialise(model)
    if settings.from_stage:
        load_weights(model, weights)
    losses: list[float] = []
    for number, stage in list(enumerate(STAGES))[settings.from_stage :]:
        lessons = Lessons(settings.out, settings.seed + number, settings.num_scenes, stage.mix)
        loader = iter(DataLoader(lessons, batch_size=None, num_workers=1))
        run_stage(model, stage, loader, settings, losses)
    return losses


def run_stage(
    model: Qwen3VLMoeForConditionalGeneration,
    stage: Stage,
    loader: Iterator[Lesson],
    settings: Settings,
    losses: list[float],
) -> None:
    """Train, append each step's loss to `losses`, save now and then and at the end."""
    steps = round(settings.steps * stage.share)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.peak, betas=(0.9, 0.98), foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stage.peak, total_steps=math.ceil(steps / stage.cycle), pct_start=0.1, cycle_momentum=False
    )
    with tqdm(total=steps, unit="step", mininterval=5, file=sys.stderr) as bar:
        for step in range(steps):
            loss = lesson_loss(model, next(loader))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"loss {losses[-1]} at step {step}")
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
            bar.update()
            if (step + 1) % settings.save_every == 0 or step + 1 == steps:
                save_weights(model, settings.out / "model.safetensors")
                if settings.plot is not None:
                    settings.plot.with_suffix(".json").write_text(json.dumps([round(x, 5) for x in losses]))


def draw_curve(losses: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(losses) // 100)
    smooth = [sum(losses[max(0, i - window) : i + 1]) / (i + 1 - max(0, i - window)) for i in range(len(losses))]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot(losses, color="0.8", linewidth=0.5, label="each step")
    axes.plot(smooth, color="C0", linewidth=1.5, label=f"mean of {window + 1}")
    axes.set(xlabel="step", ylabel="loss (answer tokens)", yscale="log")
    axes.legend()
    axes.grid(True, which="both", linewidth=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def print_table(report: Report) -> None:
    print(f"{'kind':<12} {'n':>4} {'exact':>7} {'most frequent':>14}")
    for kind, row in report.kinds.items():
        print(f"{kind:<12} {row.count:>4} {row.exact:>7.1%} {row.most_frequent:>14.1%}")
    print(f"{'all':<12} {report.count:>4} {report.exact:>7.1%} {report.most_frequent:>14.1%}")
    for name, exact in report.ablations.items():
        print(f"{name:<24} {exact:>7.1%}")


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.steps < MIN_STEPS or not 0 <= settings.from_stage < len(STAGES):
        raise SystemExit(f"--steps must be at least {MIN_STEPS} and --from-stage in 0..{len(STAGES) - 1}")
    record: dict[str, object] = {}
    record_path = settings.out / "training.json"
    if settings.evaluate_only:
        torch.set_num_threads(settings.threads)
        if record_path.is_file():
            record = json.loads(record_path.read_text())
    else:
        started = time.monotonic()
        losses = train(settings)
        minutes = (time.monotonic() - started) / 60
        if settings.plot is not None:
            draw_curve(losses, settings.plot)
        record = {
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} x {platform.machine()} CPU, {settings.threads} threads",
            "torch": torch.__version__,
            "steps": settings.steps,
            "seed": settings.seed,
            "minutes": round(minutes, 1),
            "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 5),
        }
    model = load_model(settings.out)
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    report = evaluate(model, settings.out, settings.evaluation_seed, settings.evaluation_count)
    record["evaluation"] = asdict(report)
    record_path.write_text(json.dumps(record, indent=2) + "\n")
    print_table(report)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
