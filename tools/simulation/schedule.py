"""One schedule: a cluster, requests and faults, all from one source of numbers; and what must hold at its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from random import Random

import msgspec

from qwen3vl_disagg.core.errors import InputError, OverloadedError, UnavailableError
from qwen3vl_disagg.language.kept_answers import KEEP_S
from qwen3vl_disagg.protocol.encode_sessions import EncodeSessions
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.router import RouterLimits
from qwen3vl_disagg.protocol.routing import Drain, EndAll
from tools.simulation import faults as fault
from tools.simulation.cluster import ASK_AFTER_S, LIMITS, TIMEOUT_S, Cluster, Sizes
from tools.simulation.hub import Client
from tools.simulation.kept_checks import GIVE_UP_S
from tools.simulation.scale import Bounds, bounded, draw_bounds, moving_s
from tools.simulation.world import FAULTS, RANK_FAULTS, SILENCE_S, Violation, World

SETTLE_S = 30.0
"""After the last fault: long enough for every timeout and reconnection."""
DRAIN_S = 15.0
"""After the longest lease: nothing that has not ended by then would end before its request's time is over."""
MANY_TOKENS = 12
AWAY_S = 20.0
"""Longer than an item waits for an encode rank."""
_STRIKES = frozenset(RANK_FAULTS) - {"allocation", "poison"}


@dataclass(frozen=True)
class Outcome:
    events: int
    table: Counter[tuple[str, str]]
    num_answered: int
    num_failed: int
    violation: str | None = None
    invariant: str | None = None
    """The one that does not hold; `raised` when a machine raised."""


def run_schedule(rng: Random) -> Outcome:
    """Everything that happens with these random numbers, up to the first violation."""
    world, cluster, plan = _prepare(rng)
    violation: str | None = None
    invariant: str | None = None
    try:
        with bounded(plan.bounds):
            _run(world, cluster, plan)
    except Violation as error:
        violation, invariant = str(error), error.invariant
    except Exception as error:  # a machine that raises has lost its way
        violation, invariant = f"raised {type(error).__name__}: {error}", "raised"
    answered = sum(1 for client in cluster.clients.values() if client.is_ended and client.error is None)
    failed = sum(1 for client in cluster.clients.values() if client.error is not None and not client.asks_again)
    outcome = Outcome(world.num_events, world.table, answered, failed, violation, invariant)
    _take_apart(world, cluster)
    return outcome


def _take_apart(world: World, cluster: Cluster) -> None:
    """All of it knows all of it: without this only the collector of cycles would find that nobody has it any more."""
    for part in (*cluster.gone, *cluster.encodes, *cluster.languages, cluster.hub, cluster, world):
        vars(part).clear()


@dataclass(frozen=True)
class _Plan:
    has_faults: bool
    until: float
    """When faults stop."""
    num_late: int
    are_kept: bool
    """Whether some clients ask again, and language ranks keep what they have said."""
    bounds: Bounds
    are_ended: bool
    """Whether the hub gives all up at the end."""


def _prepare(rng: Random) -> tuple[World, Cluster, _Plan]:
    world = World(rng, frozenset(), 0.0, 0.0)
    luck = rng.random()
    has_faults, are_kept = luck < 0.8, luck < 0.2
    is_fragile, is_crowded = 0.66 <= luck < 0.75, 0.75 <= luck < 0.8
    if has_faults:
        count = rng.choice((1, 1, 2, 3, len(FAULTS)))
        world.faults = frozenset(rng.sample(FAULTS, count))
        world.faults_until = rng.choice((2.0, 4.0, 8.0))
        world.rate = rng.choice((0.02, 0.05, 0.15))
    # Some clusters live on resumes and lose encode ranks in the middle of them.
    is_tight = has_faults and rng.random() < 0.25
    if is_tight:
        world.faults |= {"kill-encode", "break"}
    # In others answers are kept, and hubs die.
    if are_kept:
        world.faults |= {"kill-hub"} | rng.choice((set(), {"kill-language"}, {"partition"}))
    # In some many payloads of an item break, in some the encode rank has many items to choose from.
    if is_fragile:
        world.faults, world.faults_until, world.rate = world.faults | {"allocation"}, 8.0, 0.15
    bounds = draw_bounds(rng, are_kept=are_kept)
    block_size = rng.randint(1, 3)
    blocks = 1 if is_tight else rng.choice((1, 1, 2, 3, 4, 8))
    if is_fragile or is_crowded:
        block_size, blocks = (1, 1) if is_fragile else (3, 8)
    levels = rng.choice((0, 1, 1, 1))
    sizes = Sizes(
        num_encode=1 if is_crowded else rng.randint(1 + is_tight, 3),
        num_language=rng.randint(1, 2),
        block_size=block_size,
        blocks=blocks,
        deepstack_blocks=rng.choice((1, 2, 4, 12)) if levels else 0,
        slots=rng.randint(1, 4),
        row_sizes=RowSizes(4, 4, 12, 64, 4 * levels),
        router_limits=RouterLimits(
            max_waiting=rng.choice((2, 64, 64, 64, 64)),
            max_waiting_tokens=rng.choice((15, 60, *[1 << 20] * 6)),
            encode_wait_s=15.0,
            max_waiting_fills=rng.choice((1, 8)),
            max_deaths=rng.randint(1, 3),
            suspect_s=rng.choice((8.0, 600.0)),
            max_suspects=rng.choice((1, 2, 1024)),
        ),
        are_language_ranks_required=rng.random() < 0.25,
        encode_s=rng.choice((0.5, 3.0)) if is_crowded else 0.3,
        payload_s=2.0 if is_crowded else rng.choice((0.0, 0.0, 1.0)),
        clips=rng.choice((0.0, 0.2, 0.8)),
        shared=rng.choice((0.0, 0.0, 0.5)),
        kv_tokens=rng.choice((0, 0, 40)),
        moving_s=moving_s(bounds),
        keep_s=rng.choice((4.0, 4.0, 20.0, KEEP_S)) if are_kept else KEEP_S,
    )
    memory = rng.choice((1, 4, 4)) if is_crowded else rng.choice((1, 2, 8))
    limits = msgspec.structs.replace(LIMITS, max_items=memory, max_parked=memory, max_urgent=1, max_clips=1)
    limits = msgspec.structs.replace(limits, forget_s=rng.choice((6.0, 120.0)))
    cluster = Cluster(world, sizes, limits, preemption=rng.choice((0.0, 0.05, 0.2)))
    plan = _Plan(has_faults, world.faults_until, 2, are_kept, bounds, rng.random() < 0.2)
    start = 0.3
    within_s = 1.5 if is_crowded else 4.0
    for number in range(rng.randint(2, 7) + 4 * is_crowded):
        come_at = start + within_s * rng.random() * rng.random()
        world.at(come_at, None, _submit, cluster, f"r{number}", True, are_kept)
    if sizes.router_limits.max_waiting == 2:  # some are refused when others have waited for long
        for number in range(3):
            world.at(
                start + (20.0 if has_faults else 5.0) * rng.random(), None, _submit, cluster, f"again{number}", True
            )
    if has_faults:
        for _ in range(rng.randint(1, 6) + 4 * is_tight):
            world.at(start + plan.until * rng.random(), None, _strike, cluster)
    for _ in range(rng.randint(1, 3) if are_kept else 0):
        seconds = rng.choice((0.1, 0.6, 2.0))
        world.at(start + plan.until * rng.random(), None, fault.kill_hub, cluster, seconds)
    return world, cluster, plan


def _submit(cluster: Cluster, name: str, may_fail: bool, may_be_kept: bool = False) -> None:
    rng = cluster.world.rng
    shared = cluster.sizes.shared if may_fail else 0.0
    rows = [2 if rng.random() < shared else rng.randint(1, 9) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    wrong = None
    if may_fail and rng.random() < 0.06:
        wrong = "bad"
    elif may_fail and cluster.world.happens("poison", 4.0):
        wrong = "poison"
    has_faults = may_fail and bool(cluster.world.faults)
    timeout_s = rng.choice((TIMEOUT_S, TIMEOUT_S, TIMEOUT_S, 2.5, 6.0)) if has_faults else TIMEOUT_S
    n, num_tokens, num_asks = rng.choice((1, 1, 2, 3)), rng.randint(1, 3), 0
    if may_be_kept and rng.random() < 0.85:
        timeout_s = rng.choice((timeout_s, 8.0, 15.0))
        num_tokens, num_asks = rng.choice((num_tokens, MANY_TOKENS, MANY_TOKENS)), rng.randint(2, 3)
    if may_fail and not num_asks and rng.random() < 0.1:
        cluster.submit_together(name, [rows, rows[:1]], num_tokens, timeout_s, wrong, n)
        return
    request_id = cluster.submit(name, rows, num_tokens, timeout_s, wrong, n, num_asks=num_asks, shares=shared > 0)
    if num_asks and rng.random() < 0.15:  # somebody asks under the same name while the first is served
        again = partial(cluster.submit, name, rows, num_tokens, timeout_s, wrong, n, num_asks=1, shares=shared > 0)
        cluster.world.at(2.0 * rng.random(), None, again)  # type: ignore[arg-type]
    if may_fail and rng.random() < (0.12 if n == 1 else 0.4 if num_asks else 0.25):
        sample = None if rng.random() < (0.1 if num_asks else 0.5) else rng.randrange(n)
        cluster.world.at(2.0 * rng.random(), None, cluster.abandon, request_id, sample)


def _strike(cluster: Cluster) -> None:
    """One fault of a rank or a connection, of a kind that this schedule has."""
    world = cluster.world
    rng = world.rng
    if world.now > world.faults_until:
        return
    everybody: list[fault.SimRank] = [*cluster.encodes, *cluster.languages]
    ranks = [rank for rank in everybody if not rank.is_dead]
    links = [link for encode in cluster.encodes if not encode.is_dead for link in encode.links.values()]
    kinds = sorted(world.faults & set(_STRIKES))
    if not kinds or not ranks:
        return
    kind = rng.choice(kinds)
    seconds = rng.choice((0.2, 1.0, SILENCE_S + 1.0, 2 * SILENCE_S))
    encode = rng.choice(cluster.encodes)
    if kind == "kill-encode":
        begin = fault.die_slowly if rng.random() < 0.3 else fault.kill
        begin(cluster, encode, rng.choice((0.05, 0.05, 2.0)), kind)
    elif kind == "away":
        for other in cluster.encodes if rng.random() < 0.5 else [encode]:
            fault.kill(cluster, other, AWAY_S, kind)
    elif kind == "leave" and not encode.is_dead:
        fault.leave(cluster, encode, rng.choice((0.05, 2.0)))
    elif kind == "kill-language":
        fault.kill(cluster, rng.choice(cluster.languages), rng.choice((0.05, 2.0, 4.0)), kind)
    elif kind == "kill-hub":
        fault.kill_hub(cluster, rng.choice((0.1, 0.6, 2.0)))
    elif kind == "freeze":
        fault.freeze(cluster, rng.choice(ranks), seconds)
    elif kind == "slow":
        fault.slow(cluster, rng.choice(ranks), rng.choice((5.0, 40.0)), seconds)
    elif kind == "partition" and rng.random() < 0.3:
        fault.cut_off(cluster, rng.choice(ranks), seconds)
    elif links and kind in ("partition", "one-way"):
        fault.partition(cluster, rng.choice(links), kind == "one-way", seconds)
    elif links and kind == "black-hole":
        fault.black_hole(cluster, rng.choice(links), world.now + rng.choice((4.0, 10.0)))
    elif links and kind == "break":
        (fault.blink if rng.random() < 0.3 else fault.break_link)(cluster, rng.choice(links))


def _run(world: World, cluster: Cluster, plan: _Plan) -> None:
    """Requests under faults; then all must end; then, on the healed cluster, every new one must be answered."""
    world.run(6.0)
    again_s = 2 * (TIMEOUT_S + max(ASK_AFTER_S)) if plan.are_kept else 0.0
    _run_until_ended(world, cluster, cluster.clients, world.now + TIMEOUT_S + SETTLE_S + again_s)
    if not plan.has_faults:
        _check_all_answered(cluster.clients)
    world.run(max(world.now, plan.until + SETTLE_S if plan.has_faults else 0.0))
    late = [f"late{number}" for number in range(plan.num_late)]
    for request_id in late:
        _submit(cluster, request_id, False)
    if "poison" in world.faults:  # the others have nothing to fear from it
        late.append("poisoned")
        cluster.submit("poisoned", [1, 2], 1, TIMEOUT_S, "poison")
    clients = {name: cluster.clients[name] for name in late}
    _run_until_ended(world, cluster, clients, world.now + TIMEOUT_S)
    _check_all_answered(clients)
    if plan.are_ended:
        _end_all(world, cluster)
    _check_drained(world, cluster, plan)


def _end_all(world: World, cluster: Cluster) -> None:
    """The frontend takes no more, and then gives up what is under way."""
    for number in range(3):
        _submit(cluster, f"last{number}", False)
    world.run(world.now + world.random())
    cluster.hub.take(Drain())
    _submit(cluster, "refused", False)
    if not isinstance(cluster.clients["refused"].error, UnavailableError):
        raise Violation("I11", "a hub that takes no more has taken a request")
    world.run(world.now + world.random())
    cluster.hub.take(EndAll(UnavailableError("the server is shutting down")))


def _run_until_ended(world: World, cluster: Cluster, clients: dict[str, Client], limit: float) -> None:
    while cluster.num_asking or not all(client.is_ended for client in clients.values()):
        if world.now > limit:
            waiting = [name for name, client in clients.items() if not client.is_ended]
            raise Violation("I11", f"{waiting} never ended")
        world.run(world.now + 1.0)


def _check_all_answered(clients: dict[str, Client]) -> None:
    """I11 without an excuse: nothing was wrong, so every answer has to come; a bad image is the client's fault."""
    for name, client in clients.items():
        if client.is_abandoned or isinstance(client.error, OverloadedError):  # which the hub's checks have looked at
            continue
        if client.has_bad_image != isinstance(client.error, InputError) or (client.error and not client.has_bad_image):
            raise Violation("I11", f"{name} ended with {client.error!r} though nothing was wrong")


def _is_busy(rank: fault.SimRank) -> bool:
    sessions = rank.sessions
    if isinstance(sessions, EncodeSessions):
        return bool(sessions.items or sessions.queue or any(o.ready or o.turn for o in sessions.outlets.values()))
    allocator = sessions.allocator
    return bool(sessions.requests or sessions.pending or sessions.recalled or allocator.leases or allocator.quarantined)


def _check_drained(world: World, cluster: Cluster, plan: _Plan) -> None:
    """I15: after a drain all pools are full and all tables empty. That a request has ended is news, and takes time."""
    limit = world.now + max(cluster.limits.lease_s, KEEP_S if plan.are_kept else 0.0) + DRAIN_S
    while True:
        ranks: list[fault.SimRank] = [*cluster.encodes, *cluster.languages]
        busy = [rank for rank in ranks if _is_busy(rank)]
        known = [name for rank in cluster.languages for name in (*rank.engine.known, *rank.book.running)]
        known += cluster.hub.router._requests  # whose end may be under way
        if not busy and not known and not any(encode.encoded or encode.tasks for encode in cluster.encodes):
            break
        if world.now > limit:
            states = [str(item.state) for rank in cluster.encodes for item in rank.sessions.items.values()]
            raise Violation(
                "I15", f"{len(busy)} ranks are not idle after the drain; encode items {states}; requests {known} known"
            )
        world.run(world.now + 1.0)
    if plan.are_kept:
        world.run(world.now + KEEP_S + GIVE_UP_S)
        kept = [offer for rank in cluster.languages for offer in rank.book.offer(0)]
        if kept:
            raise Violation("I17", f"{kept} are still kept")
