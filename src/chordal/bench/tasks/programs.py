"""Run generated Python programs, held back as far as a plain process can be.

A program runs in a process of its own with limits on time, memory and file size, in an empty folder that
is removed afterwards, without the environment of its parent and, where Linux lets an ordinary user do
so, without a network. That stops accidents, endless loops and memory floods. It is no prison: the
process may read what its user may read. Run programs of models you do not trust in a container.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from chordal.errors import InputError

TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20

MAX_PROCESSES = 64

# Runs before the program, in its process; the limits cannot be raised again.
_RUNNER = """
import ctypes, os, resource, sys
mark, nonce, write = os.path.abspath("passed"), sys.argv[2], open
try:
    # A user and a network of its own: CLONE_NEWUSER | CLONE_NEWNET.
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)
except (AttributeError, OSError):
    pass
for pair in sys.argv[3:]:
    name, limit = pair.split("=")
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (int(limit), int(limit)))
    except (AttributeError, OSError, ValueError):
        pass
with open(sys.argv[1], encoding="utf-8") as file:
    program = file.read()
exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
# Only a program that ran to its end gets here; one that leaves early, by exit(0) say, has not passed.
with write(mark, "w") as file:
    file.write(nonce)
"""


def passes(program: str, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Tell whether a program runs to its end without an error and within its limits.

    Args:
        program: Python source.
        timeout_s: Seconds of wall-clock and, rounded up, of CPU time.
        memory_bytes: Most address space; macOS does not hold a process to it.

    Raises:
        InputError: This system cannot limit a process.
    """
    if os.name != "posix":
        raise InputError(
            "programs run only where processes can be limited (Linux, macOS). Decode without executing, "
            "which leaves the texts ungraded, or grade on such a system."
        )
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="chordal-") as folder:
        source = Path(folder, "program.py")
        source.write_text(program, encoding="utf-8", errors="replace")
        limits = {
            "CPU": math.ceil(timeout_s),
            "AS": memory_bytes,
            "FSIZE": FILE_BYTES,
            "NPROC": MAX_PROCESSES,
            "CORE": 0,
        }
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-c", _RUNNER, source.name, nonce),
                *(f"{name}={limit}" for name, limit in limits.items()),
            ],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            # The program, unless it ended, and what it started; the group outlives its leader.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        mark = Path(folder, "passed")
        return process.returncode == 0 and mark.is_file() and mark.read_text(errors="replace") == nonce
