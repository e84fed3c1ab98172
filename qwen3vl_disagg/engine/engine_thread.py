"""The engine on a thread of its own, so that its steps never hold up an event loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from qwen3vl_disagg.engine.engine import Engine, EngineEvent

Command = Callable[[Engine], list[EngineEvent] | None]
EventSink = Callable[[list[EngineEvent]], None]


class EngineThread:
    """Runs commands and steps one after another; sleeps while there is nothing to do.

    `post` a command (a function of the engine; the events it returns are passed on) from any thread. `on_events` is
    called on the engine's thread; `on_crash` once, if a step raises what the engine does not handle. `turns` is held
    for each step, and for the decode step that a prefill step owes: who else takes turns comes between two tokens once.
    """

    def __init__(
        self,
        engine: Engine,
        on_events: EventSink,
        on_crash: Callable[[BaseException], None],
        turns: AbstractContextManager[None] | None = None,
    ) -> None:
        self._turns = turns
        self._engine, self._on_events, self._on_crash = engine, on_events, on_crash
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

    def stop(self, timeout: float) -> bool:
        """Ask for the end and wait; whether it came."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (commands := self._next()) is not None:
                self._tell([event for command in commands for event in command(self._engine) or []])
                self._tell(self._engine.admit())
                if not self._engine.has_work:
                    continue
                with self._turns or nullcontext():
                    self._tell(self._engine.step())
                    if self._turns is not None and self._engine.owes_decode:
                        self._tell(self._engine.step())
        except BaseException as error:  # the thread ends here; whoever owns it must know
            self._on_crash(error)
            raise

    def _tell(self, events: list[EngineEvent]) -> None:
        if events:
            self._on_events(events)

    def _next(self) -> list[Command] | None:
        """Commands to run before the next step; waits while there are none and no work. None: stop."""
        with self._wake:
            while not (self._stopping or self._commands or self._engine.has_work):
                self._wake.wait()
            if self._stopping:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands
