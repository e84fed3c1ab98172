"""Who owns which block. Pure: ids, owners, generations; no tensors.

A lease holds row blocks, DeepStack blocks and aux slots together. All leases that one grant needs come about together
or not at all. Only its owner can free a lease, once, at its generation. What may still be written into, or read, goes
to quarantine and comes back when that has ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

POOLS = ("rows", "deepstack", "slots")


@dataclass(frozen=True, slots=True)
class Want:
    """How many blocks (slots) of each pool."""

    rows: int = 0
    deepstack: int = 0
    slots: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """What one owner has: block ids in the item's order, aux slots."""

    owner: str
    generation: int
    rows: tuple[int, ...]
    deepstack: tuple[int, ...]
    slots: tuple[int, ...]


class BlockAllocator:
    """Three pools of ids: row blocks, DeepStack blocks, aux slots."""

    def __init__(self, *, num_blocks: int, num_deepstack_blocks: int, num_slots: int) -> None:
        self.totals = dict(zip(POOLS, (num_blocks, num_deepstack_blocks, num_slots), strict=True))
        if min(num_blocks, num_slots) < 1 or num_deepstack_blocks < 0:
            raise ValueError(f"pools need at least one block and one slot, got {self.totals}")
        self._free = {pool: list(range(total - 1, -1, -1)) for pool, total in self.totals.items()}
        self._leases: dict[int, Lease] = {}
        self._quarantine: dict[int, Lease] = {}
        self._generation = 0

    def num_free(self, pool: str) -> int:
        return len(self._free[pool])

    @property
    def leases(self) -> Mapping[int, Lease]:
        """What is owned, by generation."""
        return MappingProxyType(self._leases)

    @property
    def quarantined(self) -> Mapping[int, Lease]:
        return MappingProxyType(self._quarantine)

    def free_ids(self, pool: str) -> tuple[int, ...]:
        return tuple(self._free[pool])

    def counts(self, pool: str) -> tuple[int, int, int]:
        """(free, owned, quarantined) of a pool; they add up to its total."""
        owned = sum(len(getattr(lease, pool)) for lease in self._leases.values())
        held = sum(len(getattr(lease, pool)) for lease in self._quarantine.values())
        return len(self._free[pool]), owned, held

    @property
    def is_idle(self) -> bool:
        """Nothing owned, nothing in quarantine."""
        return not self._leases and not self._quarantine

    def grant(self, owner: str, *wants: Want) -> tuple[Lease, ...] | None:
        """A lease for each want, or None, and nothing taken, when they are not all free."""
        free = self._free
        if (
            sum([want.rows for want in wants]) > len(free["rows"])
            or sum([want.deepstack for want in wants]) > len(free["deepstack"])
            or sum([want.slots for want in wants]) > len(free["slots"])
        ):
            return None
        return tuple([self._lease(owner, want) for want in wants])

    def _lease(self, owner: str, want: Want) -> Lease:
        self._generation += 1
        lease = Lease(
            owner,
            self._generation,
            self._take("rows", want.rows),
            self._take("deepstack", want.deepstack),
            self._take("slots", want.slots),
        )
        self._leases[lease.generation] = lease
        return lease

    def _take(self, pool: str, count: int) -> tuple[int, ...]:
        if not count:
            return ()
        free = self._free[pool]
        taken = sorted(free[-count:])
        del free[-count:]
        return tuple(taken)

    def free(self, lease: Lease) -> None:
        """Give everything back. ValueError unless this very lease is owned."""
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

    def reclaim(self, lease: Lease) -> None:
        """End a quarantine by giving the lease back to the owner it was taken from. ValueError if there is none."""
        if self._quarantine.get(lease.generation) != lease:
            raise ValueError(f"lease {lease.generation} of {lease.owner} is not in quarantine")
        del self._quarantine[lease.generation]
        self._leases[lease.generation] = lease

    def _remove(self, lease: Lease) -> None:
        if self._leases.get(lease.generation) != lease:
            raise ValueError(f"lease {lease.generation} of {lease.owner} is not owned")
        del self._leases[lease.generation]

    def _return(self, lease: Lease) -> None:
        for pool, ids in (("rows", lease.rows), ("deepstack", lease.deepstack), ("slots", lease.slots)):
            if ids:
                self._free[pool].extend(reversed(ids))
