"""What one client may cost."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3vl_disagg.core.due import FIRST_COME
from qwen3vl_disagg.core.settings import MAX_REQUEST_TIMEOUT_S

MIB = 2**20
MAX_HEADER_BYTES = 16 * 2**10
MAX_BODY_BYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of the HTTP surface; sizes in bytes, times in seconds."""

    max_body_bytes: int = MAX_BODY_BYTES
    max_body_memory: int = 160 * MIB
    """Bodies of all requests that have not been read into a prompt yet."""
    body_timeout_s: float = 30.0
    max_requests: int = 1024
    """Chat requests at a time, whatever their stage."""
    prepare_threads: int = 2
    """Threads that parse bodies, and make prompts without clips."""
    large_threads: int = 2
    """Threads that wait for children which make prompts of large requests."""
    clip_threads: int = 2
    """Threads that make prompts with clips, which can take long: nobody else waits for them."""
    grammar_threads: int = 1
    """Threads that wait for children which check grammars that are new. One more does for those that take long: as many
    children as are kept without work."""
    request_timeout_s: float = 600.0
    """Used when the client sends no X-Request-Timeout-Ms."""
    max_request_timeout_s: float = MAX_REQUEST_TIMEOUT_S
    first_token_target_s: float = FIRST_COME
    """Used when the client sends no X-First-Token-Target-Ms. FIRST_COME: also when it does."""
    max_answer_tokens: int | None = None
    """Of an answer whose request names no bound. None: what is left of the context."""
    hide_cache_hits: bool = False
    """Nothing in an answer says what was in a cache."""
    ping_s: float = 15.0
    """A stream silent for this long gets an empty chunk, so that nothing between us and the client gives up."""
    send_timeout_s: float = 30.0
    """A client that reads nothing for this long is gone."""
