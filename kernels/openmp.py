"""One thread pool a process: Numba bodies run on the OpenMP threads that torch already has.

Numba's own pools would stand beside torch's, spin against it on the same cores, and (`workqueue`)
abort when two compute threads use them at once. A body here is a C function over a pack of
integers and addresses; `GOMP_parallel` of the runtime that torch loaded calls it once a thread.
"""

from __future__ import annotations

import ctypes
import struct

import llvmlite.binding as llvm
import torch  # noqa: F401  (loads the OpenMP runtime whose threads are shared)
from numba import types

_RUNTIME = ctypes.CDLL(None)
HAS_OPENMP = hasattr(_RUNTIME, "GOMP_parallel") and hasattr(_RUNTIME, "omp_get_thread_num")

BODY = types.void(types.CPointer(types.int64))  # what a kernel body looks like to Numba
CONTRACT = {"contract", "reassoc", "nsz", "arcp"}  # fast math that still honours inf and nan


@ctypes.CFUNCTYPE(ctypes.c_int)
def _only_thread() -> int:
    return 0


def _symbol() -> int:
    function = _RUNTIME.omp_get_thread_num if HAS_OPENMP else _only_thread
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


# Compiled bodies refer to the symbol by name, so that what Numba cached on disk links again.
llvm.add_symbol("phasewise_thread_num", _symbol())
thread_num = types.ExternalFunction("phasewise_thread_num", types.int32())

_PLAIN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
if HAS_OPENMP:
    _RUNTIME.GOMP_parallel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    _RUNTIME.GOMP_parallel.restype = None


class Body:
    """A compiled kernel body, callable on one thread or on a team."""

    def __init__(self, compiled) -> None:  # noqa: ANN001  (numba's CFunc has no public type)
        self._compiled = compiled  # keeps the machine code alive
        self._address = compiled.address
        self._serial = _PLAIN(self._address)

    def run(self, threads: int, *values: int) -> None:
        """Run once a thread over a pack of addresses and integers. Frees the GIL meanwhile.

        The body finds the number of threads in front. What the addresses point to must live.
        """
        pack = (ctypes.c_int64 * (len(values) + 1))(threads, *values)
        if threads == 1:
            self._serial(ctypes.addressof(pack))
        else:
            _RUNTIME.GOMP_parallel(self._address, ctypes.addressof(pack), threads, 0)


def float_bits(value: float) -> int:
    """A float as the integer that `simd.as_double` turns back."""
    return struct.unpack("<q", struct.pack("<d", value))[0]
