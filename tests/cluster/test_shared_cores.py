"""Threads of ranks on one host: by who computes, as the file says that all of them map."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from qwen3vl_disagg.cluster.rank_setup import RankSetup
from qwen3vl_disagg.cluster.rendezvous import Layout, RankContext, World
from qwen3vl_disagg.cluster.shared_cores import MAX_RANKS, MOST_THREADS, STALE_S, SharedCores
from qwen3vl_disagg.core.settings import ModelOptions
from qwen3vl_disagg.launch.serve import cores_file
from qwen3vl_disagg.options import ServeOptions


class Rank:
    def __init__(self, file: Path, slot: int, clock, *, cores: int, share: int = 1) -> None:
        self.threads: list[int] = []
        self.cores = SharedCores(file, slot, cores=cores, share=share, set_threads=self.threads.append, clock=clock)

    def claim(self) -> int:
        self.cores.claim()
        return self.threads[-1]


@pytest.fixture
def now() -> list[float]:
    return [100.0]


def make(tmp_path, now, count, **options) -> list[Rank]:
    return [Rank(tmp_path / "cores", slot, lambda: now[0], **options) for slot in range(count)]


def test_who_computes_alone_has_all_cores(tmp_path, now):
    encode, language = make(tmp_path, now, 2, cores=2)
    assert encode.claim() == 2
    assert language.claim() == 1
    assert encode.claim() == 1
    language.cores.release()
    assert encode.claim() == 2


def test_threads_are_set_only_where_they_change(tmp_path, now):
    encode, language = make(tmp_path, now, 2, cores=8, share=4)
    for _ in range(3):
        encode.claim()
    language.claim()
    encode.claim()
    encode.claim()
    assert encode.threads == [8, 4]


def test_never_less_than_the_share_nor_more_than_was_measured(tmp_path, now):
    ranks = make(tmp_path, now, 6, cores=64, share=10)
    assert ranks[0].claim() == MOST_THREADS
    assert [rank.claim() for rank in ranks][-1] == 10
    (tmp_path / "few").mkdir()
    few = make(tmp_path / "few", now, 6, cores=2)
    assert [rank.claim() for rank in few] == [2, 1, 1, 1, 1, 1]


def test_a_rank_that_died_or_hangs_does_not_keep_its_cores(tmp_path, now):
    encode, language = make(tmp_path, now, 2, cores=2)
    language.claim()
    assert encode.claim() == 1
    now[0] += STALE_S
    assert encode.claim() == 2


def test_one_that_starts_again_has_claimed_nothing(tmp_path, now):
    encode, language = make(tmp_path, now, 2, cores=2)
    language.claim()
    Rank(tmp_path / "cores", 1, lambda: now[0], cores=2)
    assert encode.claim() == 2


def test_a_slot_without_a_place(tmp_path):
    with pytest.raises(ValueError, match=f"slot {MAX_RANKS}"):
        SharedCores(tmp_path / "cores", MAX_RANKS, cores=2, share=1)


def _claim(file: str) -> None:
    SharedCores(Path(file), 1, cores=2, share=1, set_threads=lambda count: None).claim()


def test_claims_cross_processes(tmp_path):
    threads: list[int] = []
    mine = SharedCores(tmp_path / "cores", 0, cores=2, share=1, set_threads=threads.append)
    mine.claim()
    child = multiprocessing.get_context("fork").Process(target=_claim, args=(str(tmp_path / "cores"),))
    child.start()
    child.join(30)
    mine.claim()
    assert threads == [2, 1]


@pytest.mark.parametrize(
    ("device", "compiles", "has_file", "shares"),
    [
        ("cpu", "auto", True, True),
        ("cpu", "on", True, False),
        ("cuda", "off", True, False),
        ("cpu", "off", False, False),
    ],
)
def test_who_shares(tmp_path, device, compiles, has_file, shares):
    """Not who has compiled code or a GPU, nor one that joins, which has no file."""
    options = ServeOptions(model=ModelOptions(compile=compiles))
    file = tmp_path / "cores" if has_file else None
    world = World(num_local_ranks=2, local_rank=1)
    context = RankContext(1, Layout.of(2), ("127.0.0.1", 1), "t", options, world, cores_file=file)
    setup = RankSetup(context, tmp_path, None, torch.device(device), torch.float32, None, None)
    assert (setup.shared_cores() is not None) == shares
    assert [path.name for path in tmp_path.iterdir()] == ["cores"] * shares


def test_a_world_of_one_has_no_file():
    assert cores_file(World()) is None
    assert cores_file(World(num_local_ranks=2)).suffix == ".cores"
