"""The first rows over a new link: those of the picture that this rank has checked its tower with."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3vl_disagg.core.faults import no_faults
from qwen3vl_disagg.core.requests import VisualItem
from qwen3vl_disagg.encode.worker import EncodedItem
from qwen3vl_disagg.protocol.canary import canary_jobs
from qwen3vl_disagg.protocol.layout import RowSizes
from qwen3vl_disagg.protocol.messages import LinkCanary
from qwen3vl_disagg.protocol.session_events import Receive
from qwen3vl_disagg.transport.digest import part_digests
from qwen3vl_disagg.transport.links import Link


@dataclass(frozen=True)
class CheckedRows:
    """Rows that are what the checkpoint's own tower gives."""

    visual: VisualItem
    item: EncodedItem

    def _jobs(self) -> list[Receive]:
        hidden = self.item.main.shape[1]
        sizes = RowSizes.of(
            hidden_size=hidden,
            num_levels=self.item.deepstack.shape[1] // hidden,
            itemsize=self.item.main.dtype.itemsize,
        )
        return list(canary_jobs(self.visual, sizes, self.item.header))

    def announcement(self) -> LinkCanary:
        """What the other end has to find in its buffers."""
        return LinkCanary(
            visual=self.visual,
            headers=[job.header for job in self._jobs()],
            digests=part_digests(self.item.main, self.item.deepstack),
        )

    def send(self, link: Link, timeout: float) -> None:
        """All of it, grant by grant; blocks. LinkBroken if the other end is gone."""
        with no_faults():
            for job in self._jobs():
                link.send(self.item.payload(job.grant), timeout)
