"""Train the small checkpoint inside the package, on CPU, from a seed, and measure what it learned.

    python recipes/train_tiny.py --out qwen3vl_disagg/assets/tiny --state /tmp/tiny.state
    python recipes/train_tiny.py --out qwen3vl_disagg/assets/tiny --evaluate-only

It takes an hour and a quarter on two cores; ended in the middle, the same command goes on from the last save of
--state.
docs/tiny.md has the loss curve and the figures.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qwen3vl_disagg.assets import tiny_folder
from qwen3vl_disagg.model import Qwen3VLMoeForConditionalGeneration
from qwen3vl_disagg.model.moe import Experts
from tools.training.evaluate import Report, evaluate
from tools.training.folder import load_model, read_config, save_weights, write_settings
from tools.training.forms import FORMS
from tools.training.lessons import COUNTING, FINISHING, SEARCHING, SEEING, Lesson, Lessons, Mix, lesson_loss
from tools.training.saved import Saved, load_run, save_run


@dataclass(frozen=True)
class Stage:
    """`share` of all steps with one mix of questions and an optimiser of its own.

    The learning rate rises to `peak` in a tenth of the schedule and falls along a cosine; the stage uses the first
    `cycle` of it.
    """

    mix: Mix
    share: float
    peak: float
    cycle: float = 1.0

    def learning_rate(self, step: int, num_steps: int) -> float:
        """That of `step` of the stage's `num_steps`."""
        total = num_steps / self.cycle
        rise = 0.1 * total
        if step < rise:
            low, high, done = self.peak / 25, self.peak, step / rise
            return high + (low - high) * (1 + math.cos(math.pi * done)) / 2
        return self.peak * (1 + math.cos(math.pi * min(1.0, (step - rise) / (total - rise)))) / 2


STAGES = (
    Stage(SEEING, share=30 / 90, peak=1.2e-3, cycle=6 / 11),
    Stage(SEARCHING, share=28 / 90, peak=1.0e-3),
    Stage(FINISHING, share=14 / 90, peak=7e-4),
    Stage(COUNTING, share=18 / 90, peak=7e-4),
)

MIN_STEPS = 36  # a few for each stage
LINE_EVERY = 100


@dataclass(frozen=True)
class Settings:
    """Train the small checkpoint."""

    out: Path = field(default_factory=tiny_folder)
    """The checkpoint's folder."""
    steps: int = 9000
    """Of all stages together."""
    state: Path | None = None
    """File for what a run needs to go on; if it is there, the run goes on from it."""
    seed: int = 0
    num_scenes: int = 32
    """Balanced questions in a batch; each brings others about the same pictures."""
    weight_decay: float = 0.01
    evaluate_only: bool = False
    evaluation_seed: int = 1_000_003
    """Seed of the unseen scenes."""
    evaluation_count: int = 500
    save_every: int = 300
    """Steps between saves of the weights, and of the state."""
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


def train(settings: Settings) -> Saved:
    """Write the folder; returns where the run stands at its end."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    write_settings(settings.out)
    model = Qwen3VLMoeForConditionalGeneration(read_config(settings.out))
    for module in model.modules():
        if isinstance(module, Experts):
            module.impl = "loop"  # its backward is the faster one on CPU
    initialise(model)
    run = Saved({"steps": settings.steps, "seed": settings.seed, "num_scenes": settings.num_scenes})
    optimizer = make_optimizer(model, settings)
    if settings.state is not None and settings.state.is_file():
        run = load_run(settings.state, model, optimizer, run.settings)
        goes_on = f"goes on with stage {run.stage + 1} at its step {run.step}" if run.stage < len(STAGES) else "is over"
        print(f"the run of {settings.state} {goes_on}", file=sys.stderr, flush=True)
        save(model, optimizer, settings, run)  # --out may be another folder now, and the run may be over
    while run.stage < len(STAGES):
        if run.step == 0:
            optimizer = make_optimizer(model, settings)
        stage = STAGES[run.stage]
        seed = f"{settings.seed + run.stage}" + (f" from {run.step}" if run.step else "")
        lessons = Lessons(settings.out, seed, settings.num_scenes, stage.mix)
        loader = iter(DataLoader(lessons, batch_size=None, num_workers=1))
        run_stage(model, optimizer, stage, loader, settings, run)
        run.stage, run.step = run.stage + 1, 0
        save(model, optimizer, settings, run)
    return run


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), foreach=True)


def run_stage(
    model: Qwen3VLMoeForConditionalGeneration,
    optimizer: torch.optim.AdamW,
    stage: Stage,
    loader: Iterator[Lesson],
    settings: Settings,
    run: Saved,
) -> None:
    """Train from `run.step` to the end of the stage, add what each step gave to `run`, save now and then."""
    num_steps = stage_steps(settings, run.stage)
    started, begun = time.monotonic(), run.seconds
    first = last = len(run.losses)
    parts = torch.zeros(len(FORMS), 2)
    while run.step < num_steps:
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(run.step, num_steps)
        loss, step_parts = lesson_loss(model, next(loader))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.losses.append(loss.item())
        run.step += 1
        run.seconds = begun + time.monotonic() - started
        parts += step_parts
        if not math.isfinite(run.losses[-1]):
            raise SystemExit(f"loss {run.losses[-1]} at step {run.step} of stage {run.stage + 1}")
        if len(run.losses) % LINE_EVERY == 0 or run.step == num_steps:
            run.form_losses = {
                name: round(total / weight, 5)
                for name, (total, weight) in zip(FORMS, parts.tolist(), strict=True)
                if weight
            }
            speed = (len(run.losses) - first) / (run.seconds - begun)
            print_progress(settings, run, sum(run.losses[last:]) / (len(run.losses) - last), speed)
            last = len(run.losses)
            parts.zero_()
        if run.step % settings.save_every == 0 and run.step < num_steps:
            save(model, optimizer, settings, run)


def stage_steps(settings: Settings, stage: int) -> int:
    return round(settings.steps * STAGES[stage].share)


def print_progress(settings: Settings, run: Saved, loss: float, speed: float) -> None:
    """A line on stderr: the mean loss since the last one, all and by form, and how long it will take."""
    total = sum(stage_steps(settings, stage) for stage in range(len(STAGES)))
    done = len(run.losses)
    forms = ", ".join(f"{name} {value:.4f}" for name, value in run.form_losses.items())
    print(
        f"step {done}/{total}, stage {run.stage + 1}, loss {loss:.4f} ({forms}), "
        f"{speed:.2f} steps/s, {(total - done) / speed / 60:.0f} min left",
        file=sys.stderr,
        flush=True,
    )


def save(
    model: Qwen3VLMoeForConditionalGeneration, optimizer: torch.optim.AdamW, settings: Settings, run: Saved
) -> None:
    save_weights(model, settings.out / "model.safetensors")
    if settings.state is not None:
        save_run(settings.state, model, optimizer, run)
    if settings.plot is not None:
        settings.plot.with_suffix(".json").write_text(json.dumps([round(x, 5) for x in run.losses]))


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


def print_tables(report: Report) -> None:
    """As docs/tiny.md has them."""
    print("| kind | exact | text first | most frequent answer |\n|---|---|---|---|")
    for kind, row in report.kinds.items():
        print(f"| {kind} | {row.exact:.1%} | {report.text_first[kind]:.1%} | {row.most_frequent:.1%} |")
    print(f"| **all** | **{report.exact:.1%}** | **{report.text_first['all']:.1%}** | {report.most_frequent:.1%} |")
    print(f"\nPairs with the text between the images: {report.between:.1%}.")
    print("\n| form | asked | right | in that form |\n|---|---|---|---|")
    for name, form in report.forms.items():
        print(f"| {name} | {form.count} | {form.right:.1%} | {form.formed:.1%} |")
    print("\n| with spoiled visual rows | exact |\n|---|---|")
    for name, exact in report.ablations.items():
        print(f"| {name.replace('_', ' ')} | {exact:.1%} |")


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.steps < MIN_STEPS:
        raise SystemExit(f"--steps must be at least {MIN_STEPS}, got {settings.steps}")
    for name in ("num_scenes", "save_every", "threads", "evaluation_count"):
        if getattr(settings, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(settings, name)}")
    record: dict[str, object] = {}
    record_path = settings.out / "training.json"
    if settings.evaluate_only:
        torch.set_num_threads(settings.threads)
        if record_path.is_file():
            record = json.loads(record_path.read_text())
    else:
        run = train(settings)
        if settings.plot is not None:
            draw_curve(run.losses, settings.plot)
        record = {
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "hardware": f"{os.cpu_count()} x {platform.machine()} CPU, {settings.threads} threads",
            "torch": torch.__version__,
            "steps": settings.steps,
            "seed": settings.seed,
            "minutes": round(run.seconds / 60, 1),
            "resumed": run.resumed,
            "final_loss": round(sum(run.losses[-100:]) / len(run.losses[-100:]), 5),
            "final_losses": run.form_losses,
        }
    model = load_model(settings.out)
    record["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    report = evaluate(model, settings.out, settings.evaluation_seed, settings.evaluation_count)
    record["evaluation"] = asdict(report)
    record_path.write_text(json.dumps(record, indent=2) + "\n")
    print_tables(report)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
