"""An engine's steps, and the thread of its own on which they hold up no event loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from typing import Any

from qwen3vl_disagg.cluster.shared_cores import SharedCores
from qwen3vl_disagg.encode.shared_gpu import SharedGpu
from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.parallel.lockstep import Outlook, StepPlan
from qwen3vl_disagg.protocol.messages import LanguageLoad

Command = Callable[[Engine], list[EngineEvent] | None]
EventSink = Callable[[list[EngineEvent]], None]
HOLD_S = 0.02
"""How long a rank that takes steps with others keeps its cores while it waits for the next one."""
CHECK_S = 2.0
"""How often whoever waits for something to do looks whether it can still come."""


class EngineSteps:
    """Commands and steps one after another, on the thread that takes `turn` after `turn`.

    `post` a command (a function of the engine; the events it returns are passed on) from any thread. With `report`,
    steps are taken together with other ranks: it is told what this one could do, whenever that changes, and each plan
    that `take_plan` brings is a step. `cores`: those of the host, claimed before each step. `gpu`: where a tower of
    this process has it, too.
    """

    gpu: SharedGpu | None = None

    def __init__(
        self,
        engine: Engine,
        report: Callable[[Outlook], None] | None = None,
        cores: SharedCores | None = None,
    ) -> None:
        self._engine, self._report, self._cores = engine, report, cores
        self._plan: StepPlan | None = None
        self._outlook = Outlook(step=0)
        """As last reported."""
        engine.on_ready = lambda: self.post(lambda _: None)
        self._num_steps, self._longest_s, self._is_in_turn = 0, 0.0, False
        self._wake = threading.Condition()
        self._commands: deque[Command] = deque()
        self._stopping = False

    def post(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def take_plan(self, plan: StepPlan) -> None:
        """What all ranks do next; from any thread."""
        with self._wake:
            self._plan = plan
            self._wake.notify()

    def load(self) -> LanguageLoad:
        """What there is to do; from any thread, at once."""
        scheduler = self._engine.scheduler
        pool = scheduler.pool
        return LanguageLoad(
            running=len(scheduler.admitted),
            waiting=len(scheduler.waiting),
            kv_pages_used=pool.num_pages - pool.num_free,
            kv_pages=pool.num_pages,
            num_steps=self._num_steps,
            longest_step_s=self._longest_s,
            num_preemptions=scheduler.num_preempted,
            can_step=bool(self._commands or self._plan or self._is_in_turn or self._outlook.has_work),
        )

    def turn(self, on_events: EventSink, check: Callable[[], None] | None = None) -> bool:
        """What was posted, then a step, and the decode step that a prefill step owes: what is posted meanwhile, the
        tower's batch above all, comes between two tokens once. Waits while there is nothing to do, and calls `check`
        every CHECK_S: what it raises ends that. False: stop."""
        work = self._next(check)
        if work is None:
            return False
        commands, plan = work
        self._is_in_turn, started = True, time.monotonic()
        if self._cores is not None:
            self._cores.claim()
        with nullcontext() if self.gpu is None else self.gpu.step(self._engine.scheduler):
            for command in commands:
                _tell(on_events, command(self._engine) or [])
            _tell(on_events, self._engine.admit())
            if self._report is not None:
                self._step_together(on_events, plan, self._report)
            elif self._engine.has_work:
                _tell(on_events, self._engine.step())
                if self._engine.owes_decode:
                    _tell(on_events, self._engine.step())
        # Commands alone take ranks that step together no step further.
        self._num_steps += self._report is None or plan is not None
        self._longest_s = max(self._longest_s, time.monotonic() - started)
        self._is_in_turn = False
        return True

    def _step_together(self, on_events: EventSink, plan: StepPlan | None, report: Callable[[Outlook], None]) -> None:
        """The step that was agreed on, if one was; then say what could be next."""
        number = max(1, self._outlook.step)
        if plan is not None:
            _tell(on_events, self._engine.step(plan))
            _tell(on_events, self._engine.admit())  # into the room that the step has made
            number = plan.step + 1
        outlook = self._engine.outlook(number)
        if outlook != self._outlook:
            self._outlook = outlook
            report(outlook)

    def _next(self, check: Callable[[], None] | None) -> tuple[list[Command], StepPlan | None] | None:
        """Commands to run before the next step, and its plan; waits while there is nothing to do. None: stop."""
        timeout = None if check is None else CHECK_S
        holds = self._cores is not None
        with self._wake:
            # After each wait, also one that took its time, there may be something to do: between the end of the wait
            # and the lock somebody else may have had the lock.
            while not (self._stopping or self._commands or self._plan or self._has_own_work):
                if holds and self._cores is not None:
                    # Between two steps of ranks together each waits a moment: nobody is to take all cores then.
                    if self._report is None or not self._wake.wait(HOLD_S):
                        self._cores.release()
                        holds = False
                elif not self._wake.wait(timeout) and check is not None:
                    check()
            if self._stopping and self._plan is None:  # others count on a step that was agreed on
                return None
            commands, plan = list(self._commands), self._plan
            self._commands.clear()
            self._plan = None
            return commands, plan

    @property
    def _has_own_work(self) -> bool:
        """What can be done without other ranks."""
        return self._report is None and self._engine.has_work


class EngineThread(EngineSteps):
    """Takes turns on a thread of its own. `on_events` is called there; `on_crash` once, if a step raises what the
    engine does not handle."""

    def __init__(
        self,
        engine: Engine,
        on_events: EventSink,
        on_crash: Callable[[BaseException], None],
        report: Callable[[Outlook], None] | None = None,
        cores: SharedCores | None = None,
    ) -> None:
        super().__init__(engine, report, cores)
        self._on_events, self._on_crash = on_events, on_crash
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Ask for the end and wait; whether it came."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            if self._report is not None:
                self._step_together(self._on_events, None, self._report)
            while self.turn(self._on_events):
                continue
        except BaseException as error:  # the thread ends here; whoever owns it must know, and says so
            self._on_crash(error)


class BetweenSteps(Executor):
    """Runs what it is given between two steps of an engine, on the thread of these: the two have the same cores,
    and would not be faster beside one another. On a GPU they are: `SharedGpu`."""

    def __init__(self, post: Callable[[Command], None]) -> None:
        self._post = post

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run(_: Engine) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._post(run)
        return future


def _tell(on_events: EventSink, events: list[EngineEvent]) -> None:
    if events:
        on_events(events)
