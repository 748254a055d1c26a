"""Children that the kernel kills when their parent dies, however it dies."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


class DiesWithParent:
    """Call it in a new child, for example as ``preexec_fn``: KILL comes when the thread that forked the child is gone.

    Made in the parent, so that the child loads nothing: between fork and exec it may only make system calls.
    """

    def __init__(self) -> None:
        self._parent = os.getpid()
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def __call__(self) -> None:
        """Ask the kernel; a parent that has died meanwhile counts."""
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._parent:
            os._exit(1)
