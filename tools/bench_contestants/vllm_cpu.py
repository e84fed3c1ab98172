"""vLLM in an environment of its own, through its offline engine: `add_request` and `step`.

Caches of prefixes and of processed images are off: no prompt and no image comes twice. The tower is timed inside
vLLM's own worker process (`vllm_tower.py`), so that all contestants are asked the same question.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import vllm  # type: ignore[import-not-found]
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

from tools.bench_contestants.worker import Setup, serve

EMBED = (
    "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
)


class Vllm:
    def __init__(self, setup: Setup) -> None:
        self.setup, self._num_requests = setup, 0
        self.llm = LLM(
            setup.folder,
            runner="pooling" if setup.task == "embed" else "auto",
            load_format="dummy" if setup.is_random else "auto",
            enforce_eager=setup.compile == "off",
            max_model_len=setup.max_tokens,
            max_num_seqs=setup.max_batch,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            # Profiling with images fails to compile on the CPU; it only decides how much memory is for keys and values.
            skip_mm_profiling=True,
            limit_mm_per_prompt={"image": 1, "video": 0},
            worker_extension_cls="tools.bench_contestants.vllm_tower.TowerTimer",
        )

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "vllm": vllm.__version__, "compile": self.setup.compile}

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        sampling = SamplingParams(
            max_tokens=new_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine, stamps = self.llm.llm_engine, dict[str, list[float]]()
        for prompt in prompts:
            request_id = str(self._num_requests)
            self._num_requests += 1
            engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
            stamps[request_id] = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                stamps[output.request_id] += [now] * len(output.outputs[0].token_ids)
        return list(stamps.values())

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        return self.decode([prompt], 1)[0][0] - started

    def vision(self, grid: tuple[int, int, int], patch_dim: int, seed: int) -> float:
        return self.llm.collective_rpc("time_tower", args=(list(grid), patch_dim, seed))[0]

    def embed(self, files: list[str]) -> dict[str, Any]:
        started = time.perf_counter()
        prompts = [{"prompt": EMBED, "multi_modal_data": {"image": Image.open(file)}} for file in files]
        found = self.llm.embed(prompts, use_tqdm=False)
        return {"seconds": time.perf_counter() - started, "first": list(found[0].outputs.embedding)}


if __name__ == "__main__":
    serve(Vllm)
