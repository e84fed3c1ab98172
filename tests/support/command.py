"""`qwen3vl-disagg` in this process."""

from __future__ import annotations

import sys

import pytest

from qwen3vl_disagg import cli


def run_command(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `qwen3vl-disagg *args`."""
    monkeypatch.setattr(sys, "argv", ["qwen3vl-disagg", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err
