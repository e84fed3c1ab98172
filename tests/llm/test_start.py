"""What a process imports before its first answer: every rank pays for it, on every core that they share."""

from __future__ import annotations

import subprocess
import sys


def test_without_compile_nothing_of_the_compiler_is_imported():
    code = (
        "import sys\n"
        "from qwen3vl_disagg import LLM\n"
        "from qwen3vl_disagg.launch import bodies, serve\n"
        "llm = LLM(compile='off')\n"
        "[answer] = llm.chat([[{'role': 'user', 'content': 'hello'}]])\n"
        "assert answer.text, answer\n"
        "print(*sorted({'torch._dynamo', 'torch._inductor', 'torch.onnx'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr[-2000:]
