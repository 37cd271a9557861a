"""The ends of processes: with another one, and by a signal."""

from __future__ import annotations

import fcntl
import os
import select
import signal


def end_with(life: int) -> None:
    """Have the kernel end this process when the other end of a pipe is closed.

    A signal whose default is to terminate needs neither the interpreter nor a thread of it: a loop in C that
    never lets go of it ends, too. (PR_SET_PDEATHSIG follows the thread that started a process, and threads
    of a pipeline come and go.)
    """
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(life, select.POLLIN)
    if poll.poll(0):  # it was closed before the signal was asked for
        os._exit(0)


def signal_of(code: int) -> str:
    """Return what the signal is called that ended a process with an exit code less than 0."""
    try:
        return signal.Signals(-code).name
    except ValueError:  # one of those that have no name
        return f"signal {-code}"
