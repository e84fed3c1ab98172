"""Bytes of pictures and clips -> RGB pixels, in processes that can be killed. Nothing here imports torch."""
