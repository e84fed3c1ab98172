"""torchvision's wheels are built for CUDA: beside a CPU build of torch their compiled part does not load, and then the
package cannot be imported for lack of two operators' names."""

from __future__ import annotations

import importlib.util

import torch

_LIBRARIES: list[torch.library.Library] = []


def declare_operators() -> None:
    """Declare these names, if torchvision is installed; its Python part works then. Before anything imports it."""
    if importlib.util.find_spec("torchvision") is None or torch.cuda.is_available():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARIES.append(library)
