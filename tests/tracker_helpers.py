"""A stand-in for Trackio that records its calls, and fails or hangs when a test asks it to."""

import json
import os
from pathlib import Path

import pytest

# FAULT says what happens: PLACE ACTION, such as "log hang". The calls are written to CALLS.
PACKAGE = """
import atexit, json, os, subprocess, sys, time
place, _, action = os.environ.get("FAULT", "").partition(" ")

def call(name, *facts):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([name, *facts]) + chr(10))
    print("noise of", name, flush=True)
    print("more noise", file=sys.stderr, flush=True)
    if name == place and action == "raise":
        raise RuntimeError("no\\nroom")
    if name == place and action == "exit":
        os._exit(3)
    if name == place and action == "hang":
        time.sleep(600)
    if name == place and action == "start":  # a service that outlives its tracker
        service = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        call("service", service.pid)
        time.sleep(600)

call("import", os.getpid())
if place == "atexit":
    atexit.register(call, "atexit")

def init(project, name, config, resume, embed):
    call("init", project, name, resume, config["method"], sys.argv[0])
    return Run()

def finish():
    call("finish")

class Run:
    def log(self, values, step):
        call("log", values, step)
"""


class FakeTracker:
    """The stand-in as a package that this process and its children import."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        (folder / "packages").mkdir()
        (folder / "packages" / "trackio.py").write_text(PACKAGE)
        monkeypatch.syspath_prepend(str(folder / "packages"))
        self.python_path = os.pathsep.join((str(folder / "packages"), os.environ["PYTHONPATH"]))
        monkeypatch.setenv("PYTHONPATH", self.python_path)
        monkeypatch.setenv("CALLS", str(folder / "calls"))

    def fails(self, fault: str) -> None:
        """Let the package fail from now on; see PACKAGE."""
        self.monkeypatch.setenv("FAULT", fault)

    def calls(self, *names: str) -> list[list]:
        """The calls so far, or those of some functions."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        found = [json.loads(line) for line in lines]
        return [call for call in found if not names or call[0] in names]
