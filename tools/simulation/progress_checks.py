"""I11 of the sessions while time passes: a state that ought to end does, whatever its own deadline says."""

from __future__ import annotations

from typing import Any

from qwen3vl_disagg.protocol.encode_sessions import ENCODING, HEADER, PARKED, QUEUED, READY, SENDING, SENT
from qwen3vl_disagg.protocol.messages import Beat, Frame, ItemLost
from qwen3vl_disagg.protocol.session import GRANTED, IDLE, RECEIVING, WAITING
from qwen3vl_disagg.protocol.session_events import Attempt, SessionLimits
from tools.simulation.stays import Stays
from tools.simulation.world import RETURN_S, Channel, SimLink, Violation

TICK_S = 1.0
MAX_BROKEN = 3
"""Payloads of one grant that may break before its attempt is over."""


_KEPT = (QUEUED, ENCODING, READY, PARKED)
"""An attempt in any other state ends with the answer of its link, or breaks it."""


def encode_bounds(limits: SessionLimits, moving_s: float) -> dict[str, float]:
    """Seconds that an attempt may be in a state; in the others as long as its request. `moving_s`: what the bytes of a
    payload may take at most."""
    return {
        HEADER: limits.answer_s,
        SENDING: 2 * (limits.payload_s + moving_s),
        SENT: limits.answer_s + moving_s,
        PARKED: limits.lease_s,
    }


def language_bounds(limits: SessionLimits, moving_s: float) -> dict[str, float]:
    """A payload that does not come ends its link, and then the receive returns."""
    return {
        GRANTED: limits.grant_s,
        RECEIVING: 2 * (limits.payload_s + moving_s) + RETURN_S,
        WAITING: limits.suspend_s,
    }


def language_on_time(rank: Any) -> None:
    """After a tick nothing is past its deadline, and nothing has stayed where it was for too long."""
    sessions, now = rank.sessions, rank.world.now
    stays = rank.stays.look(now)
    if now - rank.frozen_until > 2 * TICK_S:
        for link in rank.links.values():
            _is_heard(link.to_encode, now, sessions.limits)
    for request_id, request in sessions.requests.items():
        running = rank.book.running.get(request_id)
        if running is None:
            raise Violation("I15", f"{request_id} is over, and the sessions have it still")
        if running.deadline <= now:
            raise Violation("I11", f"{request_id} is past its deadline")
        for session in request.sessions:
            state = session.state
            if session.deadline <= now:
                raise Violation("I11", f"{session.key} is {state} past its deadline")
            bound = rank.bounds.get(state)
            if bound is None or (state is WAITING and session.encode_rank in sessions.links):
                continue
            epoch = sessions._last_epochs.get(session.encode_rank, 0)
            mark = (session.key, state, epoch, session.received, rank.num_broken.get(session.key, 0))
            if stays.stay(mark) > bound:
                raise Violation("I11", f"{session.key} is {state} for longer than {bound} s")
    stays.done()


def encode_on_time(rank: Any) -> None:
    """As on the language side. I15: what nobody wants is not kept once that has been heard here."""
    sessions, now = rank.sessions, rank.world.now
    stays = rank.stays.look(now)
    if now - rank.frozen_until > 2 * TICK_S:
        for outgoing in rank.links.values():
            _is_heard(outgoing.to_language, now, sessions.limits)
    for attempt, item in sessions.items.items():
        if item.deadline <= now:
            raise Violation("I11", f"{attempt} is {item.state} past its deadline")
        bound = rank.bounds.get(item.state)
        if bound is not None and stays.stay((attempt, item.state, rank.num_steps[attempt])) > bound:
            raise Violation("I11", f"{attempt} is {item.state} for longer than {bound} s")
        if item.state in _KEPT and _is_kept_for_nobody(rank, attempt, item.language_rank, stays):
            raise Violation("I15", f"{attempt} is kept for nobody")
    stays.done()


def _is_kept_for_nobody(rank: Any, attempt: Attempt, language_rank: int, stays: Stays) -> bool:
    """Its language rank does not want the attempt, and what it said of that is not under way: this side has heard what
    it said later, over the link that was there when the attempt was given out."""
    link = rank.links.get(language_rank)
    if link is None or not link.is_sound or link.began_at >= rank.cluster.issued_at.get(attempt, 0.0):
        return False
    if link.language.sessions.find(*attempt) is not None:
        return False
    unwanted_since = rank.world.now - stays.stay((attempt, link.epoch))
    return link.to_encode.heard_at > unwanted_since


def _is_heard(way: Channel, now: float, limits: SessionLimits) -> None:
    """A link on which nothing happens has its beats: they show that the last frame was lost."""
    if way.is_open and now - way.said_at >= limits.beat_s + TICK_S:
        raise Violation("I11", f"nothing was said on a link for {now - way.said_at:.1f} s")


def may_beat(rank: Any, peer: int, frame: Frame) -> None:
    """I11: nobody says that nothing is new where something has been said."""
    now, said_at = rank.world.now, rank.said_at
    if type(frame.body) is Beat and now - said_at.get(peer, now) < rank.sessions.limits.beat_s - 1e-6:
        raise Violation("I11", f"a beat, {now - said_at.get(peer, now)} s after something was said")
    said_at[peer] = now


def gives_up(rank: Any, attempt: Attempt, was_awaited: bool) -> None:
    """I11: an attempt whose payloads break again and again is over, and no other one."""
    session = rank.sessions.find(*attempt)
    if was_awaited and session is None and rank.num_broken[attempt] < MAX_BROKEN:
        raise Violation("I11", f"{attempt} is given up after {rank.num_broken[attempt]} payloads broke")
    if rank.num_broken[attempt] >= MAX_BROKEN and session is not None and session.is_under_way:
        raise Violation("I11", f"{rank.num_broken[attempt]} payloads of {attempt} broke, and it goes on")


def has_no_link(rank: Any, lost: ItemLost) -> None:
    """I11: what is given up for want of a link has none."""
    request = rank.sessions.requests.get(lost.request_id)
    if lost.dead_epoch > 0 and request is not None:
        encode_rank = request.sessions[lost.item].encode_rank
        if encode_rank in rank.sessions.links:
            raise Violation("I11", f"{lost.key} is given up for want of a link to {encode_rank}, which is there")


def last_acks_come_again(rank: Any, link: SimLink, acked: set[Attempt]) -> None:
    """I13: the last acknowledgement of what the other end still keeps may have been lost with the link before."""
    for request in rank.sessions.requests.values():
        for session in request.sessions:
            is_here = session.state is not IDLE and session.received == session.total
            if is_here and session.key in link.encode.sessions.items and session.key not in acked:
                raise Violation("I13", f"rows of {session.key} are kept though all are here, and nobody says so")


def one_attempt_is_made(rank: Any, attempt: Attempt) -> None:
    """I10: a newer attempt at an item ends those before it."""
    for other, item in rank.sessions.items.items():
        if other[:2] == attempt[:2] and other[2] < attempt[2] and not item.is_dropped:
            raise Violation("I10", f"attempt {other[2]} at {other[:2]} goes on beside attempt {attempt[2]}")


def is_given_up(rank: Any, frame: Frame, attempt: Attempt, peer: int) -> None:
    """I15: an attempt ends when its language rank says that it is not wanted, unless its header is out."""
    outlet, item = rank.sessions.outlets.get(peer), rank.sessions.items.get(attempt)
    is_taken = outlet is not None and (outlet.state.epoch, outlet.state.num_received) == (frame.epoch, frame.seq)
    if is_taken and item is not None and item.language_rank == peer and not item.is_dropped:
        raise Violation("I15", f"{attempt} goes on as {item.state} though it was given up")
