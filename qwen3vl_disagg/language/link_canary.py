"""The first rows over a new link, read as the engine would: each level has to be where it was on the other side."""

from __future__ import annotations

from qwen3vl_disagg.core.errors import HandshakeError, TransferError
from qwen3vl_disagg.core.faults import no_faults
from qwen3vl_disagg.language.receiver import Receiver
from qwen3vl_disagg.protocol.canary import MAX_ROWS, NUM_GRANTS, announced, canary_block, canary_jobs, canary_names
from qwen3vl_disagg.protocol.messages import LinkCanary
from qwen3vl_disagg.transport.buffers import MultimodalDataBuffers
from qwen3vl_disagg.transport.digest import part_digests
from qwen3vl_disagg.transport.links import Link, LinkBroken


def receive_canary(link: Link, said: LinkCanary, like: Receiver, timeout: float) -> None:
    """Receive what an encode rank announced, into buffers of its own made as those of `like`; blocks.

    HandshakeError names the part that is not what it was there; LinkBroken if it does not come.
    """
    visual, buffers = said.visual, like.buffers
    if not NUM_GRANTS <= visual.num_rows <= MAX_ROWS:
        raise HandshakeError("canary: rows", f"{NUM_GRANTS} to {MAX_ROWS}", visual.num_rows)
    block = canary_block(visual)
    own = MultimodalDataBuffers(
        like.config,
        num_rows=block,
        num_deepstack_rows=NUM_GRANTS * block,
        num_slots=1,
        block_size=block,
        dtype=buffers.dtype,
        device=buffers.input_embeddings.device,
    )
    receiver = Receiver(own, like.config)
    main = own.input_embeddings.new_empty(visual.num_rows, own.hidden_size)
    deepstack = main.new_empty(visual.num_rows, own.num_levels * own.hidden_size)
    try:
        with no_faults():
            for job in canary_jobs(visual, own.row_sizes, lambda grant: announced(said, grant)):
                rows = receiver.receive(link, job, timeout)
                here = slice(rows.start, rows.stop)
                rows.write(rows.start, rows.stop, main[here], deepstack[here])
    except LinkBroken:
        raise
    except (TransferError, ValueError) as error:
        raise HandshakeError("canary: transfer", "what was announced", str(error)) from error
    got = part_digests(main, deepstack)
    for name, expected, digest in zip(canary_names(own.num_levels), said.digests, got, strict=False):
        if digest != expected:
            raise HandshakeError(f"canary: {name}", expected, digest)
    if len(got) != len(said.digests):
        raise HandshakeError("canary: parts", len(said.digests), len(got))
