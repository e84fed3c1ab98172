"""One cluster: hub, encode ranks, language ranks, clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import msgspec

from qwen3vl_disagg.core.errors import DisaggError, OverloadedError, TransferError, UnavailableError
from qwen3vl_disagg.core.pooling import Pooling
from qwen3vl_disagg.core.requests import SamplingParams, VisualItem
from qwen3vl_disagg.language.kept_answers import KEEP_S
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import Frame, Leaving, LinkMessage, Message
from qwen3vl_disagg.protocol.router import RouterLimits
from qwen3vl_disagg.protocol.routing import TOKEN_ID_BYTES, Abandon, Admit, AdmitTogether, FromRank, RankDown, RankUp
from qwen3vl_disagg.protocol.session import GRANTED, RECEIVING, WAITING
from qwen3vl_disagg.protocol.session_events import Attempt, SessionLimits
from tools.simulation.encode import SimEncode
from tools.simulation.hub import Client, SimHub
from tools.simulation.language import SimLanguage
from tools.simulation.payload import Names, Payload
from tools.simulation.world import SILENCE_S, Channel, SimLink, Violation, World

TIMEOUT_S = 80.0
ASK_AFTER_S = (1.0, 1.0, 3.0, 10.0, KEEP_S + 10.0)
"""Within one of these a client asks again; the last is too late."""
LIMITS = SessionLimits(
    beat_s=2.0,
    suspend_s=2.0,
    grant_s=20.0,
    payload_s=3.0,
    answer_s=5.0,
    lease_s=40.0,
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
    router_limits: RouterLimits
    are_language_ranks_required: bool = False
    keep_s: float = KEEP_S
    kv_tokens: int = 0
    moving_s: float = 0.1
    """What the bytes of a payload may take at most: they are few."""
    encode_s: float = 0.3
    """How long an item takes at most."""
    payload_s: float = 0.0
    """How long a payload takes at most, beside the way: then others are ready meanwhile."""
    clips: float = 0.2
    """How many of the items are clips."""
    shared: float = 0.0
    """How many are the same image, and two rows long."""


@dataclass
class Cluster:
    world: World
    sizes: Sizes
    limits: SessionLimits = LIMITS
    preemption: float = 0.0
    """How likely it is that a request gives its pages up at a step."""

    def __post_init__(self) -> None:
        self.names = Names()
        self.clients: dict[str, Client] = {}
        self.hub = SimHub(self)
        self.epochs: dict[tuple[int, int], int] = {}
        self.holes: dict[tuple[int, int], float] = {}
        """(encode rank, language rank) -> until when payloads between them do not get through"""
        self.blocked: set[tuple[Any, Any]] = set()
        """(from, to) pairs of roles and ranks that a partition keeps apart."""
        self.issued_at: dict[Attempt, float] = {}
        """When the hub gave an attempt out."""
        self.gone: list[Any] = []
        """Processes that are over."""
        self.num_payload_rows = 0
        self.num_asking = 0
        """Clients that will ask again."""
        self._num_frames = 0
        self._decoder = msgspec.msgpack.Decoder(LinkMessage)
        self.encodes = [SimEncode(self, rank) for rank in range(self.sizes.num_encode)]
        self.languages = [SimLanguage(self, rank) for rank in range(self.sizes.num_language)]
        ranks: list[SimEncode | SimLanguage] = [*self.languages, *self.encodes]
        for rank in ranks:
            self.start(rank)

    # ---- ranks coming up ----

    def start(self, rank: SimEncode | SimLanguage) -> None:
        rank.tick()
        self.rejoin(rank)
        if isinstance(rank, SimEncode):
            for language in range(self.sizes.num_language):
                self.world.at(0.02 * self.world.random(), rank, self.connect, rank, language)
        else:
            for encode in self.encodes:
                self.world.at(0.1 * self.world.random(), encode, self.connect, encode, rank.rank)

    def join_hub(self, rank: SimEncode | SimLanguage) -> None:
        role: Any = "encode" if isinstance(rank, SimEncode) else "language"
        hub = self.hub
        if hub.is_dead or (role, rank.rank) in self.blocked or (rank.hub is not None and rank.hub.is_open):
            return
        back = Channel(self.world, rank, hub, lambda message: hub.take(FromRank(role, rank.rank, message)))
        forth = Channel(self.world, hub, rank, rank.from_hub)
        if before := hub.connections.get((role, rank.rank)):  # whose end has not been noticed
            before.is_open = False
        rank.hub, rank.from_hub_channel = back, forth
        hub.connections[role, rank.rank] = back
        if isinstance(rank, SimEncode):
            hub.take(RankUp(role, rank.rank))
        else:
            hub.take(RankUp(role, rank.rank, self.sizes.kv_tokens, rank.offered))
        if isinstance(rank, SimEncode):
            rank.tell_links()
            if rank.is_leaving:
                rank.tell(Leaving())

    def rejoin(self, rank: Any) -> None:
        """Until the hub takes it."""
        self.join_hub(rank)
        if rank.hub is None or not rank.hub.is_open:
            self.world.at(0.5, rank, self.rejoin, rank)

    def hub_lost(self, rank: Any, role: Any) -> None:
        """The hub's end of a rank's connection is gone."""
        if rank.hub is not None and self.hub.connections.get((role, rank.rank)) is rank.hub:
            rank.close_hub()
            del self.hub.connections[role, rank.rank]
            self.hub.take(RankDown(role, rank.rank))

    def restart(self, role: str, number: int) -> None:
        """The slot has forked a dead rank again."""
        ranks: Any = self.encodes if role == "encode" else self.languages
        self.gone.append(ranks[number])
        ranks[number] = (SimEncode if role == "encode" else SimLanguage)(self, number)
        self.start(ranks[number])

    def connect(self, encode: SimEncode, language_rank: int) -> None:
        """What the keeper of a link does: a new epoch, if the other end can be reached."""
        language = self.languages[language_rank]
        if encode.is_dead or language_rank in encode.links:
            return
        if language.is_dead or language.frozen_until > self.world.now or self._are_apart(encode.rank, language_rank):
            self.world.at(0.3, encode, self.connect, encode, language_rank)
            return
        pair = (encode.rank, language_rank)
        self.epochs[pair] = self.epochs.get(pair, 0) + 1
        link = SimLink(self.world, encode, language, self.epochs[pair])
        link.hole_until = self.holes.get(pair, 0.0)
        link.to_encode.last = self.world.now + self.world.delay()
        self.world.at_time(link.to_encode.last, encode, encode.link_up, link)
        language.link_up(link)

    def _are_apart(self, encode_rank: int, language_rank: int) -> bool:
        ends = ("encode", encode_rank), ("language", language_rank)
        return bool(self.blocked) and (ends in self.blocked or ends[::-1] in self.blocked)

    def end_process(self, rank: Any, restart_s: float) -> None:
        """The kernel closes its connections; the slot forks it again."""
        world, role = self.world, "encode" if isinstance(rank, SimEncode) else "language"
        rank.is_dead = True
        for link in list(rank.links.values()):
            other: Any = link.language if role == "encode" else link.encode
            link.to_encode.is_open = link.to_encode.is_open and role != "encode"
            link.to_language.is_open = link.to_language.is_open and role != "language"
            world.at(0.02 * world.random(), other, link.close, other, "the peer died")
            link.end_payloads()
        # Of another host's process the hub may hear when the next one has come, or by silence.
        patience = SILENCE_S if world.random() < 0.3 else 0.02 * world.random()
        world.at(patience, None, self.hub_lost, rank, role)
        world.at(restart_s, None, self.restart, role, rank.rank)

    # ---- what checks ask ----

    def is_at_work(self, attempt: Attempt) -> bool:
        """An encode rank has the attempt, or is asked for it or will be, also after a receive that has yet to come to
        its end; or it needs nobody any more."""
        if any(attempt in encode.sessions.items for encode in self.encodes):
            return True
        if any(self._is_coming(language, attempt) for language in self.languages):
            return True
        sessions = (language.sessions.find(*attempt) for language in self.languages)
        return any(
            s is not None and (s.received == s.total or s.state in (WAITING, GRANTED, RECEIVING)) for s in sessions
        )

    @staticmethod
    def _is_coming(language: SimLanguage, attempt: Attempt) -> bool:
        """The language rank has the request, and the news of the attempt may be under way to it."""
        request, channel = language.sessions.requests.get(attempt[0]), language.from_hub_channel
        is_before = request is not None and request.sessions[attempt[1]].attempt < attempt[2]
        return is_before and channel is not None and not channel.is_through

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

    def submit(
        self,
        name: str,
        rows: list[int],
        num_tokens: int,
        timeout_s: float,
        wrong: str | None,
        n: int = 1,
        *,
        num_asks: int = 0,
        shares: bool = False,
        together: list[Admit] | None = None,
    ) -> str:
        """`wrong`: the first image is `bad`, or `poison`. `n`: answers. A request for one token is one for a vector in
        its place. With `num_asks` it is keyed, and asked so often at most. What the hub calls it. `shares`: images of
        two rows are one. `together`: where it waits for others, to be admitted with them."""
        hub, keep_as = self.hub, name if num_asks else ""
        kept = None if hub.is_dead else hub.router.kept_id(keep_as)
        request_id = kept or (name if name not in self.clients else f"{name}.{num_asks}")
        while request_id != kept and request_id in self.clients:
            request_id += "'"
        n = n if num_tokens != 1 else 1
        sampling = _sampling(num_tokens, n)
        pooling = sampling.pooling
        items = [
            self._item(_digest(name, index, count, wrong if index == 0 else None, shares), index, count)
            for index, count in enumerate(rows)
        ]
        now = self.world.now
        client = Client(
            len(items),
            0 if pooling else num_tokens,
            bool(wrong and rows),
            now,
            now + timeout_s,
            digests=tuple(item.digest for item in items),
            lacks_vector=pooling is not None,
            tokens=dict.fromkeys(range(n), 0),
        )
        if num_asks > 1:
            again = partial(
                self.submit, name, rows, num_tokens, TIMEOUT_S, wrong, n, num_asks=num_asks - 1, shares=shares
            )
            client.ask_again = partial(self._ask_again, again)
        self.clients[request_id] = client
        if self.hub.is_dead:
            client.end(UnavailableError("nobody listens"))
        else:
            target_s = 2.0 * (len(self.clients) % 3)  # so that some pass those before them
            # Some may give far longer answers than they do.
            num_all = sum(rows) + num_tokens + (3000 if sum(rows) % 7 == 5 else 0)
            prompt = bytes(TOKEN_ID_BYTES * sum(rows))
            admit = Admit(request_id, prompt, num_all, items, sampling, timeout_s, target_s, keep_as)
            if together is None:
                self.hub.take(admit)
            else:
                together.append(admit)
        return request_id

    def submit_together(
        self, name: str, rows: list[list[int]], num_tokens: int, timeout_s: float, wrong: str | None, n: int
    ) -> None:
        """Several prompts of one client: all are taken, or none."""
        together: list[Admit] = []
        for index, of_one in enumerate(rows):
            wrong_here = wrong if index == 0 else None
            self.submit(f"{name}+{index}", of_one, num_tokens, timeout_s, wrong_here, n, together=together)
        if together:
            self.hub.take(AdmitTogether(together))

    def _item(self, digest: str, index: int, count: int) -> VisualItem:
        """Of some clips' files more frames are decoded than are looked at."""
        is_clip = self.world.random() < self.sizes.clips
        return VisualItem(
            modality="video" if is_clip else "image",
            digest=digest,
            num_bytes=1,
            grid=(1, 2, 2 * count),
            num_rows=count,
            offset=0,
            param=f"item {index}",
            frames=(0, 2 + count) if is_clip and count % 3 == 0 else (),
            is_frame_list=count % 2 == 0,
        )

    def _ask_again(self, again: Callable[[], str], error: DisaggError) -> bool:
        """What is over for a reason of ours is asked for again."""
        if not isinstance(error, (UnavailableError, OverloadedError, TransferError)):
            return False
        delay = 0.6 + self.world.rng.choice(ASK_AFTER_S) * self.world.random()  # ranks are back, mostly
        self.num_asking += 1
        self.world.at(delay, None, self._ask_now, again)
        return True

    def _ask_now(self, again: Callable[[], str]) -> None:
        if self.hub.is_dead:  # nobody listens yet
            self.world.at(1.0, None, self._ask_now, again)
            return
        self.num_asking -= 1
        again()

    def abandon(self, request_id: str, sample: int | None = None) -> None:
        """The request, or one of its answers."""
        client = self.clients[request_id]
        if client.is_ended:
            return
        self.hub.words.cuts_open_answer = sample in client.tokens and len(client.tokens) > 1
        if sample is None or client.tokens.keys() <= {sample}:
            client.is_abandoned = True
        else:
            client.tokens.pop(sample, None)  # nothing of it may come any more
        self.hub.take(Abandon(request_id, sample))


@cache
def _sampling(num_tokens: int, n: int) -> SamplingParams:
    pooling = Pooling() if num_tokens == 1 else None
    return SamplingParams(max_new_tokens=num_tokens, n=n, pooling=pooling)


def _digest(name: str, index: int, num_rows: int, wrong: str | None, shares: bool) -> str:
    return wrong or ("shared" if shares and num_rows == 2 else f"{name}/{index}")
