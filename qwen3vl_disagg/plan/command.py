"""`qwen3vl-disagg plan`: options in, a report out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import msgspec

from qwen3vl_disagg.checkpoint import read_config
from qwen3vl_disagg.checkpoint.download import model_name, resolve_model_folder
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.options import PlanOptions
from qwen3vl_disagg.plan.fit import FITTED, STAGES, compare, fit, read_measurements
from qwen3vl_disagg.plan.hardware import load_hardware
from qwen3vl_disagg.plan.presets import PRESETS
from qwen3vl_disagg.plan.report import Report, Subject
from qwen3vl_disagg.plan.sizing import MAX_RANKS, Split, Workload, best, plan
from qwen3vl_disagg.processing.patches import ImageProcessor, smart_resize

MAX_SIDE = 1 << 16


def run_plan(options: PlanOptions) -> int:
    """Run the command. InputError for what cannot be."""
    report = make_report(options)
    if options.json:
        print(msgspec.json.encode(report.to_builtins()).decode())
    else:
        print(report.to_details() if options.details else report.to_text())
    return 0


def make_report(options: PlanOptions) -> Report:
    """Everything that the options ask for. InputError naming what is wrong."""
    if not 1 <= options.replicas <= MAX_RANKS or options.gpus % options.replicas:
        message = f"--replicas {options.replicas}: must divide the {options.gpus} ranks"
        raise InputError(message, param="replicas")
    options.check()
    if options.fit_on and options.fit is None:
        raise InputError("--fit-on goes with --fit", param="fit-on")
    subject = _fitted(options) if options.fit is not None else _given(options)
    load = _workload(options, subject)
    mine = _shared(load, options.replicas)
    splits = _plan(subject, mine, options.gpus // options.replicas, options)
    shown = most = best(splits, mine)
    if options.split is not None:
        named = {split.name: split for split in splits}
        if options.split not in named:
            message = (
                f"--split {options.split}: must be E+L, encode and language ranks that add up to {len(splits) + 1}"
            )
            raise InputError(message, param="split")
        shown = named[options.split]
    return Report(subject, mine, splits, shown, options.replicas, most, _per_host(subject, load, options), options)


def _plan(subject: Subject, load: Workload, num_ranks: int, options: PlanOptions) -> list[Split]:
    return plan(
        subject.config,
        subject.hardware,
        load,
        num_ranks,
        dtype=subject.dtype,
        is_int8=subject.is_int8,
        dispatch=options.dispatch,
        settings=options,
    )


def _per_host(subject: Subject, load: Workload, options: PlanOptions) -> Split | None:
    """The best split of one system on each host, where the plan is for systems larger than that."""
    size = subject.hardware.units_per_host
    if size is None or size < 2 or options.gpus % size or options.gpus // options.replicas <= size:
        return None
    mine = _shared(load, options.gpus // size)
    return best(_plan(subject, mine, size, options), mine)


def _shared(load: Workload, replicas: int) -> Workload:
    """One system's part of the requests."""
    rate = None if load.requests_s is None else load.requests_s / replicas
    return replace(load, concurrency=-(-load.concurrency // replicas), requests_s=rate)


def _given(options: PlanOptions) -> Subject:
    """Model and machine by name."""
    if options.preset is not None and options.model is not None:
        raise InputError("--preset and --model: one of both", param="preset")
    if options.preset is not None:
        if options.preset not in PRESETS:
            raise InputError(f"--preset {options.preset}: must be one of {', '.join(PRESETS)}", param="preset")
        name, config, folder = options.preset, PRESETS[options.preset], None
    else:
        folder = resolve_model_folder(options.model, weights=False)
        name, config = model_name(folder), read_config(folder)
    dtype = config.dtype if options.dtype == "auto" else options.dtype
    hardware = load_hardware(options.hardware or "h200")
    return Subject(name, config, dtype, options.quantize == "int8", hardware, folder)


def _fitted(options: PlanOptions) -> Subject:
    """Model and machine from measurements."""
    for name in ("model", "preset"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name}: the model is that of --fit {options.fit}", param=name)
    if options.dtype != "auto" or options.quantize != "none":
        raise InputError(f"--dtype and --quantize are those of --fit {options.fit}", param="fit")
    measured, config = read_measurements(options.fit or Path())
    names = options.fit_on or tuple(split.name for split in measured.splits)
    base = None if options.hardware is None else load_hardware(options.hardware)
    if base is not None and base.is_cuda != measured.is_cuda:
        raise InputError(
            f"--hardware {options.hardware} is not the kind of machine that was measured", param="hardware"
        )
    hardware = fit(measured, config, names, base)
    others = [split.name for split in measured.splits if split.name not in names]
    compared = compare(measured, config, hardware, others)
    costs, fitted = hardware.costs(measured.dtype), {*FITTED, *(cost for costs in STAGES.values() for cost in costs)}
    return Subject(
        measured.model,
        config,
        measured.dtype,
        measured.is_int8,
        hardware,
        compared=compared,
        costs={cost: seconds for cost, seconds in costs.items() if cost in fitted},
    )


def _workload(options: PlanOptions, subject: Subject) -> Workload:
    if options.concurrency is not None and options.requests_s is not None:
        raise InputError("--concurrency and --requests-s: one of both", param="concurrency")
    return Workload(
        images=options.images,
        visual_tokens=_tokens_of(options, subject) if options.visual_tokens is None else options.visual_tokens,
        text_tokens=options.text_tokens,
        output_tokens=options.output_tokens,
        concurrency=32 if options.concurrency is None else options.concurrency,
        requests_s=options.requests_s,
    )


def _tokens_of(options: PlanOptions, subject: Subject) -> int:
    """Visual tokens of an image of the size given, resized as the checkpoint says; a preset has no bounds."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", options.image_size)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise InputError(f"--image-size {options.image_size}: must be WxH in pixels, as 1024x768", param="image-size")
    vision = subject.config.vision
    if subject.folder is not None:
        frames, rows, columns = ImageProcessor.from_folder(subject.folder, vision).grid(width, height)
        return frames * rows * columns // vision.merge_unit
    factor = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(height, width, factor, factor * factor, MAX_SIDE * MAX_SIDE)
    return (height // factor) * (width // factor)
