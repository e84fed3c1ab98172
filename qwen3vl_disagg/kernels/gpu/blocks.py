"""Sizes of Triton's blocks, which are powers of two."""


def power_of_two(count: int) -> int:
    """The smallest that is not less, at least 1."""
    return 1 << max(count - 1, 0).bit_length()
