"""What the language side accepts, what it refuses, and that nothing it refuses leaves a trace."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen3vl_disagg.core.errors import InputError, TransferError
from qwen3vl_disagg.disagg.buffers import MultimodalDataBuffers
from qwen3vl_disagg.disagg.encode_worker import EncodedItem
from qwen3vl_disagg.disagg.layout import AUX_FIELDS
from qwen3vl_disagg.disagg.links import InProcessLink, LinkBroken
from qwen3vl_disagg.disagg.receiver import LanguageReceiver
from tests.support.random_model import small_config
from tests.support.transfer import make_encoded, make_visual

CONFIG = small_config()
VISUAL = make_visual(CONFIG)  # 6 rows


def make_receiver(*, rows: int = 16, slots: int = 8, config=CONFIG, deepstack_rows: int | None = None):
    buffers = MultimodalDataBuffers(
        config, num_rows=rows, num_deepstack_rows=deepstack_rows, num_slots=slots, block_size=4
    )
    return LanguageReceiver(buffers, config)


def grant_of(receiver, request_id="r", item=0, attempt=1, visual=VISUAL):
    grant = receiver.grant(request_id, item, attempt, visual)
    assert grant is not None
    return grant


def deliver(receiver, encoded: EncodedItem, *, grant=None, header=None, payload=None):
    """One whole transfer over an in-process link; header and payload can be replaced by damaged ones."""
    grant = grant or grant_of(receiver, visual=make_visual(receiver.config, encoded.grid))
    link = InProcessLink()
    link.send(encoded.payload(grant) if payload is None else payload, 1)
    return receiver.receive(link, receiver.begin(header or encoded.header(grant)), 1)


def check_that_the_next_item_passes(receiver) -> None:
    assert receiver.is_idle
    encoded = make_encoded(receiver.config, seed=99)
    received = deliver(receiver, encoded)
    assert torch.equal(received.main, encoded.main)
    assert torch.equal(received.deepstack, encoded.deepstack)
    assert receiver.is_idle


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_rows_come_out_bit_equal_also_from_scattered_blocks(levels):
    config = small_config(levels=levels)
    receiver = make_receiver(rows=32, slots=9, config=config, deepstack_rows=36)
    shift = receiver.buffers.allocator.grant("shift", 0, 1)  # so that the two tables never hold the same ids
    for grid in ((1, 2, 2), (1, 4, 6), (1, 8, 8), (1, 2, 18)):
        visual = make_visual(config, grid)
        small = [grant_of(receiver, str(i), visual=make_visual(config, (1, 2, 2))) for i in range(8)]
        for i in (1, 2, 4, 6, 7):
            receiver.drop(small[i].request_id, 0, 1)
        grant = grant_of(receiver, visual=visual)
        encoded = make_encoded(config, grid, seed=visual.num_rows)
        received = deliver(receiver, encoded, grant=grant)
        assert torch.equal(received.main, encoded.main)
        assert torch.equal(received.deepstack, encoded.deepstack)
        assert received.deepstack.shape == (visual.num_rows, levels * 32)
        for i in (0, 3, 5):
            receiver.cancel(str(i))
    receiver.buffers.allocator.free(shift)
    assert receiver.is_idle


def test_what_came_out_does_not_change_when_the_blocks_are_used_again():
    receiver = make_receiver(rows=8)
    first, second = make_encoded(CONFIG, seed=1), make_encoded(CONFIG, seed=2)
    kept = deliver(receiver, first)
    deliver(receiver, second)
    assert torch.equal(kept.main, first.main)
    assert torch.equal(kept.deepstack, first.deepstack)


BAD_HEADERS = {
    "fewer rows": {"total_rows": 5},
    "more rows": {"total_rows": 7},
    "sides swapped": {"grid": (1, 6, 4)},
    "another start": {"row_start": 1},
    "beyond the grant": {"row_stop": 7},
    "no DeepStack": {"deepstack_stop": 0},
    "DeepStack from the second row": {"deepstack_start": 1},
    "an older attempt": {"attempt": 0},
    "a newer attempt": {"attempt": 2},
    "another item": {"item": 1},
    "another request": {"request_id": "s"},
}


@pytest.mark.parametrize("change", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_does_not_fit_changes_nothing(change):
    receiver = make_receiver()
    grant, encoded = grant_of(receiver), make_encoded(CONFIG)
    with pytest.raises(TransferError):
        receiver.begin(msgspec.structs.replace(encoded.header(grant), **change))
    received = deliver(receiver, encoded, grant=grant)  # the session still stands
    assert torch.equal(received.main, encoded.main)
    check_that_the_next_item_passes(receiver)


def test_one_header_begins_one_payload():
    receiver = make_receiver()
    header = make_encoded(CONFIG).header(grant_of(receiver))
    receiver.begin(header)
    with pytest.raises(TransferError, match="no such session"):
        receiver.begin(header)


def test_a_header_after_the_end_is_stale():
    receiver = make_receiver()
    grant, encoded = grant_of(receiver), make_encoded(CONFIG)
    deliver(receiver, encoded, grant=grant)
    with pytest.raises(TransferError, match="no such session"):
        receiver.begin(encoded.header(grant))
    check_that_the_next_item_passes(receiver)


def _with(encoded: EncodedItem, name: str, row: int, value: float) -> EncodedItem:
    changed = getattr(encoded, name).clone()
    changed.view(len(changed), -1)[row, -1] = value
    return replace(encoded, **{name: changed})


BAD_ROWS = {
    "NaN in a main row": ("main", 3, float("nan"), "NaN"),
    "infinity in the last DeepStack row": ("deepstack", 5, float("-inf"), "NaN or infinity"),
    "another placeholder": ("fill_ids", 2, CONFIG.video_token_id, "fill_ids"),
    "positions of another grid": ("positions", 4, 7, "positions"),
}


@pytest.mark.parametrize(("name", "row", "value", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_cannot_be_right_fail_the_item_alone(name, row, value, reason):
    """The digest is of the wrong rows, so that only the check of the rows themselves can refuse them."""
    receiver = make_receiver()
    with pytest.raises(TransferError, match=reason):
        deliver(receiver, _with(make_encoded(CONFIG), name, row, value))
    check_that_the_next_item_passes(receiver)


@pytest.mark.parametrize("name", ["main", "deepstack", "fill_ids", "positions"])
def test_rows_damaged_on_the_way_do_not_have_the_digest(name):
    receiver = make_receiver()
    grant, encoded = grant_of(receiver), make_encoded(CONFIG)
    damaged = _with(encoded, name, 5, 3)
    aux = encoded.payload(grant)[3 * len(grant.row_runs)]
    payload = [aux if piece.dtype == torch.int64 else piece for piece in damaged.payload(grant)]
    with pytest.raises(TransferError, match="digest"):
        deliver(receiver, encoded, grant=grant, payload=payload)
    check_that_the_next_item_passes(receiver)


@pytest.mark.parametrize("column", range(len(AUX_FIELDS)), ids=AUX_FIELDS)
def test_aux_has_to_agree_with_the_header(column):
    receiver = make_receiver()
    grant, encoded = grant_of(receiver), make_encoded(CONFIG)
    payload = encoded.payload(grant)
    payload[3 * len(grant.row_runs)][column] += 1
    with pytest.raises(TransferError, match=f"aux {AUX_FIELDS[column]}"):
        deliver(receiver, encoded, grant=grant, payload=payload)
    check_that_the_next_item_passes(receiver)


def test_another_requests_rows_of_the_same_shape_are_refused():
    receiver = make_receiver()
    mine, other = grant_of(receiver, "mine"), grant_of(receiver, "other")
    encoded, strange = make_encoded(CONFIG, seed=1), make_encoded(CONFIG, seed=2)
    with pytest.raises(TransferError, match="digest"):
        deliver(receiver, encoded, grant=mine, payload=strange.payload(other))


def test_a_payload_that_does_not_come_breaks_the_link_and_frees_the_blocks():
    receiver = make_receiver()
    receiving = receiver.begin(make_encoded(CONFIG).header(grant_of(receiver)))
    with pytest.raises(LinkBroken):
        receiver.receive(InProcessLink(), receiving, 0.05)
    check_that_the_next_item_passes(receiver)


def test_no_room_is_none_now_and_an_input_error_for_ever():
    receiver = make_receiver(rows=8)
    grant_of(receiver, "first")
    assert receiver.grant("second", 0, 1, VISUAL) is None
    receiver.cancel("first")
    assert receiver.grant("second", 0, 1, VISUAL) is not None
    receiver.cancel("second")
    with pytest.raises(InputError, match=r"9 rows.*8 rows") as caught:
        receiver.grant("large", 0, 1, make_visual(CONFIG, (1, 6, 6)))
    assert caught.value.param == "messages[0]"
    check_that_the_next_item_passes(receiver)


@pytest.mark.parametrize("short", [{"slots": 1}, {"deepstack_rows": 8}])
def test_a_grant_needs_a_slot_and_deepstack_rows_too(short):
    receiver = make_receiver(rows=32, **short)
    grant_of(receiver, "first")
    assert receiver.grant("second", 0, 1, VISUAL) is None
    receiver.cancel("first")
    check_that_the_next_item_passes(receiver)


def test_a_new_attempt_replaces_the_old_one():
    receiver = make_receiver(rows=8)  # room for one only
    old = grant_of(receiver, attempt=1)
    new = grant_of(receiver, attempt=2)
    encoded = make_encoded(CONFIG)
    with pytest.raises(TransferError):
        receiver.begin(encoded.header(old))
    receiver.drop("r", 0, 1)  # stale: changes nothing
    assert torch.equal(deliver(receiver, encoded, grant=new).main, encoded.main)
    check_that_the_next_item_passes(receiver)


def test_a_grant_for_an_older_attempt_changes_nothing():
    receiver = make_receiver()
    new, encoded = grant_of(receiver, attempt=2), make_encoded(CONFIG)
    with contextlib.suppress(TransferError):
        receiver.grant("r", 0, 1, VISUAL)
    assert torch.equal(deliver(receiver, encoded, grant=new).main, encoded.main)


class HeldLink(InProcessLink):
    """A receive that has been posted and hangs until `go`; then it writes what was sent, or fails."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.posted, self.go, self.fails = threading.Event(), threading.Event(), fails

    def receive(self, tensors, timeout):
        self.posted.set()
        assert self.go.wait(10)
        for tensor in tensors:
            tensor.fill_(1)  # late bytes
        if self.fails:
            raise LinkBroken("held")
        super().receive(tensors, timeout)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", ["drop", "cancel", "new attempt"])
def test_blocks_stay_in_quarantine_until_the_pending_receive_returned(how, fails):
    receiver = make_receiver(rows=16, slots=2)
    grant, encoded = grant_of(receiver), make_encoded(CONFIG)
    link = HeldLink(fails=fails)
    link.send(encoded.payload(grant), 1)
    with ThreadPoolExecutor(1) as thread:
        receiving = thread.submit(receiver.receive, link, receiver.begin(encoded.header(grant)), 5)
        assert link.posted.wait(5)
        if how == "drop":
            receiver.drop("r", 0, 1)
        elif how == "cancel":
            receiver.cancel("r")
        other = grant_of(receiver, "r" if how == "new attempt" else "other", attempt=2)
        assert receiver.grant("third", 0, 1, VISUAL) is None, "the quarantined blocks were granted"
        assert receiver.buffers.allocator.counts("rows") == (0, 2, 2)
        link.go.set()
        if fails:
            with pytest.raises(LinkBroken):
                receiving.result(5)
        else:
            assert receiving.result(5) is None
    assert receiver.buffers.allocator.counts("rows") == (2, 2, 0)
    assert torch.equal(deliver(receiver, encoded, grant=other).main, encoded.main)
    check_that_the_next_item_passes(receiver)


class ReceiverHistory(RuleBasedStateMachine):
    """Random histories of three items on buffers for two. Receives are held open, so that drops fall into them."""

    def __init__(self):
        super().__init__()
        self.receiver = make_receiver(rows=16, slots=2)
        self.granted: dict[str, tuple] = {}
        self.receiving: list[tuple] = []
        self.attempts = dict.fromkeys("abc", 0)

    @property
    def num_quarantined(self) -> int:
        return sum(self.granted.get(r, (None,))[0] is not grant for r, grant, *_ in self.receiving)

    @rule(request=st.sampled_from("abc"))
    def grant(self, request):
        self.attempts[request] += 1
        self.granted.pop(request, None)  # only granted: its blocks are free again; receiving: in quarantine
        held = len(self.granted) + self.num_quarantined
        grant = self.receiver.grant(request, 0, self.attempts[request], VISUAL)
        assert (grant is not None) == (held < 2)
        if grant is not None:
            self.granted[request] = (grant, None)

    @precondition(lambda self: any(link is None for _, link in self.granted.values()))
    @rule(data=st.data(), good=st.booleans())
    def begin(self, data, good):
        request = data.draw(st.sampled_from(sorted(r for r, (_, link) in self.granted.items() if link is None)))
        grant, _ = self.granted[request]
        encoded = make_encoded(CONFIG, seed=grant.attempt)
        link = InProcessLink()
        link.send(encoded.payload(grant) if good else _with(encoded, "main", 0, 5.0).payload(grant), 1)
        receiving = self.receiver.begin(encoded.header(grant))
        self.granted[request] = (grant, link)
        self.receiving.append((request, grant, link, receiving, encoded, good))

    @precondition(lambda self: self.receiving)
    @rule(data=st.data())
    def finish(self, data):
        entry = data.draw(st.sampled_from(self.receiving))
        self.receiving.remove(entry)
        request, grant, link, receiving, encoded, good = entry
        is_live = self.granted.get(request, (None,))[0] is grant
        if is_live:
            del self.granted[request]
        if is_live and not good:
            with pytest.raises(TransferError):
                self.receiver.receive(link, receiving, 1)
            return
        received = self.receiver.receive(link, receiving, 1)
        assert (received is not None) == is_live
        if received is not None:
            assert torch.equal(received.main, encoded.main)
            assert torch.equal(received.deepstack, encoded.deepstack)

    @rule(request=st.sampled_from("abc"), age=st.integers(0, 2))
    def drop(self, request, age):
        attempt = self.attempts[request] - age
        if request in self.granted and self.granted[request][0].attempt == attempt:
            del self.granted[request]
        self.receiver.drop(request, 0, attempt)

    @invariant()
    def blocks_add_up(self):
        live, quarantined = len(self.granted), self.num_quarantined
        for pool, each in (("rows", 2), ("deepstack", 2), ("slots", 1)):
            expected = (each * (2 - live - quarantined), each * live, each * quarantined)
            assert self.receiver.buffers.allocator.counts(pool) == expected, pool

    @invariant()
    def idle_is_idle(self):
        assert self.receiver.is_idle == (not self.granted and not self.receiving)


TestReceiverHistory = ReceiverHistory.TestCase
