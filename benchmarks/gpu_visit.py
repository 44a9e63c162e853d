"""A visit of benchmarks/gpu.py: run the stages within the time limit, and keep their results."""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import gpu_cifar
import gpu_setup
import gpu_worker
import measure
import torch
import torchvision
from gpu_parts import PARTS
from gpu_setup import Setup
from gpu_table import TITLES, print_table, targets

from moco.files import write_json

SCRIPT = Path(__file__).with_name("gpu.py")  # what worker processes run
FRACTIONS = {1: 0.35, 2: 0.3, 3: 0.85}  # fraction of the visit for a stage that is not the last
LANES = 4  # worker processes of stage 1 on a GPU, at most
LIMIT = 150.0  # seconds for one part
START = 150.0  # seconds for a process to begin its first part


class Visit:
    """A visit: one call of this command, with its time limit, its results and its processes."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.began = time.monotonic()
        self.end = self.began + 60 * args.minutes - 5  # the table takes a moment
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else "cpu"
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.json = args.json or measure.ROOT / "runs" / "benchmarks" / f"gpu-{slug}.json"
        self.lock = threading.Lock()
        self.failed: list[str] = []
        self.not_run: list[str] = []
        self.running: set[int] = set()
        self.stopping = False
        before = self._earlier()
        self.stages: dict[str, dict[str, dict]] = before.get("stages", {})
        self.facts = {
            "device": name,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "tiny": not cuda,
        }
        visit = {
            "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "minutes": args.minutes,
            "stages": args.stages,
        }
        self.visits = [*before.get("visits", []), visit]

    def _earlier(self) -> dict:
        """Return the results of earlier visits."""
        try:
            found = json.loads(self.json.read_text())
            return found if isinstance(found.get("stages"), dict) else {}
        except (OSError, ValueError, AttributeError):
            return {}

    @property
    def left(self) -> float:
        """Return the seconds left of this visit."""
        return self.end - time.monotonic()

    def run(self) -> int:
        """Run all stages and print the table; return the exit status."""
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        facts = ", ".join(
            f"{key} {value}" for key, value in self.facts.items() if value is not None
        )
        print(f"{facts}; {self.args.minutes:g} minutes; {self.json}", flush=True)
        self.setup = Setup(
            self.device, self.device.type == "cpu", Path(tempfile.mkdtemp(prefix="gpu-"))
        )
        interrupted = False
        try:
            for stage in self.args.stages:
                self._stage(stage)
        except KeyboardInterrupt:
            interrupted = self.stopping = True  # parts that end now have not failed
            print("\ninterrupted by Ctrl-C; the results so far are below", flush=True)
        finally:
            with self.lock:
                self.stopping = True  # no lane starts another process
                self.write()
                for pid in list(self.running):
                    gpu_setup.kill_tree(pid)
            shutil.rmtree(self.setup.work, ignore_errors=True)
            signal.signal(signal.SIGTERM, before)
        print_table(self.stages, self.setup.cuda)
        for title, lines in (("not run", self.not_run), ("failed", self.failed)):
            for line in lines:
                print(f"{title}: {line}")
        print(
            f"\n{time.monotonic() - self.began:.0f} s; {len(self.failed)} failed; {self.json}",
            flush=True,
        )
        return 130 if interrupted else 1 if self.failed else 0

    def _stage(self, stage: int) -> None:
        last = stage == self.args.stages[-1]
        fraction = 1.0 if last else FRACTIONS.get(stage, 1.0)
        end = min(self.end, time.monotonic() + fraction * 60 * self.args.minutes)
        print(
            f"\nstage {stage}, {TITLES[stage]}: at most {max(0.0, end - time.monotonic()):.0f} s",
            flush=True,
        )
        try:
            if stage in PARTS:
                self._parts(stage, end)
            elif stage == 3:
                self._reproduction(end)
            else:
                self._others(end)
        except Exception as problem:  # an error in one stage must not end the others
            self.record(
                stage,
                "stage",
                f"{type(problem).__name__}: {problem}\n{traceback.format_exc()[-1500:]}",
            )

    def record(
        self,
        stage: int,
        name: str,
        error: str = "",
        figures: dict | None = None,
        failures: list[str] = (),
        seconds: float = 0.0,
    ) -> None:
        """Store and print the results of a part, and rewrite the JSON.

        An error that begins with "not run: " does not count as a failure. Nothing is stored after
        the end of the visit.
        """
        with self.lock:
            if self.stopping:  # its process was killed
                return
            skipped = error.startswith("not run: ")
            error = error.removeprefix("not run: ")
            status = "not run" if skipped else "failed" if error or failures else "passed"
            found = {
                "status": status,
                "seconds": seconds,
                "figures": figures or {},
                "failures": list(failures),
                "error": error,
            }
            parts = self.stages.setdefault(str(stage), {})
            if not (skipped and name in parts):  # keep an earlier visit's results
                parts[name] = found
            if status != "passed":
                why = "; ".join([*failures, *error.splitlines()[:1]])
                (self.not_run if skipped else self.failed).append(f"stage {stage}, {name}: {why}")
            detail = "" if status == "passed" else f": {'; '.join([*failures, error])}"
            print(
                f"  {name}: {status}{f' ({seconds:.1f} s)' if seconds else ''}{detail}", flush=True
            )
            self.write()

    def write(self) -> None:
        """Write all results to the JSON file."""
        results = {
            **self.facts,
            "visits": self.visits,
            "targets": targets(self.stages),
            "failed": self.failed,
        }
        write_json(self.json, {**results, "not run": self.not_run, "stages": self.stages})

    # Stages 1 and 2: parts in worker processes.

    def _parts(self, stage: int, end: float) -> None:
        lanes: dict[int, list[str]] = {}
        for name, (_, lane) in PARTS[stage].items():
            if self.args.parts is None or name in self.args.parts:
                lanes.setdefault(lane % (2 if self.setup.tiny else LANES), []).append(name)
        threads = [
            threading.Thread(target=self._lane, args=(stage, number, names, end))
            for number, names in lanes.items()
        ]
        for thread in threads:
            thread.daemon = True
            thread.start()
        for thread in threads:
            thread.join()

    def _lane(self, stage: int, number: int, names: list[str], end: float) -> None:
        """Run parts in order. If a worker process hangs or dies, only its current part is lost."""
        waiting, attempt = list(names), 0
        while waiting and time.monotonic() < end and not self.stopping:
            attempt += 1
            try:
                self._worker(stage, f"{number}-{attempt}", waiting, end)
            except Exception as problem:
                self.record(stage, waiting.pop(0), f"{type(problem).__name__}: {problem}")
        for name in waiting:
            self.record(stage, name, "not run: no time left")

    def _worker(self, stage: int, name: str, waiting: list[str], end: float) -> None:
        """Start a worker process on the `waiting` parts, and remove those that are done.

        Return when the process ends or hangs, or at the time `end`.
        """
        work = self.setup.work / f"stage{stage}"
        work.mkdir(exist_ok=True)
        events, log = work / f"{name}.jsonl", work / f"{name}.log"
        words = [
            "--worker",
            events,
            "--work",
            work,
            "--device",
            self.device.type,
            "--stages",
            stage,
            "--parts",
            *waiting,
        ]
        with self.lock:
            if self.stopping:
                return
            threads = (
                {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // LANES))}
                if stage == 1
                else {}
            )
            process = gpu_setup.python(
                self.setup, SCRIPT, *words, log=log, gpu=self.setup.cuda, **threads
            )
            self.running.add(process.pid)
        seen, current, since = 0, "", time.monotonic()
        try:
            while True:
                # before the events are read, so that none of an ended process is missed
                ended = process.poll() is not None
                for event in gpu_worker.events(events)[seen:]:
                    seen, current, since = seen + 1, event["part"], time.monotonic()
                    if event["event"] == "end":
                        waiting.remove(current)
                        current = ""
                        found = {
                            key: event[key] for key in ("error", "figures", "failures", "seconds")
                        }
                        self.record(stage, event["part"], **found)
                now = time.monotonic()
                if ended:
                    if current or (
                        process.returncode and process.returncode != gpu_worker.BROKEN and waiting
                    ):
                        lost = current or waiting[0]
                        waiting.remove(lost)
                        status = f"its process ended with status {process.returncode}"
                        self.record(
                            stage, lost, f"{status}: {gpu_setup.tail(log)}", seconds=now - since
                        )
                    return
                if now > end:
                    if current:
                        waiting.remove(current)
                        self.record(
                            stage,
                            current,
                            f"not run: cut off after {now - since:.0f} s, no time left",
                        )
                    return
                if now - since > (LIMIT if current else START):
                    lost = current or waiting[0]
                    waiting.remove(lost)
                    self.record(
                        stage,
                        lost,
                        f"hung: killed after {now - since:.0f} s: {gpu_setup.tail(log)}",
                    )
                    return
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                gpu_setup.kill_tree(process.pid)
                process.wait()
            self.running.discard(process.pid)

    # Stages 3 and 4: runs of the scripts.

    @property
    def amp(self) -> str:
        """Return the --amp of the runs."""
        return self.args.amp or ("bf16" if self.setup.cuda else "off")

    def _data(self, stage: int) -> gpu_cifar.Data | None:
        """Find CIFAR-10; if there is none, record that and return None."""
        if not gpu_cifar.CONFIGS.is_dir():
            self.record(stage, "data", f"not run: {gpu_cifar.CONFIGS} does not exist")
            return None
        data = gpu_cifar.find(self.args.data, self.args.run_folder.parent, self.setup)
        if data is None:
            places = ", ".join(gpu_cifar.PLACES)
            self.record(stage, "data", f"not run: no CIFAR-10 in {places}; give --data FOLDER")
        return data

    def _reproduction(self, end: float) -> None:
        data = self._data(3)
        if data is None:
            return
        if end - time.monotonic() < gpu_cifar.SAVING + 10:
            self.record(3, "moco", "not run: no time left")
            return
        folder, config, began = (
            self.args.run_folder,
            gpu_cifar.CONFIGS / "moco.yaml",
            time.monotonic(),
        )
        error, state = "", "failed"
        done = threading.Event()

        def watch() -> None:
            """Write the results so far every 20 s, in case this process is killed."""
            while not done.wait(20):
                with self.lock:
                    figures = {
                        "state": "running",
                        "data": data.name,
                        **gpu_cifar.summary(folder),
                        "rows": gpu_cifar.rows(folder),
                    }
                    self.stages.setdefault("3", {})["moco"] = {
                        "status": "running",
                        "figures": figures,
                    }
                    self.write()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            state = gpu_cifar.train(self.setup, data, config, folder, end, self.amp)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        finally:
            done.set()
            watcher.join()
        figures = {
            "state": state,
            "data": data.name,
            "amp": self.amp,
            **gpu_cifar.summary(folder),
            "rows": gpu_cifar.rows(folder),
        }
        self.record(3, "moco", error, figures, seconds=time.monotonic() - began)

    def _others(self, end: float) -> None:
        data = self._data(4)
        if data is None:
            return

        seeds = self.args.seeds or ([0] if self.setup.tiny else [0, 1, 2])

        def record(name: str, error: str, figures: dict[str, object]) -> None:
            self.record(4, name, error, figures)

        gpu_cifar.others(self.setup, data, self.args.run_folder, end, self.amp, seeds, record)
