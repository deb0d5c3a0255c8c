"""Imported first of all by each tool: Ctrl-C and SIGTERM while the packages are imported, which takes seconds, end it
with one line and no traceback. Nothing has been written by then. ``cli.stoppable`` takes over for the work itself.
"""

import os
import signal
import sys


def _end(number: int, _frame: object) -> None:
    # nothing else than this: an import that is cut short may leave anything behind
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped before it began\n")
    os._exit(128 + number)


_end.until_it_begins = True

_main = getattr(sys.modules["__main__"], "__file__", None)
if _main is not None and os.path.dirname(os.path.abspath(_main)) == os.path.dirname(os.path.abspath(__file__)):
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, _end)
