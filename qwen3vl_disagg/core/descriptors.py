"""File descriptors: the soft limit is raised at start, and who bounds what it opens asks for the limit here."""

from __future__ import annotations

import contextlib
import resource

ENOUGH = 1 << 16
"""More is never needed, and some systems have a hard limit of a thousand million."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of this process, and of its children, towards the hard one. The limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid it: then the limit is what it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return descriptor_limit()


def descriptor_limit() -> int:
    """How many descriptors this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH if soft == resource.RLIM_INFINITY else soft
