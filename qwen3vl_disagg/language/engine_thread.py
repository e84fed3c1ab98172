"""The engine on a thread of its own, so that its steps never hold up an event loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from qwen3vl_disagg.engine.engine import Engine, EngineEvent
from qwen3vl_disagg.parallel.lockstep import Outlook, StepPlan

Command = Callable[[Engine], list[EngineEvent] | None]
EventSink = Callable[[list[EngineEvent]], None]


class EngineThread:
    """Runs commands and steps one after another; sleeps while there is nothing to do.

    `post` a command (a function of the engine; the events it returns are passed on) from any thread. `on_events` is
    called on the engine's thread; `on_crash` once, if a step raises what the engine does not handle. `turns` is held
    for each step, and for the decode step that a prefill step owes: who else takes turns comes between two tokens once.

    With `report`, steps are taken together with other ranks: it is told what this one could do, whenever that changes,
    and each plan that `take_plan` brings is a step.
    """

    def __init__(
        self,
        engine: Engine,
        on_events: EventSink,
        on_crash: Callable[[BaseException], None],
        turns: AbstractContextManager[None] | None = None,
        report: Callable[[Outlook], None] | None = None,
    ) -> None:
        self._turns, self._report = turns, report
        self._plan: StepPlan | None = None
        self._outlook = Outlook(step=0)
        """As last reported."""
        self._engine, self._on_events, self._on_crash = engine, on_events, on_crash
        engine.on_ready = lambda: self.post(lambda _: None)
        self._wake = threading.Condition()
        self._commands: deque[Command] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def take_plan(self, plan: StepPlan) -> None:
        """What all ranks do next; from any thread."""
        with self._wake:
            self._plan = plan
            self._wake.notify()

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
                self._step_together(None, self._report)
            while (work := self._next()) is not None:
                commands, plan = work
                self._tell([event for command in commands for event in command(self._engine) or []])
                self._tell(self._engine.admit())
                if self._report is not None:
                    self._step_together(plan, self._report)
                elif self._engine.has_work:
                    self._step_alone()
        except BaseException as error:  # the thread ends here; whoever owns it must know, and says so
            self._on_crash(error)

    def _step_alone(self) -> None:
        with self._turns or nullcontext():
            self._tell(self._engine.step())
            if self._turns is not None and self._engine.owes_decode:
                self._tell(self._engine.step())

    def _step_together(self, plan: StepPlan | None, report: Callable[[Outlook], None]) -> None:
        """The step that was agreed on, if one was; then say what could be next."""
        number = max(1, self._outlook.step)
        if plan is not None:
            self._tell(self._engine.step(plan))
            self._tell(self._engine.admit())  # into the room that the step has made
            number = plan.step + 1
        outlook = self._engine.outlook(number)
        if outlook != self._outlook:
            self._outlook = outlook
            report(outlook)

    def _tell(self, events: list[EngineEvent]) -> None:
        if events:
            self._on_events(events)

    def _next(self) -> tuple[list[Command], StepPlan | None] | None:
        """Commands to run before the next step, and its plan; waits while there is nothing to do. None: stop."""
        with self._wake:
            while not (self._stopping or self._commands or self._plan or self._has_own_work):
                self._wake.wait()
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
