"""The exercise, and the data path's tests, under AddressSanitizer, ThreadSanitizer, UBSan and valgrind.

The sanitizers watch the stand-in, and so every pointer, length and block that the engine gave it: they are preloaded
into Python. valgrind watches the whole process. That each of them sees anything at all is tested too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab import standin
from lab.paths import CHECKOUT

RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so", "undefined": "libubsan.so"}
OPTIONS = {
    # Python's own allocations at its end are no leaks of anybody's.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
    "TSAN_OPTIONS": "exitcode=66",
    "UBSAN_OPTIONS": "halt_on_error=1",
}
FREED = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
at = libc.malloc(ctypes.c_size_t(64))
libc.free(ctypes.c_void_p(at))
libc.memcpy(ctypes.create_string_buffer(64), ctypes.c_void_p(at), ctypes.c_size_t(64))
"""


def environment(sanitizer: str = "") -> dict[str, str]:
    compiler = standin.compiler()
    if compiler is None:
        pytest.skip("needs a C compiler (package gcc)")
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "src")])
    chosen = os.environ | OPTIONS | {"PYTHONPATH": path}
    if sanitizer:
        command = [compiler, f"-print-file-name={RUNTIMES[sanitizer]}"]
        runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(runtime).exists():
            pytest.skip(f"needs the compiler's {RUNTIMES[sanitizer]}")
        chosen["LD_PRELOAD"] = runtime
    return chosen


def run(command: list[str], chosen: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=chosen, cwd=CHECKOUT, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.parametrize("sanitizer", ["", *RUNTIMES])
def test_exercise(sanitizer: str) -> None:
    chosen = environment(sanitizer)
    library = standin.library(sanitizer=sanitizer)
    done = run([sys.executable, "-m", "tests.engine.darwin.exercise", str(library)], chosen)
    assert (done.returncode, done.stdout) == (0, "53 functions, nothing left\n"), done.stderr[-4000:]


def test_exercise_under_valgrind() -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind (package valgrind)")
    chosen = environment() | {"PYTHONMALLOC": "malloc"}
    command = ["valgrind", "--quiet", "--error-exitcode=9", "--num-callers=20", sys.executable]
    caught = run([*command, "-c", FREED], chosen)
    assert caught.returncode == 9, caught.stderr[-4000:]
    done = run([*command, "-m", "tests.engine.darwin.exercise", str(standin.library())], chosen)
    assert (done.returncode, done.stdout) == (0, "53 functions, nothing left\n"), done.stderr[-4000:]


def test_the_address_sanitizer_sees_what_is_freed() -> None:
    caught = run([sys.executable, "-c", FREED], environment("address"))
    assert "heap-use-after-free" in caught.stderr


BEGIN = """
import sys
from openvmnet.engine.darwin import xpc
from openvmnet.engine.darwin.framework import Framework
framework = Framework(sys.argv[1])
queue = framework.system_call("dispatch_queue_create", b"q", None)
"""
CRASHES = {
    "what is released": """
with xpc.dictionary(framework, {}) as made:
    pass
framework.system_call("xpc_release", made)
""",
    "an object of another kind": """
framework.system_call("xpc_get_type", queue)
""",
    "what is no block": """
with xpc.dictionary(framework, {"vmnet_operation_mode": 1001}) as made:
    framework.call("vmnet_start_interface", made, queue, queue)
""",
    "what is no interface": """
framework.call("vmnet_read", queue, queue, queue)
""",
}


@pytest.mark.parametrize("what", CRASHES)
def test_the_stand_in_ends_the_process_for_what_would_crash_a_mac(what: str) -> None:
    chosen = environment()
    done = run([sys.executable, "-c", BEGIN + CRASHES[what], str(standin.library())], chosen)
    assert done.returncode == -6, done
    assert "stand-in: " in done.stderr
