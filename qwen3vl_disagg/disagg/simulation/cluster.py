"""One cluster: hub, encode ranks, language ranks, clients. And what can go wrong with whole ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import DisaggError
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.disagg.layout import RowSizes
from qwen3vl_disagg.disagg.messages import Frame, LinkMessage, Message, Tokens
from qwen3vl_disagg.disagg.router import Router, RouterLimits
from qwen3vl_disagg.disagg.routing import Abandon, Admit, Deliver, End, Event, FromRank, RankDown, RankUp, Send, Tick
from qwen3vl_disagg.disagg.session_events import SessionLimits
from qwen3vl_disagg.disagg.simulation.encode import SimEncode
from qwen3vl_disagg.disagg.simulation.language import SimLanguage
from qwen3vl_disagg.disagg.simulation.payload import Names, Payload
from qwen3vl_disagg.disagg.simulation.world import SILENCE_S, Channel, SimLink, Violation, World

LIMITS = SessionLimits(
    beat_s=2.0,
    suspend_s=2.0,
    grant_s=20.0,
    payload_s=3.0,
    answer_s=5.0,
    early_s=5.0,
    lease_s=40.0,
    max_ended=256,
)


@dataclass(frozen=True)
class Sizes:
    num_encode: int
    num_language: int
    block_size: int
    blocks: int
    deepstack_blocks: int
    slots: int
    row_sizes: RowSizes


@dataclass
class Client:
    """What one client has seen of its request."""

    num_items: int
    num_tokens: int
    has_bad_image: bool
    sent_at: float
    deadline: float
    tokens: int = 0
    is_ended: bool = False
    error: DisaggError | None = None
    is_abandoned: bool = False


class Hub:
    """The frontend's process: never dies here, and it has no sessions."""

    is_dead, frozen_until, slowness = False, 0.0, 1.0


@dataclass
class Cluster:
    world: World
    sizes: Sizes
    limits: SessionLimits = LIMITS
    preemption: float = 0.0
    """How likely it is that a request gives its pages up at a step."""

    def __post_init__(self) -> None:
        self.names = Names()
        self.hub = Hub()
        self.router = Router({"image": 7, "video": 8}, RouterLimits(encode_wait_s=15.0))
        self.clients: dict[str, Client] = {}
        self.epochs: dict[tuple[int, int], int] = {}
        self.blocked: set[tuple[Any, Any]] = set()
        """(from, to) pairs of roles and ranks that a partition keeps apart."""
        self.num_payload_rows = 0
        self._num_frames = 0
        self._decoder = msgspec.msgpack.Decoder(LinkMessage)
        self.encodes = [SimEncode(self, rank) for rank in range(self.sizes.num_encode)]
        self.languages = [SimLanguage(self, rank) for rank in range(self.sizes.num_language)]
        ranks: list[SimEncode | SimLanguage] = [*self.languages, *self.encodes]
        for rank in ranks:
            self._start(rank)
        self.world.at(1.0, None, self._tick)

    # ---- ranks coming up ----

    def _start(self, rank: SimEncode | SimLanguage) -> None:
        rank.tick()
        self._rejoin(rank)
        if isinstance(rank, SimEncode):
            for language in range(self.sizes.num_language):
                self.world.at(0.02 * self.world.random(), rank, self.connect, rank, language)
        else:
            for encode in self.encodes:
                self.world.at(0.1 * self.world.random(), encode, self.connect, encode, rank.rank)

    def join_hub(self, rank: SimEncode | SimLanguage) -> None:
        role: Any = "encode" if isinstance(rank, SimEncode) else "language"
        if (role, rank.rank) in self.blocked or (rank.hub is not None and rank.hub.is_open):
            return
        back = Channel(self.world, rank, self.hub, lambda message: self.take(FromRank(role, rank.rank, message)))
        forth = Channel(self.world, self.hub, rank, rank.from_hub)
        rank.hub, rank.from_hub_channel = back, forth  # type: ignore[union-attr]
        self.take(RankUp(role, rank.rank))
        if isinstance(rank, SimEncode):
            rank.tell_links()

    def connect(self, encode: SimEncode, language_rank: int) -> None:
        """What the keeper of a link does: a new epoch, if the other end can be reached."""
        language = self.languages[language_rank]
        if encode.is_dead or language_rank in encode.links:
            return
        blocked = {(("encode", encode.rank), ("language", language_rank))}
        blocked |= {(b, a) for a, b in blocked}
        if language.is_dead or blocked & self.blocked or language.frozen_until > self.world.now:
            self.world.at(0.3, encode, self.connect, encode, language_rank)
            return
        pair = (encode.rank, language_rank)
        self.epochs[pair] = self.epochs.get(pair, 0) + 1
        link = SimLink(self.world, encode, language, self.epochs[pair])
        link.to_encode.last = self.world.now + self.world.delay()
        self.world.at_time(link.to_encode.last, encode, encode.link_up, link)
        language.link_up(link)

    # ---- the hub ----

    def take(self, event: Event) -> None:
        for action in self.router.handle(event, self.world.now):
            match action:
                case Send():
                    ranks: list[Any] = self.encodes if action.role == "encode" else self.languages
                    rank = ranks[action.rank]
                    if not rank.is_dead and rank.hub is not None and rank.hub.is_open:
                        rank.from_hub_channel.send(action.message)
                case Deliver():
                    self._deliver(action.request_id, action.message)
                case End():
                    client = self.clients[action.request_id]
                    if client.is_ended:
                        raise Violation("I14", f"{action.request_id} ended twice")
                    client.is_ended, client.error = True, action.error
                    if action.error is None and not client.is_abandoned and client.tokens != client.num_tokens:
                        raise Violation("I14", f"{action.request_id} ended well after {client.tokens} tokens")

    def _deliver(self, request_id: str, message: Message) -> None:
        client = self.clients[request_id]
        if client.is_ended:
            raise Violation("I14", f"{request_id} got {type(message).__name__} after its end")
        if isinstance(message, Tokens):
            if message.token_ids != list(range(client.tokens, client.tokens + len(message.token_ids))):
                raise Violation("I14", f"{request_id} got tokens {message.token_ids} after {client.tokens}")
            client.tokens += len(message.token_ids)

    def _tick(self) -> None:
        self.take(Tick())
        self.world.at(1.0, None, self._tick)

    def check_wire(self, frame: Frame) -> None:
        """Only typed frames cross a border; some are put through the real encoding."""
        if type(frame) is not Frame or not isinstance(frame.body, Message):
            raise Violation("wire", f"{type(frame).__name__} of {type(frame.body).__name__} is no frame")
        self._num_frames += 1
        if self._num_frames % 64 == 0 and self._decoder.decode(msgspec.msgpack.encode(frame)) != frame:
            raise Violation("wire", f"{frame} does not survive its encoding")

    def count_payload(self, payload: Payload) -> None:
        self.num_payload_rows += len(payload.rows)

    # ---- clients ----

    def submit(self, request_id: str, rows: list[int], num_tokens: int, timeout_s: float, *, bad: bool) -> None:
        items = [
            VisualItem(
                modality="image",
                digest="bad" if bad and index == 0 else f"{request_id}/{index}",
                num_bytes=1,
                grid=(1, 2, 2 * count),
                num_rows=count,
                offset=0,
                param="",
            )
            for index, count in enumerate(rows)
        ]
        now = self.world.now
        self.clients[request_id] = Client(len(items), num_tokens, bad and bool(rows), now, now + timeout_s)
        sampling = SamplingParams(max_new_tokens=num_tokens)
        self.take(Admit(request_id, b"", sum(rows) + num_tokens, items, sampling, timeout_s))

    def abandon(self, request_id: str) -> None:
        client = self.clients[request_id]
        if not client.is_ended:
            client.is_abandoned = True
            self.take(Abandon(request_id))

    # ---- faults of whole ranks ----

    def kill(self, role: str, number: int, restart_s: float) -> None:
        """kill -9: the kernel closes its connections; the slot forks it again."""
        rank: Any = self.encodes[number] if role == "encode" else self.languages[number]
        if rank.is_dead:
            return
        rank.count_states(f"kill-{role}")
        rank.is_dead = True
        for link in list(rank.links.values()):
            other = link.language if role == "encode" else link.encode
            link.to_encode.is_open = link.to_encode.is_open and role != "encode"
            link.to_language.is_open = link.to_language.is_open and role != "language"
            self.world.at(0.02 * self.world.random(), other, link.close, other, "the peer died")
            link._break()
        self.world.at(0.02 * self.world.random(), None, self._hub_lost, rank, role)
        self.world.at(restart_s, None, self._restart, role, number)

    def _hub_lost(self, rank: Any, role: Any) -> None:
        """The hub's end of a rank's connection is gone."""
        current = self.encodes[rank.rank] if role == "encode" else self.languages[rank.rank]
        if rank.hub is not None and rank.hub.is_open and current is rank:
            rank.hub.is_open = rank.from_hub_channel.is_open = False
            self.take(RankDown(role, rank.rank))

    def _restart(self, role: str, number: int) -> None:
        ranks: Any = self.encodes if role == "encode" else self.languages
        self._hub_lost(ranks[number], role)
        ranks[number] = (SimEncode if role == "encode" else SimLanguage)(self, number)
        self._start(ranks[number])

    def freeze(self, rank: Any, seconds: float) -> None:
        """SIGSTOP; peers give up on it when it is silent for too long."""
        rank.count_states("freeze")
        rank.frozen_until = max(rank.frozen_until, self.world.now + seconds)
        if seconds > SILENCE_S:
            for link in list(rank.links.values()):
                other = link.language if rank is link.encode else link.encode
                self.world.at(SILENCE_S, other, link.close, other, "peer silent")
            role = "encode" if isinstance(rank, SimEncode) else "language"
            self.world.at(SILENCE_S, None, self._cut_hub, rank, role)

    def _cut_hub(self, rank: Any, role: str) -> None:
        """The hub gave the rank up; the rank finds out when it can, and joins again."""
        if not rank.is_dead and rank.hub is not None and rank.hub.is_open:
            self._hub_lost(rank, role)
            self.world.at(0.05, rank, rank.lost_hub)
            self.world.at(0.2, rank, self._rejoin, rank)

    def _rejoin(self, rank: Any) -> None:
        self.join_hub(rank)
        if rank.hub is None or not rank.hub.is_open:
            self.world.at(0.5, rank, self._rejoin, rank)

    def slow(self, rank: Any, factor: float, seconds: float) -> None:
        rank.count_states("slow")
        rank.slowness = factor
        self.world.at(seconds, rank, setattr, rank, "slowness", 1.0)

    def partition(self, link: SimLink, one_way: bool, seconds: float) -> None:
        """Nothing gets through, in one direction or both; an end that hears nothing for too long closes."""
        link.count("one-way" if one_way else "partition")
        pair = (("encode", link.encode.rank), ("language", link.language.rank))
        ways: list[tuple[Any, Channel, SimEncode | SimLanguage]] = [(pair, link.to_language, link.language)]
        if not one_way:
            ways.append((pair[::-1], link.to_encode, link.encode))
        elif self.world.random() < 0.5:
            ways = [(pair[::-1], link.to_encode, link.encode)]
        for way, channel, listener in ways:
            self.blocked.add(way)
            channel.hold()
            if seconds > SILENCE_S:
                self.world.at(SILENCE_S, listener, self._silent, channel, link, listener)
            self.world.at(seconds, None, self._heal, way, channel)

    def _silent(self, channel: Channel, link: SimLink, listener: Any) -> None:
        if channel.held is not None:
            link.close(listener, "peer silent")

    def _heal(self, way: Any, channel: Channel) -> None:
        self.blocked.discard(way)
        channel.heal()

    def cut_off(self, rank: Any, seconds: float) -> None:
        """A rank's connection with the hub is gone for a while."""
        role = "encode" if isinstance(rank, SimEncode) else "language"
        rank.count_states("partition")
        self.blocked.add((role, rank.rank))
        self._cut_hub(rank, role)
        self.world.at(seconds, None, self.blocked.discard, (role, rank.rank))

    def break_link(self, link: SimLink) -> None:
        """The connection ends, for no reason that anybody knows."""
        link.count("break")
        by = link.encode if self.world.random() < 0.5 else link.language
        if not by.is_dead:
            link.close(by, "broken")
