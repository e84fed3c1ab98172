"""One schedule: a cluster, requests and faults, all from one seed; and what must hold at its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import msgspec

from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.disagg.layout import RowSizes
from qwen3vl_disagg.disagg.simulation.cluster import LIMITS, Client, Cluster, Sizes
from qwen3vl_disagg.disagg.simulation.encode import SimEncode
from qwen3vl_disagg.disagg.simulation.language import SimLanguage
from qwen3vl_disagg.disagg.simulation.world import FAULTS, SILENCE_S, Violation, World

SETTLE_S = 30.0
"""After the last fault: long enough for every timeout and reconnection."""
TIMEOUT_S = 80.0


@dataclass(frozen=True)
class Outcome:
    seed: int
    events: int
    table: Counter[tuple[str, str]]
    num_answered: int
    num_failed: int
    violation: str | None = None
    invariant: str | None = None
    """The one that does not hold; `raised` when a machine raised."""


def run_schedule(seed: int) -> Outcome:
    """Everything that happens under this seed, up to the first violation."""
    world, cluster, plan = _prepare(seed)
    violation: str | None = None
    invariant: str | None = None
    try:
        _run(world, cluster, plan)
    except Violation as error:
        violation, invariant = str(error), error.invariant
    except Exception as error:  # a machine that raises has lost its way
        violation, invariant = f"raised {type(error).__name__}: {error}", "raised"
    answered = sum(1 for client in cluster.clients.values() if client.is_ended and client.error is None)
    failed = sum(1 for client in cluster.clients.values() if client.error is not None)
    return Outcome(seed, world.num_events, world.table, answered, failed, violation, invariant)


@dataclass(frozen=True)
class _Plan:
    has_faults: bool
    until: float
    """When faults stop."""
    num_late: int


def _prepare(seed: int) -> tuple[World, Cluster, _Plan]:
    world = World(seed, frozenset(), 0.0, 0.0)
    rng = world.rng
    has_faults = rng.random() < 0.8
    if has_faults:
        count = rng.choice((1, 1, 2, 3, len(FAULTS)))
        world.faults = frozenset(rng.sample(FAULTS, count))
        world.faults_until = rng.choice((2.0, 4.0, 8.0))
        world.rate = rng.choice((0.02, 0.05, 0.15))
    # Some clusters live on resumes and lose encode ranks in the middle of them.
    is_tight = has_faults and rng.random() < 0.25
    if is_tight:
        world.faults |= {"kill-encode", "break"}
    block_size = rng.randint(1, 3)
    blocks = 1 if is_tight else rng.choice((1, 1, 2, 3, 4, 8))
    levels = rng.choice((0, 1, 1, 1))
    sizes = Sizes(
        num_encode=rng.randint(1 + is_tight, 3),
        num_language=rng.randint(1, 2),
        block_size=block_size,
        blocks=blocks,
        deepstack_blocks=rng.choice((1, 2, 4, 12)) if levels else 0,
        slots=rng.randint(1, 4),
        row_sizes=RowSizes(4, 4, 12, 64, 4 * levels),
    )
    memory = rng.choice((1, 2, 8))
    limits = msgspec.structs.replace(LIMITS, max_items=memory, max_parked=memory)
    cluster = Cluster(world, sizes, limits, preemption=rng.choice((0.0, 0.05, 0.2)))
    plan = _Plan(has_faults, world.faults_until, 2)
    start = 0.3
    for number in range(rng.randint(2, 7)):
        world.at(start + 4.0 * rng.random() * rng.random(), None, _submit, cluster, f"r{number}", True)
    if has_faults:
        for _ in range(rng.randint(1, 6) + 4 * is_tight):
            world.at(start + plan.until * rng.random(), None, _strike, cluster)
    return world, cluster, plan


def _submit(cluster: Cluster, request_id: str, may_fail: bool) -> None:
    rng = cluster.world.rng
    rows = [rng.randint(1, 9) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    bad = may_fail and rng.random() < 0.06
    cluster.submit(request_id, rows, rng.randint(1, 3), TIMEOUT_S, bad=bad)
    if may_fail and rng.random() < 0.12:
        cluster.world.at(2.0 * rng.random(), None, cluster.abandon, request_id)


def _strike(cluster: Cluster) -> None:
    """One fault of a rank or a connection, of a kind that this schedule has."""
    world = cluster.world
    rng, faults = world.rng, world.faults
    if world.now > world.faults_until:
        return
    everybody: list[SimEncode | SimLanguage] = [*cluster.encodes, *cluster.languages]
    ranks = [rank for rank in everybody if not rank.is_dead]
    links = [link for encode in cluster.encodes if not encode.is_dead for link in encode.links.values()]
    kinds = sorted(faults & {"partition", "one-way", "kill-encode", "kill-language", "freeze", "slow", "break"})
    if not kinds or not ranks:
        return
    kind = rng.choice(kinds)
    seconds = rng.choice((0.2, 1.0, SILENCE_S + 1.0, 2 * SILENCE_S))
    if kind == "kill-encode":
        cluster.kill("encode", rng.randrange(cluster.sizes.num_encode), rng.choice((0.05, 0.05, 2.0)))
    elif kind == "kill-language":
        cluster.kill("language", rng.randrange(cluster.sizes.num_language), rng.choice((0.05, 2.0)))
    elif kind == "freeze":
        cluster.freeze(rng.choice(ranks), seconds)
    elif kind == "slow":
        cluster.slow(rng.choice(ranks), rng.choice((5.0, 40.0)), seconds)
    elif kind == "partition" and rng.random() < 0.3:
        cluster.cut_off(rng.choice(ranks), seconds)
    elif links and kind in ("partition", "one-way"):
        cluster.partition(rng.choice(links), kind == "one-way", seconds)
    elif links:
        cluster.break_link(rng.choice(links))


def _run(world: World, cluster: Cluster, plan: _Plan) -> None:
    """Requests under faults; then all must end; then, on the healed cluster, every new one must be answered."""
    world.run(6.0)
    _run_until_ended(world, cluster, cluster.clients, world.now + TIMEOUT_S + SETTLE_S)
    if not plan.has_faults:
        _check_all_answered(cluster.clients)
    world.run(max(world.now, plan.until + SETTLE_S if plan.has_faults else 0.0))
    late = [f"late{number}" for number in range(plan.num_late)]
    for request_id in late:
        _submit(cluster, request_id, False)
    clients = {name: cluster.clients[name] for name in late}
    _run_until_ended(world, cluster, clients, world.now + TIMEOUT_S)
    _check_all_answered(clients)
    _check_drained(world, cluster)


def _run_until_ended(world: World, cluster: Cluster, clients: dict[str, Client], limit: float) -> None:
    while not all(client.is_ended for client in clients.values()):
        if world.now > limit:
            waiting = [name for name, client in clients.items() if not client.is_ended]
            raise Violation("I11", f"{waiting} never ended")
        world.run(world.now + 1.0)


def _check_all_answered(clients: dict[str, Client]) -> None:
    """I11 without an excuse: nothing was wrong, so every answer has to come; a bad image is the client's fault."""
    for name, client in clients.items():
        if client.is_abandoned:
            continue
        if client.has_bad_image != isinstance(client.error, InputError) or (client.error and not client.has_bad_image):
            raise Violation("I11", f"{name} ended with {client.error!r} though nothing was wrong")


def _check_drained(world: World, cluster: Cluster) -> None:
    """I15: after a drain all pools are full and all tables empty."""
    limit = world.now + cluster.limits.lease_s + SETTLE_S
    while True:
        ranks: list[SimEncode | SimLanguage] = [*cluster.encodes, *cluster.languages]
        busy = [rank for rank in ranks if not rank.sessions.is_idle]
        if not busy and not any(encode.encoded or encode.tasks for encode in cluster.encodes):
            break
        if world.now > limit:
            states = [str(item.state) for rank in cluster.encodes for item in rank.sessions.items.values()]
            raise Violation("I15", f"{len(busy)} ranks are not idle after the drain; encode items {states}")
        world.run(world.now + 1.0)
    for language in cluster.languages:
        if language.engine.known or language.engine.requests:
            raise Violation("I15", f"requests {[*language.engine.known, *language.engine.requests]} are still known")
    if cluster.router.num_requests:
        raise Violation("I15", f"the router still has {cluster.router.num_requests} requests")
