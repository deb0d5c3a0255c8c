"""One launch of test_cuda_on_cpu.py's ``group_sum``, without PyTorch, for a process that runs under a sanitizer.

    python sanitized_case.py LIBRARY GROUPS MEMBERS THREADS

Exit code 0: right; 1: wrong or the emulation's message; 66: the sanitizer's.
"""

import ctypes
import sys

library, (groups, members, threads) = ctypes.CDLL(sys.argv[1]), map(int, sys.argv[2:])
blocks = groups * members
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]


def allocate(kind, values):
    """Memory of its own, of which the sanitizer knows where it ends."""
    array = (kind * len(values)).from_address(libc.malloc(ctypes.sizeof(kind) * len(values)))
    array[:] = values
    return array


x = allocate(ctypes.c_float, [i % 7 for i in range(blocks * threads)])
out, partial = allocate(ctypes.c_float, [0] * (blocks * threads)), allocate(ctypes.c_float, [0] * blocks)
counters = allocate(ctypes.c_int, [0] * (2 + groups))
cells = [ctypes.c_void_p(ctypes.addressof(a)) for a in (x, out, partial, counters)]
cells += [ctypes.c_int(members), ctypes.c_int(groups)]
params = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
run = library.cuda_on_cpu_run
run.restype = ctypes.c_char_p
library.group_sum_enqueue(
    *(blocks, threads, ctypes.c_size_t(4 * threads), params, ctypes.c_uint64(0), 0),
)
message = run(blocks, 1)
per_group = members * threads
totals = [sum(x[g * per_group : (g + 1) * per_group]) for g in range(groups)]
right = all(out[i] == x[i] + totals[i // per_group] for i in range(len(x)))
if message or not right:
    sys.exit(message.decode() if message else "wrong")
