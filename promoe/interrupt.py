"""SIGTERM and Ctrl-C during training: stop at once where that is safe, remember it elsewhere."""

from __future__ import annotations

import signal
import threading

__all__ = ["Interruptible"]


class Interruptible:
    """Handlers of SIGINT and SIGTERM for the length of a ``with`` block.

    Inside ``with stop.at_once():`` a signal raises KeyboardInterrupt (the core polls between
    tasks); anywhere else it is only remembered: saving and updating are never torn apart. At the
    end of the block SIGINT becomes KeyboardInterrupt and SIGTERM SystemExit(143).
    Outside the main thread Python delivers no signals, and this does nothing.
    """

    def __init__(self):
        self.signal = None
        self._open = False
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self._previous.items():
            if handler is not None:  # None: it was not installed from Python
                signal.signal(number, handler)
        if kind is None or issubclass(kind, KeyboardInterrupt):
            if self.signal == signal.SIGTERM:
                raise SystemExit(128 + self.signal) from None
            if self.signal == signal.SIGINT and kind is None:
                raise KeyboardInterrupt

    def _handle(self, number, frame):
        self.signal = number
        if self._open:
            self._open = False  # once: what follows is the way out
            raise KeyboardInterrupt

    def at_once(self):
        """A ``with`` block that a signal may leave by KeyboardInterrupt."""
        return _AtOnce(self)


class _AtOnce:
    def __init__(self, stop):
        self.stop = stop

    def __enter__(self):
        self.stop._open = True
        if self.stop.signal is not None:
            self.stop._open = False
            raise KeyboardInterrupt

    def __exit__(self, *exception):
        self.stop._open = False
