from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chordal.bench.tasks import programs
from chordal.bench.tasks.programs import passes
from chordal.errors import InputError

if sys.platform == "win32":
    pytest.skip("programs are not run where processes cannot be limited", allow_module_level=True)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("print('x' * 10_000_000)", True),
        ("def f():\n    return __name__\nassert f() == '__main__'", True),
        ("import os\nos.chdir('/')", True),
        ("assert 1 + 1 == 3", False),
        ("1 +", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("open('passed', 'w').write('1')\nraise SystemExit(0)", False),
        ("input()", False),
        ("\udc80", False),
        ("", True),
    ],
)
def test_a_program_passes_if_it_runs_to_its_end(program, passed):
    assert passes(program) == passed


def test_a_program_that_does_not_end_is_ended():
    assert not passes("while True: pass", timeout_s=0.5)
    assert not passes("import time\ntime.sleep(60)", timeout_s=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_memory_is_limited():
    program = "x = bytearray(200_000_000)"
    assert passes(program)
    assert not passes(program, memory_bytes=150_000_000)


def test_files_are_limited_and_gone_afterwards(tmp_path):
    told = tmp_path / "where"
    assert passes(f"import os\nopen('f', 'w').write('x')\nopen({str(told)!r}, 'w').write(os.getcwd())")
    assert not Path(told.read_text()).exists()
    assert not passes(f"open('f', 'w').write('x' * {2 * programs.FILE_BYTES})")


def test_the_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert passes("import os\nassert 'SECRET_TOKEN' not in os.environ\nassert os.listdir() == ['program.py']")


def can_leave_the_network():
    leave = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x50000000) != 0)"
    return sys.platform == "linux" and subprocess.run([sys.executable, "-c", leave]).returncode == 0


@pytest.mark.skipif(
    not can_leave_the_network(), reason="this system does not let a process leave the network"
)
def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        socket.create_connection((host, port), 1).close()
        assert not passes(f"import socket\nsocket.create_connection(({host!r}, {port}), 1)")


@pytest.mark.parametrize("ends", ["", "while True: pass", "raise SystemExit(0)"])
def test_what_a_program_starts_ends_with_it(ends, tmp_path):
    told = tmp_path / "pid"
    passes(
        "import os, time\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    time.sleep(60)\n"
        f"open({str(told)!r}, 'w').write(str(pid))\n"
        f"{ends}",
        timeout_s=1,
    )
    pid = int(told.read_text())
    # The system takes a moment to bury it.
    for _ in range(100):
        if not is_running(pid):
            break
        time.sleep(0.05)
    assert not is_running(pid)


def test_a_system_that_cannot_limit_processes_is_refused(monkeypatch):
    monkeypatch.setattr(programs.os, "name", "nt")
    with pytest.raises(InputError, match="Linux, macOS"):
        passes("")
