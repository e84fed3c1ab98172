"""Who owns which block. Pure: ids, owners, generations; no tensors.

A lease holds row blocks, DeepStack blocks and an aux slot together, or does not come about. Only its owner can free it,
once, at its generation. What may still be written into goes to quarantine and comes back when that has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

POOLS = ("rows", "deepstack", "slots")


@dataclass(frozen=True)
class Lease:
    """What one session owns: block ids in the item's order, and its aux slot."""

    owner: str
    generation: int
    rows: tuple[int, ...]
    deepstack: tuple[int, ...]
    slot: int

    def of(self, pool: str) -> tuple[int, ...]:
        return (self.slot,) if pool == "slots" else self.rows if pool == "rows" else self.deepstack


class BlockAllocator:
    """Three pools of ids: row blocks, DeepStack blocks, aux slots."""

    def __init__(self, *, num_blocks: int, num_deepstack_blocks: int, num_slots: int) -> None:
        self.totals = dict(zip(POOLS, (num_blocks, num_deepstack_blocks, num_slots), strict=True))
        if min(num_blocks, num_slots) < 1 or num_deepstack_blocks < 0:
            raise ValueError(f"pools need at least one block and one slot, got {self.totals}")
        self._free = {pool: list(range(total - 1, -1, -1)) for pool, total in self.totals.items()}
        self._leases: dict[str, Lease] = {}
        self._quarantine: dict[int, Lease] = {}
        self._generation = 0

    def counts(self, pool: str) -> tuple[int, int, int]:
        """(free, owned, quarantined) of a pool; they add up to its total."""
        owned = sum(len(lease.of(pool)) for lease in self._leases.values())
        held = sum(len(lease.of(pool)) for lease in self._quarantine.values())
        return len(self._free[pool]), owned, held

    @property
    def is_idle(self) -> bool:
        """Nothing owned, nothing in quarantine."""
        return not self._leases and not self._quarantine

    def could_ever_fit(self, num_blocks: int, num_deepstack_blocks: int) -> bool:
        return num_blocks <= self.totals["rows"] and num_deepstack_blocks <= self.totals["deepstack"]

    def grant(self, owner: str, num_blocks: int, num_deepstack_blocks: int) -> Lease | None:
        """A lease of all that is asked for, or None when it is not free. ValueError if the owner has one already."""
        if owner in self._leases:
            raise ValueError(f"{owner} owns a lease already")
        wanted = {"rows": num_blocks, "deepstack": num_deepstack_blocks, "slots": 1}
        if any(len(self._free[pool]) < count for pool, count in wanted.items()):
            return None
        self._generation += 1
        taken = {pool: tuple(sorted(self._take(pool, count))) for pool, count in wanted.items()}
        lease = Lease(owner, self._generation, taken["rows"], taken["deepstack"], taken["slots"][0])
        self._leases[owner] = lease
        return lease

    def _take(self, pool: str, count: int) -> list[int]:
        return [self._free[pool].pop() for _ in range(count)]

    def owned(self, owner: str) -> Lease | None:
        return self._leases.get(owner)

    def free(self, lease: Lease) -> None:
        """Give everything back. ValueError unless this very lease is the owner's."""
        self._remove(lease)
        self._return(lease)

    def quarantine(self, lease: Lease) -> None:
        """Take it from its owner, but keep it from everybody until `release`."""
        self._remove(lease)
        self._quarantine[lease.generation] = lease

    def release(self, lease: Lease) -> None:
        """End a quarantine. ValueError if there is none."""
        if self._quarantine.get(lease.generation) != lease:
            raise ValueError(f"lease {lease.generation} of {lease.owner} is not in quarantine")
        del self._quarantine[lease.generation]
        self._return(lease)

    def _remove(self, lease: Lease) -> None:
        if self._leases.get(lease.owner) != lease:
            raise ValueError(f"lease {lease.generation} of {lease.owner} is not owned")
        del self._leases[lease.owner]

    def _return(self, lease: Lease) -> None:
        for pool in POOLS:
            self._free[pool].extend(reversed(lease.of(pool)))
