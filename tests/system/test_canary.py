"""A rank that computes what its checkpoint does not say is refused before the server is ready, and the log names the
part."""

from __future__ import annotations

import os
import time

from tests.support.server import REPO, Job, free_port

PLANTED = """
import dataclasses, sys
sys.path.insert(0, {repo!r})
from qwen3vl_disagg.cluster.slots import leave_process
from qwen3vl_disagg.encode.worker import EncodeWorker
from qwen3vl_disagg.launch.worker import serve

own = EncodeWorker.encode

def exchanged(self, *args):
    items = own(self, *args)
    width = self.config.text.hidden_size
    return [dataclasses.replace(item, deepstack=item.deepstack.roll(width, 1)) for item in items]

EncodeWorker.encode = exchanged
leave_process(serve())
"""


def test_an_encode_rank_whose_levels_are_exchanged_is_refused_before_the_job_is_ready(tmp_path):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(repo=str(REPO)))
    with Job(os.path.relpath(script, REPO / "recipes"), 2, "--port", str(free_port())) as job:
        line = job.wait_for(r"encode rank 0: canary: DeepStack level \d: they are DeepStack level \d", 90)
        assert "DeepStack level 0: they are DeepStack level 2" in line[0]
        job.wait_for("encode rank 0: exit 78; the job ends", 30)
        assert "ready:" not in job.output()
        job.remember_pids()
        ended = time.monotonic()
        assert job.process.wait(30) != 0
        assert time.monotonic() - ended < 15, "the frontend waits for a rank that does not come"
        assert "ready:" not in job.output()
    assert not job.alive()
