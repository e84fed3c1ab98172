"""`python -m qwen3vl_disagg`."""

from qwen3vl_disagg.cli import main

main()
