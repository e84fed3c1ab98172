"""How much room keys and values get: the rule by hand, and that what is planned is what serves."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from qwen3vl_disagg import LLM
from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.rendezvous import Layout, RankContext, World
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.host import available_bytes
from qwen3vl_disagg.core.settings import EngineSettings, ModelOptions
from qwen3vl_disagg.launch.bodies import engine_options, rank_room
from qwen3vl_disagg.options import PlanOptions, ServeOptions
from qwen3vl_disagg.parallel.kv_room import KvRoom, kv_room, planned_room, weights_on_host
from qwen3vl_disagg.parallel.sizes import SizedModel
from qwen3vl_disagg.plan.command import make_report
from qwen3vl_disagg.plan.hardware import BUILT_IN
from qwen3vl_disagg.plan.presets import IMAGE_ROWS, PRESETS
from recipes import serve
from tests.support.memory_maps import settled

GIB = 2**30
B30 = SizedModel(PRESETS["30b-a3b"], 2)
TOKEN = 2 * 48 * 4 * 128 * 2
"""Keys and values of a token of 30b-a3b in bfloat16."""
AUTO = EngineSettings()


def step_bytes(model: SizedModel, ranks: int, settings: EngineSettings) -> float:
    parts = model.language_memory(ranks, settings.max_running, 0, settings.max_prefill_tokens)
    graphs = model.captured_bytes(settings.max_running, ranks)
    return parts["room for visual rows"] + parts["activations"] + graphs


def test_a_card_by_hand():
    free, total = 100 * GIB, 141e9
    expected = int(free - 0.1 * total - step_bytes(B30, 6, AUTO)) // (64 * TOKEN)
    assert kv_room(B30, AUTO, free_bytes=free, total_bytes=total, num_language=6).num_pages == expected
    # Nothing is left: one page, so that the engine stands, and says of each request how much too long it is.
    assert kv_room(B30, AUTO, free_bytes=GIB, total_bytes=total).num_pages == 1


def test_captured_steps_of_a_card_by_hand():
    """Graphs of 1, 2, 4, 8, 16, 24 and 32 rows; none on a CPU."""
    text = B30.config.text
    activations = B30.language_memory(6, 0, 0, 32)["activations"]
    found = B30.captured_bytes(32, 6)
    assert found == activations + 32 * text.vocab_size * 50 + 7 * 48 * 2**19
    assert 0.3 * GIB < found < GIB
    assert SizedModel(PRESETS["30b-a3b"], 2, is_cuda=False).captured_bytes(32, 6) == 0


def test_a_host_is_shared_by_its_language_ranks_and_half_of_it_stays_free():
    model = SizedModel(PRESETS["30b-a3b"], 2, is_cuda=False)
    rooms = [kv_room(model, AUTO, free_bytes=200 * GIB, num_language=4, num_sharers=n) for n in (1, 2, 4)]
    for room, share in zip(rooms, (100, 50, 25), strict=True):
        assert room.token_bytes == TOKEN
        assert 0 <= share * GIB - step_bytes(model, 4, AUTO) - room.num_bytes < room.page_size * room.token_bytes
    combined = kv_room(model, AUTO, free_bytes=200 * GIB, image_rows=IMAGE_ROWS)
    assert combined.num_bytes < kv_room(model, AUTO, free_bytes=200 * GIB).num_bytes


def test_ranks_with_memory_of_their_own_share_nothing():
    shares = {"free_bytes": 200 * GIB, "encode": range(1), "language": range(1, 5)}
    model = SizedModel(PRESETS["30b-a3b"], 2, is_cuda=False)
    own = planned_room(model, AUTO, 2, **shares, beside=range(2, 3))
    weights = weights_on_host(model, range(1, 5), range(1), range(2, 3))
    assert own == kv_room(model, AUTO, free_bytes=200 * GIB - weights, num_language=4)
    assert own.num_bytes > planned_room(model, AUTO, 2, **shares, beside=range(5)).num_bytes


def test_never_more_than_all_running_requests_can_use():
    small = replace(B30.config, text=replace(B30.config.text, max_position_embeddings=1000))
    model = SizedModel(small, 2)
    settings = EngineSettings(max_running=3, page_size=16)
    assert kv_room(model, settings, free_bytes=1e12, total_bytes=1e12).num_pages == 3 * 63
    given = EngineSettings(kv_cache_gib=1.0, page_size=32)
    assert kv_room(B30, given, free_bytes=0.0).num_pages == GIB // (32 * TOKEN)


def test_what_stands_in_the_way_of_the_largest_image():
    room = KvRoom(num_pages=100, page_size=16, token_bytes=GIB // 1600, context=20000)
    assert room.why_not(1600 - 64) is None
    assert "room for 1,600 tokens: --kv-cache-gib 10." in room.why_not(IMAGE_ROWS)
    assert "context is 20,000" in room.why_not(20000)
    assert str(room).startswith("1,600 tokens of keys and values (100 pages of 16, 1.00 GiB)")


@pytest.mark.parametrize("preset", ["30b-a3b", "235b-a22b"])
def test_the_largest_image_fits_every_published_size_with_experts(monkeypatch, capsys, preset):
    world = 8 if preset == "30b-a3b" else 16
    args = ["serve.py", "--dry-run", "--preset", preset, "--hardware", "h200", "--world", str(world), "--json"]
    monkeypatch.setattr(sys, "argv", args)
    assert serve.main() == 0
    made = json.loads(capsys.readouterr().out)
    assert made["image_rows"] == IMAGE_ROWS == 16_777_216 // 32**2
    assert made["image_problem"] is None
    caches = [rank["kv_cache"] for rank in made["ranks"] if rank["role"] == "language"]
    assert min(cache["tokens"] for cache in caches) > 10 * IMAGE_ROWS
    # All of it is on a card: weights, keys and values, and more than a tenth of the card beside.
    for rank in made["ranks"]:
        assert rank["bytes"] + rank.get("kv_cache", {"bytes": 0})["bytes"] < 0.9 * BUILT_IN["h200"].memory_bytes


def test_plan_and_dry_run_say_the_same(monkeypatch, capsys):
    options = PlanOptions(preset="30b-a3b", gpus=8, max_running=7, page_size=32, max_prefill_tokens=2048)
    report = make_report(options)
    split = next(split for split in report.splits if split.name == "2+6")
    sizes = ["--max-running", "7", "--page-size", "32", "--max-prefill-tokens", "2048"]
    monkeypatch.setattr(
        sys, "argv", ["serve.py", "--dry-run", "--preset", "30b-a3b", "--hardware", "h200", "--json", *sizes]
    )
    assert serve.main() == 0
    made = json.loads(capsys.readouterr().out)
    assert made["ranks"][2]["kv_cache"]["tokens"] == split.room.num_tokens
    assert split.running <= 7 * 6
    assert f"{split.room}" in replace(report, shown=split).to_details()
    assert '"kv_cache"' in msgspec.json.encode(report.to_builtins()).decode()


def test_a_plan_runs_no_more_than_there_is_room_for():
    options = PlanOptions(preset="30b-a3b", gpus=8, kv_cache_gib=1.0, concurrency=100, visual_tokens=1024)
    for split in make_report(options).splits:
        assert split.room.num_pages == GIB // (64 * TOKEN)
        assert split.running == split.language * (split.room.num_pages // 21)  # 1,344 tokens each
    tight = make_report(replace(options, visual_tokens=IMAGE_ROWS))
    assert all(split.missing_bytes > 0 for split in tight.splits)


def make_context(model: ModelOptions, rank: int, world: int, free_bytes: int = 0) -> RankContext:
    where = World(rank, world, rank, world, free_bytes=free_bytes)
    return RankContext(rank, Layout.of(world), ("127.0.0.1", 1), "token", ServeOptions(model=model), where)


@pytest.mark.parametrize("world", [1, 4, 8])
def test_what_a_rank_takes_is_what_was_planned(world):
    free = 3 * GIB
    options = ModelOptions(device="cpu", max_running=512)
    layout = Layout.of(world)
    setups = [RankSetup.of(make_context(options, rank, world, free_bytes=free)) for rank in layout.language_ranks]
    rows = setups[0].processor.max_rows if world == 1 else 0
    rooms = {rank_room(setup) for setup in setups}
    assert len(rooms) == 1
    [room] = rooms
    model = SizedModel(setups[0].config, 4, is_cuda=False)
    weights = weights_on_host(model, layout.language_ranks, layout.encode_ranks, range(world))
    num = len(layout.language_ranks)
    expected = kv_room(model, options, free_bytes=free - weights, num_language=num, num_sharers=num, image_rows=rows)
    assert room == expected
    assert num * room.num_bytes < free / 2


def test_what_the_command_line_says_reaches_the_engine():
    options = ModelOptions(device="cpu", max_running=5, max_prefill_tokens=48, page_size=8, kv_cache_gib=0.5)
    made = engine_options(RankSetup.of(make_context(options, 1, 2)))
    assert (made.max_running, made.max_prefill_tokens, made.page_size, made.kv_cache_gib) == (5, 48, 8, 0.5)
    assert made.chunk_tokens == 48  # of a server's 64, no more than a step has


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_reckoned_is_what_is_taken(dtype):
    engine = LLM(dtype=dtype, kv_cache_gib=0.001, page_size=8).engine
    pools = [pool for cache in engine.runner.caches for pool in cache]
    assert {pool.dtype for pool in pools} == {getattr(torch, dtype)}
    assert sum(pool.nbytes for pool in pools) == engine.room.num_bytes


def test_python_takes_them_too():
    llm = LLM(kv_cache_gib=0.001, max_running=2, page_size=8, max_prefill_tokens=100)
    pool = llm.engine.scheduler.pool
    token_bytes = llm.engine.room.token_bytes
    assert (pool.page_size, pool.num_pages) == (8, int(0.001 * GIB) // (8 * token_bytes))
    assert llm.engine.runner.caches[0][0].shape[0] == pool.num_pages * 8
    limits = llm.engine.scheduler.limits
    assert (limits.max_running, limits.max_prefill_tokens) == (2, 100)
    with pytest.raises(InputError, match=r"room for \d+ \(--kv-cache-gib\)"):
        llm.chat([[{"role": "user", "content": "word " * 600}]])
    with pytest.raises(InputError, match="--page-size 0"):
        LLM(page_size=0)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("kv_cache_gib", 0),
        ("kv_cache_gib", -1.0),
        ("kv_cache_gib", float("nan")),
        ("kv_cache_gib", float("inf")),
        ("kv_cache_gib", "all"),
        ("kv_cache_gib", True),
        ("max_running", 0),
        ("max_running", 5000),
        ("max_running", 1.5),
        ("max_prefill_tokens", 0),
        ("page_size", -16),
        ("page_size", 10**6),
    ],
)
def test_sizes_that_cannot_be(name, bad):
    with pytest.raises(InputError) as caught:
        EngineSettings(**{name: bad}).check()
    assert caught.value.param == name.replace("_", "-")


def test_memory_of_the_host_and_of_a_control_group(tmp_path):
    assert 2**20 < available_bytes() < 2**50
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    assert available_bytes(tmp_path) == 1000 * 1024
    group = tmp_path / "sys/fs/cgroup/some/group"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/some/group\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    assert available_bytes(tmp_path) == 1000 * 1024
    (group / "memory.max").write_text("9000\n")
    (group / "memory.stat").write_text("anon 3\ninactive_file 700\n")
    assert available_bytes(tmp_path) == 9000 - 5000 + 700
    assert available_bytes(tmp_path / "nothing") == 0


def test_the_tightest_group_counts(tmp_path):
    """Batch systems limit a job and leave the groups of its tasks without a limit of their own."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    1000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/slurm/job/step/task\n")
    top = tmp_path / "sys/fs/cgroup"
    (top / "slurm/job/step/task").mkdir(parents=True)
    for group, limit, used, cache in (
        ("slurm", "900000", "100000", 0),
        ("slurm/job", "50000", "30000", 1000),
        ("slurm/job/step", "80000", "30000", 1000),
        ("slurm/job/step/task", "max", "20000", 1000),
    ):
        (top / group / "memory.max").write_text(limit)
        (top / group / "memory.current").write_text(used)
        (top / group / "memory.stat").write_text(f"anon 3\ninactive_file {cache}\n")
    assert available_bytes(tmp_path) == 50000 - 30000 + 1000


@pytest.mark.parametrize("mounted", ["", "docker/abc"])
def test_groups_of_the_first_version(tmp_path, mounted):
    """Within a container the group's own folder is where all of them are mounted."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable:    1000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("11:cpu,cpuacct:/x\n7:memory:/docker/abc\n")
    for group, limit, used, cache in (("", 2**63 - 4096, 70000, 0), (mounted, 60000, 40000, 500)):
        folder = tmp_path / "sys/fs/cgroup/memory" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"inactive_file 9\ntotal_inactive_file {cache}\n")
    assert available_bytes(tmp_path) == 60000 - 40000 + 500


def test_room_that_nobody_writes_costs_nothing():
    before = torch.empty(0).element_size() and _resident()
    llm = LLM(max_running=512)
    assert llm.engine.room.num_bytes > 2**30
    assert _resident() - before < 2**29


def _resident() -> int:
    settled()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
