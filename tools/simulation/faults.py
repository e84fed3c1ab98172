"""What can go wrong with whole ranks, with the hub, and with connections."""

from __future__ import annotations

from typing import Any

from qwen3vl_disagg.core.errors import UnavailableError
from qwen3vl_disagg.protocol.messages import Leaving
from tools.simulation.cluster import Cluster
from tools.simulation.encode import SimEncode
from tools.simulation.hub import SimHub
from tools.simulation.language import SimLanguage
from tools.simulation.world import SILENCE_S, Channel, SimLink

SimRank = SimEncode | SimLanguage
DRAIN_S = 20.0
"""An encode rank that wants to leave goes after this time without being told."""


def role_of(rank: SimRank) -> str:
    return "encode" if isinstance(rank, SimEncode) else "language"


def kill(cluster: Cluster, rank: SimRank, restart_s: float, fault: str) -> None:
    """kill -9: the kernel closes its connections; the slot forks it again."""
    if rank.is_dead:
        return
    rank.count_states(fault)
    cluster.end_process(rank, restart_s)


def die_slowly(cluster: Cluster, encode: SimEncode, restart_s: float, fault: str) -> None:
    """Its links go first and come back, for longer than items wait for them; then it is killed."""
    world, without_s = cluster.world, cluster.limits.suspend_s + 1.5
    for language in cluster.languages:
        _keep_apart(cluster, encode, language, without_s)
    for link in list(encode.links.values()):
        link.close(encode, "dying")
    world.at(without_s + 2.0 * world.random(), None, kill, cluster, encode, restart_s, fault)


def _keep_apart(cluster: Cluster, encode: SimRank, language: SimRank, seconds: float) -> None:
    for way in ((pair := (("encode", encode.rank), ("language", language.rank))), pair[::-1]):
        cluster.blocked.add(way)
        cluster.world.at(seconds, None, cluster.blocked.discard, way)


def blink(cluster: Cluster, link: SimLink) -> None:
    """A link is gone for a little longer than items wait for it, and what its language rank says to the hub of that
    comes later than the news of the next link."""
    world, language = cluster.world, link.language
    link.count("break")
    without_s = cluster.limits.suspend_s + 1.0 + 0.5 * world.random()
    _keep_apart(cluster, link.encode, language, without_s)
    link.close(link.encode, "broken")
    if language.hub is not None:
        language.hub.last = max(language.hub.last, world.now + without_s + 2.0 * world.random())


def kill_hub(cluster: Cluster, restart_s: float) -> None:
    """The frontend dies, and with it every request; clients see their connections end. Links stay."""
    if cluster.hub.is_dead:
        return
    world = cluster.world
    cluster.hub.is_dead = True
    cluster.hub.connections.clear()
    for client in cluster.clients.values():
        if not client.is_ended:
            client.end(UnavailableError("the connection was reset"))
    everybody: list[SimRank] = [*cluster.encodes, *cluster.languages]
    for rank in everybody:
        was_open = rank.hub is not None and rank.hub.is_open
        rank.close_hub()
        if rank.is_dead or not was_open:
            continue
        rank.count_states("kill-hub")
        world.at(0.02 * world.random(), rank, _notice, cluster, rank)
    world.at(restart_s, None, _restart_hub, cluster)


def _restart_hub(cluster: Cluster) -> None:
    cluster.gone.append(cluster.hub)
    cluster.hub = SimHub(cluster)


def leave(cluster: Cluster, encode: SimEncode, restart_s: float) -> None:
    """It asks to go, and goes when it is told, or has waited for long enough; another one takes its place."""
    if encode.is_leaving:
        return
    encode.count_states("leave")
    encode.is_leaving = True
    encode.on_stop = lambda: cluster.world.at(cluster.world.random(), encode, _go, cluster, encode, restart_s)
    encode.tell(Leaving())
    cluster.world.at(DRAIN_S, encode, _go, cluster, encode, restart_s)


def _go(cluster: Cluster, encode: SimEncode, restart_s: float) -> None:
    if not encode.is_dead:
        cluster.end_process(encode, restart_s)


def freeze(cluster: Cluster, rank: SimRank, seconds: float) -> None:
    """SIGSTOP; peers give up on it when it is silent for too long."""
    world = cluster.world
    rank.count_states("freeze")
    rank.frozen_until = max(rank.frozen_until, world.now + seconds)
    if seconds > SILENCE_S:
        for link in list(rank.links.values()):
            other: Any = link.language if rank is link.encode else link.encode
            world.at(SILENCE_S, other, link.close, other, "peer silent")
        world.at(SILENCE_S, None, _cut_hub, cluster, rank)


def _cut_hub(cluster: Cluster, rank: SimRank, *, by_rank: bool = False) -> None:
    """The hub gave the rank up; the rank finds out when it can, and joins again. Or it was the rank that gave up, and
    the hub hears of it when the rank is back, or by its silence."""
    world = cluster.world
    if not rank.is_dead and rank.hub is not None and rank.hub.is_open:
        if by_rank:
            rank.close_hub()
            world.at(SILENCE_S, None, _hear_nothing, cluster, rank, rank.hub)
        else:
            cluster.hub_lost(rank, role_of(rank))
        world.at(0.05, rank, _notice, cluster, rank)


def _notice(cluster: Cluster, rank: SimRank) -> None:
    """A rank sees that its connection with the hub is gone, and then comes again, also when it is frozen meanwhile."""
    rank.lost_hub()
    cluster.world.at(0.05, rank, cluster.rejoin, rank)


def _hear_nothing(cluster: Cluster, rank: SimRank, channel: Channel) -> None:
    if rank.hub is channel:
        cluster.hub_lost(rank, role_of(rank))


def slow(cluster: Cluster, rank: SimRank, factor: float, seconds: float) -> None:
    rank.count_states("slow")
    rank.slowness = factor
    cluster.world.at(seconds, rank, setattr, rank, "slowness", 1.0)


def partition(cluster: Cluster, link: SimLink, one_way: bool, seconds: float) -> None:
    """Nothing gets through, in one direction or both; an end that hears nothing for too long closes."""
    world = cluster.world
    link.count("one-way" if one_way else "partition")
    pair = (("encode", link.encode.rank), ("language", link.language.rank))
    ways: list[tuple[Any, Channel, SimRank]] = [(pair, link.to_language, link.language)]
    if not one_way:
        ways.append((pair[::-1], link.to_encode, link.encode))
    elif world.random() < 0.5:
        ways = [(pair[::-1], link.to_encode, link.encode)]
    for way, channel, listener in ways:
        cluster.blocked.add(way)
        channel.hold()
        if seconds > SILENCE_S:
            world.at(SILENCE_S, listener, _silent, channel, link, listener)
        world.at(seconds, None, _heal, cluster, way, channel)


def _silent(channel: Channel, link: SimLink, listener: Any) -> None:
    if channel.held is not None:
        link.close(listener, "peer silent")


def _heal(cluster: Cluster, way: Any, channel: Channel) -> None:
    cluster.blocked.discard(way)
    channel.heal()


def cut_off(cluster: Cluster, rank: SimRank, seconds: float) -> None:
    """A rank's connection with the hub is gone for a while."""
    way = (role_of(rank), rank.rank)
    rank.count_states("partition")
    cluster.blocked.add(way)
    _cut_hub(cluster, rank, by_rank=cluster.world.random() < 0.5)
    cluster.world.at(seconds, None, cluster.blocked.discard, way)


def black_hole(cluster: Cluster, link: SimLink, until: float) -> None:
    """Frames pass between two ranks, payloads do not, over this link and those that follow."""
    link.count("black-hole")
    link.hole_until = cluster.holes[link.encode.rank, link.language.rank] = until


def break_link(cluster: Cluster, link: SimLink) -> None:
    """The connection ends, for no reason that anybody knows."""
    link.count("break")
    by = link.encode if cluster.world.random() < 0.5 else link.language
    if not by.is_dead:
        link.close(by, "broken")
