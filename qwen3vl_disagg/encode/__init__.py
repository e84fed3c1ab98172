"""Encode ranks: bytes of images and clips to rows, and who gets them when."""
