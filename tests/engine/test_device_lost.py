"""A GPU that takes no more work ends the rank; one whose memory is used up costs the requests of a step."""

from __future__ import annotations

import asyncio

import pytest
import torch

from qwen3vl_disagg.core.errors import DeviceLost
from qwen3vl_disagg.core.requests import SamplingParams
from qwen3vl_disagg.core.settings import EncodeOptions
from qwen3vl_disagg.encode.pipeline import EncodePipeline
from qwen3vl_disagg.engine.failures import StepFailed, fatal_where
from qwen3vl_disagg.model.moe import DispatchPlan
from qwen3vl_disagg.protocol.messages import RequestFailed
from tests.encode.test_encode_pipeline import ask, item_of, pull
from tests.support.engine import make_engine, run, token_ids
from tests.support.link_peers import FakeWorker
from tests.support.link_scenarios import make_image, running
from tests.support.link_scenarios import run as run_loop
from tests.support.random_model import random_language_model, small_config

LOST = [torch.AcceleratorError("CUDA error: an illegal memory access"), RuntimeError("CUDA error: unspecified launch")]
FULL = [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory")]


def failing(engine, kind: str, error: Exception) -> None:
    """The next step of that kind fails."""
    run_step = getattr(engine.runner, kind)

    def fail(*args):
        setattr(engine.runner, kind, run_step)
        raise error

    setattr(engine.runner, kind, fail)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("error", LOST)
def test_a_lost_device_ends_the_engine(kind, error):
    engine = make_engine(random_language_model(small_config(), seed=0))
    failing(engine, kind, error)
    engine.add("a", [10, 11, 12], [], SamplingParams(max_new_tokens=4))
    if kind == "decode":
        engine.step()
    with pytest.raises(DeviceLost, match="CUDA error"):
        engine.step()


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("error", FULL)
def test_memory_that_is_used_up_costs_the_requests_of_a_step(kind, error, caplog):
    engine = make_engine(random_language_model(small_config(), seed=0))
    failing(engine, kind, error)
    requests, sampling = {"a": ([10, 11, 12], [], [])}, SamplingParams(max_new_tokens=4, ignore_eos=True)
    assert isinstance(run(engine, requests, sampling)["a"][-1], RequestFailed)
    assert len(token_ids(run(engine, requests, sampling)["a"])) == 4


def test_where_ranks_step_together_it_is_told_from_a_failure_of_the_model():
    with pytest.raises(DeviceLost), fatal_where(DispatchPlan(2)):
        raise LOST[0]
    with pytest.raises(StepFailed), fatal_where(DispatchPlan(2)):
        raise FULL[0]


class Raising(FakeWorker):
    """Its tower raises, in place of naming what is wrong with an item."""

    error: BaseException | None = None

    def encode(self, batch, visual_token_ids):
        if self.error is not None:
            raise self.error
        return super().encode(batch, visual_token_ids)


@pytest.mark.parametrize(("error", "is_told"), [(LOST[0], True), (DeviceLost("gone"), True), (FULL[0], False)])
def test_the_tower_tells_whose_rank_ends(error, is_told):
    async def scenario() -> None:
        lost: list[DeviceLost] = []
        worker = Raising()
        worker.error = error
        pipeline = EncodePipeline(worker, pull, EncodeOptions(), on_lost=lost.append)
        with pytest.raises(Exception, match=r"CUDA|gone"):
            await ask(pipeline, item_of("x"))
        assert len(lost) == is_told
        pipeline.close()

    run_loop(scenario)


def test_an_encode_rank_ends_with_it():
    async def scenario() -> None:
        async with running() as system:
            body = await system.start_encode_rank(1)
            worker, image = system.workers[1], make_image(1, (64, 64))

            def fail(*_):  # not one that lives on, and what it went through with it
                raise torch.AcceleratorError("CUDA error: an illegal memory access")

            worker._encode_together = fail
            system.submit("a", image, encode_rank=1)
            async with asyncio.timeout(10):
                with pytest.raises(DeviceLost, match="illegal memory access"):
                    await body
            system.cancel("a")
            await system.kill(1)

    run_loop(scenario)
