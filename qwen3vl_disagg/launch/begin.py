"""The process that `qwen3vl-disagg serve` starts for a worker: Ctrl-C ends it without a word, also while it imports."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qwen3vl_disagg.cluster.slots import leave_process
    from qwen3vl_disagg.launch.worker import serve

    leave_process(serve())
