"""A command in a child process, whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
GUARD = "import os, signal, sys, time\nfrom farm.cli.guard import CommandDiedError, guarded\n"


def started(code: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", GUARD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def said(code: str) -> str:
    out, err = started(code).communicate(timeout=30)
    assert err == ""
    return out


def test_the_childs_exit_code_is_the_commands():
    assert said("print(guarded(lambda: 5), flush=True)") == "5\n"


@pytest.mark.parametrize(("deed", "how"), [("os._exit(1)", "code 1"), ("os.kill(os.getpid(), 9)", "SIGKILL")])
def test_a_child_that_something_else_ended_is_told_from_one_that_ended_itself(deed, how):
    code = f"""
def command():
    {deed}
try:
    guarded(command)
except CommandDiedError as death:
    print(death)
"""
    assert said(code) == f"{how}\n"


def test_a_child_that_leaves_from_another_thread_has_said_its_code():
    code = "import threading\nfrom farm.cli.guard import leave\n"
    code += "print(guarded(lambda: threading.Thread(target=leave, args=(6,)).start() or time.sleep(30) or 0))"
    assert said(code) == "6\n"


def test_signals_are_handed_on():
    code = """
def command():
    try:
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        return 130
    return 0
print(guarded(command), flush=True)
"""
    guard = started(code)
    assert guard.stdout is not None
    assert guard.stdout.readline() == "ready\n"
    guard.send_signal(signal.SIGINT)
    assert guard.communicate(timeout=30)[0] == "130\n"


def test_the_child_dies_with_its_parent():
    guard = started("guarded(lambda: print('ready', flush=True) or time.sleep(30) or 0)")
    assert guard.stdout is not None
    guard.stdout.readline()
    (child,) = psutil.Process(guard.pid).children()
    guard.kill()
    guard.communicate()
    until = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_guard_that_was_stopped_and_goes_on_waits_on():
    guard = started("print(guarded(lambda: print('ready', flush=True) or time.sleep(3) or 7), flush=True)")
    assert guard.stdout is not None
    guard.stdout.readline()
    for _ in range(3):
        guard.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        guard.send_signal(signal.SIGCONT)
    guard.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    guard.send_signal(signal.SIGCONT)
    assert guard.communicate(timeout=30) == ("7\n", "")
