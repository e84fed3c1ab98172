"""The two ends of the transfer benchmark, and the ways in which they move an item's bytes.

`tcp` and `gloo` move one contiguous tensor. `link` is what the ranks run: digests of the sender's rows, the payload
over `ProcessGroupLink`, the digest of every run on arrival, rows placed in the blocks they were granted; `link
scattered` into blocks of 128 rows that are no neighbours; `link+handshake` sends the header first and waits for its
answer. Each of these ends with an acknowledgement on a TCP connection, and is timed by the sender from its start to
that. Ways do not share memory, or one would find in the cache what another left there.
"""

from __future__ import annotations

import math
import socket
import struct
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.model import ModelConfig, TextConfig, VisionConfig
from qwen3vl_disagg.processing import item_positions
from qwen3vl_disagg.protocol.allocator import Lease
from qwen3vl_disagg.protocol.layout import blocks_for, row_runs
from qwen3vl_disagg.protocol.messages import Ack, Frame, Grant, Header, HeaderOk
from qwen3vl_disagg.protocol.session_events import Receive
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers
from qwen3vl_disagg.transport.control import MAX_LINK_FRAME, encode_frame
from qwen3vl_disagg.transport.gloo import build_pair
from qwen3vl_disagg.transport.links import InProcessLink, ProcessGroupLink
from qwen3vl_disagg.transport.sockets import Address

HOST, DEADLINE_S = "127.0.0.1", 60.0
BLOCK_SIZE, ATTEMPT = 128, ("bench", 0, 1)
ROW_BYTES = 4 * 2048 * 2
"""The least a row can take: hidden 2048, bf16, one embedding and 3 DeepStack levels."""
BYTE_ROWS = (1, 16, 256, 1024)
WIRE = ("tcp", "gloo", "link", "link scattered", "link+handshake")
WAYS = ("memcpy", *WIRE, "in-process link")
_COUNT = struct.Struct(">Q")


def model_30b() -> ModelConfig:
    """The sizes of Qwen3-VL-30B-A3B that a row depends on; the others do not matter here."""
    text = TextConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
        max_position_embeddings=262144,
    )
    vision = VisionConfig(
        depth=27,
        hidden_size=1152,
        num_heads=16,
        intermediate_size=4304,
        out_hidden_size=2048,
        num_position_embeddings=2304,
        deepstack_visual_indexes=(8, 16, 24),
    )
    return ModelConfig(
        architecture="Qwen3VLMoeForConditionalGeneration",
        text=text,
        vision=vision,
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Plan:
    """What both ends go through, in the same order."""

    rows: tuple[int, ...]
    rounds: int

    @property
    def max_rows(self) -> int:
        return max(*self.rows, *BYTE_ROWS)


@dataclass(frozen=True)
class Job:
    """An item of `rows` rows and the blocks it was granted: neighbours, or every second one."""

    rows: int
    is_scattered: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """As square as it can be, at merge size 2."""
        height = next(n for n in range(math.isqrt(self.rows), 0, -1) if self.rows % n == 0)
        return 1, 2 * height, 2 * (self.rows // height)

    @property
    def lease(self) -> Lease:
        step = 2 if self.is_scattered else 1
        blocks = tuple(range(0, step * blocks_for(self.rows, BLOCK_SIZE), step))
        return Lease("bench", 1, blocks, blocks, (0,))

    def grant(self, buffers: MultimodalDataBuffers) -> Grant:
        sizes, blocks = buffers.row_sizes, self.lease.rows
        rows = row_runs(blocks, BLOCK_SIZE, self.rows, sizes.max_run_rows)
        deepstack = row_runs(blocks, BLOCK_SIZE, self.rows, sizes.max_deepstack_run_rows)
        request_id, item, attempt = ATTEMPT
        return Grant(
            request_id=request_id,
            item=item,
            attempt=attempt,
            row_start=0,
            row_stop=self.rows,
            deepstack_start=0,
            deepstack_stop=self.rows,
            row_runs=[stop - start for start, stop in rows],
            deepstack_runs=[stop - start for start, stop in deepstack],
            visual=self.visual,
            timeout_s=DEADLINE_S,
        )

    @property
    def visual(self) -> VisualItem:
        return VisualItem(
            modality="image", digest="0" * 64, num_bytes=1, grid=self.grid, num_rows=self.rows, offset=0, param=""
        )

    def receive(self, header: Header, grant: Grant) -> Receive:
        return Receive(0, 1, header, grant, self.visual, self.lease, self.lease, 10.0)


class Peer:
    """The connection beside the payload: frames and acknowledgements, each wait with a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(DEADLINE_S)
        self.socket = connection
        self._decoder = msgspec.msgpack.Decoder(Frame)

    def fill(self, buffer: memoryview) -> None:
        got = 0
        while got < len(buffer):
            count = self.socket.recv_into(buffer[got:])
            if not count:
                raise ConnectionError(f"the other process ended after {got} of {len(buffer)} bytes")
            got += count

    def read(self, size: int) -> bytearray:
        data = bytearray(size)
        self.fill(memoryview(data))
        return data

    def say(self, body: Grant | Header | HeaderOk | Ack) -> None:
        self.socket.sendall(encode_frame(Frame(epoch=1, seq=1, body=body), MAX_LINK_FRAME))

    def hear(self) -> Frame:
        return self._decoder.decode(self.read(int.from_bytes(self.read(4), "big")))

    def send_count(self, count: int) -> None:
        self.socket.sendall(_COUNT.pack(count))

    def read_count(self) -> int:
        return int(_COUNT.unpack(self.read(_COUNT.size))[0])

    def meet(self, rank_in_pair: int) -> dist.ProcessGroup:
        """The bare group of both."""

        def swap(ours: bytes) -> bytes:
            self.send_count(len(ours))
            self.socket.sendall(ours)
            return bytes(self.read(self.read_count()))

        return build_pair(swap, rank_in_pair=rank_in_pair, host=HOST, timeout_s=DEADLINE_S)


def touched(num_bytes: int) -> Tensor:
    """`[num_bytes]` uint8 whose pages are there."""
    return torch.empty(num_bytes, dtype=torch.uint8).fill_(1)


def make_buffers(config: ModelConfig, max_rows: int) -> MultimodalDataBuffers:
    num_rows = 2 * BLOCK_SIZE * blocks_for(max_rows, BLOCK_SIZE)
    return MultimodalDataBuffers(config, num_rows=num_rows, num_slots=1, block_size=BLOCK_SIZE, dtype=torch.bfloat16)


def make_item(config: ModelConfig, job: Job) -> EncodedItem:
    """Random bits; fill_ids and positions as they have to be."""
    hidden, levels = config.text.hidden_size, config.num_deepstack_levels
    return EncodedItem(
        main=torch.randn(job.rows, hidden, dtype=torch.bfloat16),
        deepstack=torch.randn(job.rows, levels * hidden, dtype=torch.bfloat16),
        fill_ids=torch.full((job.rows,), config.image_token_id, dtype=torch.int32),
        positions=item_positions(job.grid, config.vision.spatial_merge_size).T.contiguous(),
        grid=job.grid,
        preprocess_ms=0.0,
        encode_ms=0.0,
    )


# ---- the language rank ----


class LanguageEnd:
    """Answers whatever `EncodeEnd` starts."""

    def __init__(self, peer: Peer, group: dist.ProcessGroup, plan: Plan) -> None:
        self.peer, self.group = peer, group
        config = model_30b()
        self.buffers = make_buffers(config, plan.max_rows)
        for buffer in (self.buffers.input_embeddings, self.buffers.deepstack_embeddings, self.buffers.fill_ids):
            buffer.fill_(0)
        self.buffers.mrope_positions.fill_(0)
        self.receiver = Receiver(self.buffers, config)
        self.link = ProcessGroupLink(group, "language")
        self.bytes = {way: touched(self.size(plan.max_rows)) for way in ("tcp", "gloo")}

    def size(self, rows: int) -> int:
        return self.buffers.row_sizes.transfer_bytes(rows, rows)

    def answer(self, way: str, rows: int) -> None:
        if way.startswith("link"):
            self._receive(Job(rows, is_scattered=way == "link scattered"))
            return
        target = self.bytes[way][: self.size(rows)]
        if way == "tcp":
            self.peer.send_count(0)
            self.peer.fill(target.numpy().data)
        else:
            work = self.group.recv([target], 0, 0)
            self.peer.send_count(0)
            work.wait(timedelta(seconds=DEADLINE_S))
        self.peer.send_count(len(target))

    def _receive(self, job: Job) -> None:
        header = self.peer.hear().body
        if not isinstance(header, Header):
            raise ValueError(f"expected a header, got {type(header).__name__}")
        request_id, item, attempt = ATTEMPT
        self.peer.say(HeaderOk(request_id=request_id, item=item, attempt=attempt, row_start=0))
        self.receiver.receive(self.link, job.receive(header, job.grant(self.buffers)), DEADLINE_S)
        self.peer.send_count(self.receiver.totals(ATTEMPT)[0])
        self.receiver.forget(request_id)


def run_language(address: Address, plan: Plan) -> None:
    torch.set_num_threads(1)
    peer = Peer(socket.create_connection(address, timeout=DEADLINE_S))
    end = LanguageEnd(peer, peer.meet(1), plan)
    for rows in BYTE_ROWS:
        end.answer("link", rows)
    started = time.process_time()
    for rows in plan.rows:
        for _ in range(plan.rounds + 1):
            for way in WIRE:
                end.answer(way, rows)
    peer.send_count(int((time.process_time() - started) * 1e9))


# ---- the encode rank ----


class EncodeEnd:
    """Starts each way and times it."""

    def __init__(self, peer: Peer, group: dist.ProcessGroup, plan: Plan) -> None:
        self.peer, self.group = peer, group
        self.config = model_30b()
        self.buffers = make_buffers(self.config, plan.max_rows)  # for sizes and the in-process link: never written
        self.receiver = Receiver(self.buffers, self.config)
        self.link = ProcessGroupLink(group, "encode")

    def prepare(self, rows: int) -> None:
        """The item and the bytes of the next rounds."""
        self.rows = rows
        self.item = make_item(self.config, Job(rows))
        self.size = self.buffers.row_sizes.transfer_bytes(rows, rows)
        self.bytes = {name: touched(self.size) for name in ("memcpy", "copy", "tcp", "gloo")}

    def measure(self, way: str) -> float:
        """Seconds."""
        job = Job(self.rows, is_scattered=way == "link scattered")
        if way == "memcpy":
            return self._memcpy()
        if way == "in-process link":
            return self._in_process(job)
        return self._send_item(job, way) if way.startswith("link") else self._send_bytes(way)

    def _memcpy(self) -> float:
        started = time.perf_counter()
        self.bytes["copy"].copy_(self.bytes["memcpy"])
        return time.perf_counter() - started

    def _send_bytes(self, way: str) -> float:
        self.peer.read_count()  # the receive is posted
        started = time.perf_counter()
        if way == "tcp":
            self.peer.socket.sendall(self.bytes[way].numpy().data)
        else:
            self.group.send([self.bytes[way]], 1, 0).wait(timedelta(seconds=DEADLINE_S))
        return self._acknowledged(started)

    def _send_item(self, job: Job, way: str) -> float:
        grant = job.grant(self.buffers)
        if way != "link+handshake":
            self.peer.say(self.item.header(grant))
            self.peer.hear()
        started = time.perf_counter()
        item = replace(self.item)  # so that its digests have to be computed
        header = item.header(grant)
        if way == "link+handshake":
            self.peer.say(header)
            self.peer.hear()
        self.link.send(item.payload(grant), DEADLINE_S)
        return self._acknowledged(started)

    def _acknowledged(self, started: float) -> float:
        count = self.peer.read_count()
        elapsed = time.perf_counter() - started
        if count != self.size:
            raise ValueError(f"{self.size} bytes were sent, {count} arrived")
        return elapsed

    def _in_process(self, job: Job) -> float:
        grant, link = job.grant(self.buffers), InProcessLink()
        started = time.perf_counter()
        item = replace(self.item)
        receive = job.receive(item.header(grant), grant)
        link.send(item.payload(grant), DEADLINE_S)
        self.receiver.receive(link, receive, DEADLINE_S)
        elapsed = time.perf_counter() - started
        self.receiver.forget(ATTEMPT[0])
        return elapsed

    def count_bytes(self, rows: int) -> dict[str, float]:
        """Of one request with one item: what the link counted, and the frames beside it, against the rows alone."""
        self.prepare(rows)
        grant = Job(rows).grant(self.buffers)
        self._send_item(Job(rows), "link")
        request_id, item, attempt = ATTEMPT
        answers = (
            HeaderOk(request_id=request_id, item=item, attempt=attempt, row_start=0),
            Ack(request_id=request_id, item=item, attempt=attempt, received=rows),
        )
        bodies = (grant, self.item.header(grant), *answers)
        frames = sum(len(encode_frame(Frame(epoch=1, seq=1, body=body), MAX_LINK_FRAME)) for body in bodies)
        least = rows * ROW_BYTES
        return {
            "rows": rows,
            "payload_bytes": self.size,
            "frame_bytes": frames,
            "least_bytes": least,
            "ratio": self.size / least,
            "ratio_with_frames": (self.size + frames) / least,
        }
