"""Ctrl-C while a command runs: it ends within a second, with one line, and leaves nothing half-written.

Python tells the main thread of a signal between two of its own instructions. A library's loop in C may run for minutes
without one, so a second thread hears of the signal too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from bonnx.runtime.artifact.unfinished import discard_unfinished

__all__ = ["STOPPED", "Interrupt", "interruptible"]

STOPPED = 130
# How long the main thread may take to notice.
_PATIENCE = 0.7


class Interrupt:
    """The state of Ctrl-C.

    Attributes:
        noticed: whether the main thread has handled the signal.
    """

    def __init__(self, line: str) -> None:
        self.noticed, self._line = False, line

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt as Python does, and hide the errors of objects that are destroyed on the way out."""
        self.noticed = True
        sys.unraisablehook = lambda _: None
        raise KeyboardInterrupt

    def watch(self, reader: socket.socket) -> None:
        """End the process if the main thread does not notice a signal, or at the second one."""
        count, until = 0, None
        while True:
            patience = None if until is None or self.noticed else max(0.0, until - time.monotonic())
            if not select.select([reader], [], [], patience)[0]:
                if not self.noticed:
                    self._leave()
                continue
            numbers = reader.recv(64)
            if not numbers:
                return
            if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) == self.handle:
                count += numbers.count(signal.SIGINT)
                until = time.monotonic() + _PATIENCE
            if count > 1:
                self._leave()

    def _leave(self) -> None:
        discard_unfinished()
        with contextlib.suppress(OSError):
            os.write(2, f"{self._line}\n".encode())
        os._exit(STOPPED)


@contextlib.contextmanager
def interruptible(line: str) -> Iterator[Interrupt]:
    """Listen to Ctrl-C, unless the program has its own handler of the signal.

    Args:
        line: printed if the process has to be ended from outside its main thread.
    """
    interrupt = Interrupt(line)
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return
    hook, (reader, writer) = sys.unraisablehook, socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGINT, interrupt.handle)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=interrupt.watch, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield interrupt
    finally:
        if signal.getsignal(signal.SIGINT) == interrupt.handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        sys.unraisablehook = hook
        writer.close()
        watcher.join()
        reader.close()
