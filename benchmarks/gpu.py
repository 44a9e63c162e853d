#!/usr/bin/env python
"""Check and measure everything on one GPU in minutes.

The script needs this repository, its requirements and CIFAR-10, but no network.

    python benchmarks/gpu.py --minutes 9                      all stages, in order of importance
    python benchmarks/gpu.py --minutes 6 --stages 3           continue an earlier CIFAR-10 run
    python benchmarks/gpu.py --stages 1 --parts compile NCCL  single parts

Stages:
  1  correctness: a step of each method on the GPU against the CPU, mixed precision, views, memory
     format, --compile, NCCL, a killed run that resumes to the same bits, k-NN and linear probe
  2  speed: ResNet-50 at 224 pixels, end to end and with views that are already on the GPU, next to
     plain MoCo (benchmarks/step.py); loader, views, profile
  3  reproduction: configs/cifar10/moco.yaml next to the published log; a later visit continues the
     run in --run-folder
  4  the other configs in configs/cifar10/, with several seeds; the runs take turns

One call of this script is a visit. The results are in runs/benchmarks/gpu-DEVICE.json, which is
rewritten after each part and keeps the results of earlier visits. Each part has a time limit and
runs in a process that can be killed. Parts for which --minutes leaves no time are reported as not
run. The table is printed last, also after Ctrl-C. The exit status is 1 if a check of this visit
failed, 2 if an option is wrong, and 130 after Ctrl-C.

On a CPU, everything runs in tiny sizes. This tests the script; the figures mean nothing.
"""

import argparse
import gc
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
from pathlib import Path

import gpu_cifar
import gpu_runs
import gpu_setup
import measure
import torch
import torchvision
from gpu_parts import PARTS
from gpu_setup import Failed, Notes, Setup

from moco.files import to_json, write_json

TITLES = {1: "correctness", 2: "speed", 3: "CIFAR-10, MoCo", 4: "CIFAR-10, all methods"}
FRACTIONS = {1: 0.35, 2: 0.3, 3: 0.85}  # fraction of the visit for a stage that is not the last
LANES = 4  # worker processes of stage 1 on a GPU, at most
LIMIT = 150.0  # seconds for one part
START = 150.0  # seconds for a process to begin its first part
BROKEN = 3  # exit status of a process whose GPU context is lost


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=9.0, help="length of the visit (default: 9)")
    p.add_argument(
        "--stages", type=int, nargs="+", choices=TITLES, default=list(TITLES), help="default: all"
    )
    p.add_argument(
        "--parts", nargs="+", metavar="NAME", help="parts of stages 1 and 2 (default: all)"
    )
    p.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="CIFAR-10: a folder with train/ and test/ or cifar-10-batches-py, or an archive",
    )
    folder = measure.ROOT / "runs" / "gpu" / "cifar10-moco"
    p.add_argument(
        "--run-folder",
        type=Path,
        default=folder,
        help="run folder of stage 3; the run folders of stage 4 are next to it",
    )
    p.add_argument(
        "--seeds", type=int, nargs="+", help="seeds of stage 4 (default: 0 1 2; on a CPU 0)"
    )
    p.add_argument(
        "--amp",
        choices=("off", "bf16"),
        help="mixed precision of stages 3 and 4 (default: bf16 on a GPU)",
    )
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="default: runs/benchmarks/gpu-DEVICE.json"
    )
    p.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    # internal: a process with --worker runs parts and writes events to this file
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--collectives", type=Path, help=argparse.SUPPRESS)
    return p


def main() -> int:
    """Run a visit or, in a process that a visit started, its parts; return the exit status."""
    args = parser().parse_args()
    device = torch.device(args.device)
    if args.collectives:
        gpu_runs.collectives(args.collectives, device)
        return 0
    if args.worker:
        return work(
            Setup(device, device.type == "cpu", args.work), args.stages[0], args.parts, args.worker
        )
    if line := mistake(args):
        print(line, file=sys.stderr)
        return 2
    return Visit(args, device).run()


def mistake(args: argparse.Namespace) -> str:
    """Return a line about the first wrong option, or "". Unpacks an archive given by --data."""
    if not 0 < args.minutes < math.inf:
        return f"--minutes {args.minutes:g}: no time for any stage; give a number above 0"
    parts = set(args.parts or ())
    if unknown := sorted(parts - {name for parts in PARTS.values() for name in parts}):
        known = ", ".join(name for parts in PARTS.values() for name in parts)
        return f"--parts {' '.join(unknown)}: no such part; choose from {known}"
    stages = " ".join(map(str, args.stages))
    if parts and not set(args.stages) & set(PARTS):
        return (
            f"--parts: stages 1 and 2 have parts, but --stages is {stages}; leave one of them out"
        )
    here = {name for stage in set(args.stages) & set(PARTS) for name in PARTS[stage]}
    if parts and not parts & here:
        of = " ".join(str(stage) for stage in PARTS if parts & set(PARTS[stage]))
        names = " ".join(args.parts)
        return f"--parts {names}: not in --stages {stages}; give --stages {of}"
    if args.data is not None:
        try:
            gpu_cifar.find(
                args.data, args.run_folder.parent, Setup(torch.device("cpu"), True, Path())
            )
        except Failed as error:
            return str(error)
        except (OSError, tarfile.TarError) as error:
            return f"--data {args.data}: cannot be read ({error}); give another folder or archive"
    return ""


# In a worker process, started by a visit.


def work(setup: Setup, stage: int, names: list[str], events: Path) -> int:
    """Run parts of a stage in order; append their results to `events`; return the exit status."""

    def event(**what: object) -> None:
        with events.open("a") as file:
            file.write(f"{to_json(what)}\n")

    for name in names:
        event(part=name, event="begin")
        notes, error, began = Notes(), "", time.perf_counter()
        try:
            PARTS[stage][name][0](setup, notes)
        except (Exception, SystemExit) as problem:
            where = "".join(traceback.format_tb(problem.__traceback__)[-2:])
            error = f"{type(problem).__name__}: {problem}" + f"\n{where}" * (
                not isinstance(problem, Failed)
            )
        seconds = time.perf_counter() - began
        event(
            part=name,
            event="end",
            seconds=seconds,
            figures=notes,
            failures=notes.failures,
            error=error[:4000],
        )
        gc.collect()
        if setup.cuda:
            if re.search(r"CUDA error|CUBLAS_|CUDNN_|device-side assert|illegal memory", error):
                return BROKEN
            torch.cuda.empty_cache()
    return 0


# In the process that the user started.


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
        self.table()
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
            "targets": self.targets(),
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
                self.setup, __file__, *words, log=log, gpu=self.setup.cuda, **threads
            )
            self.running.add(process.pid)
        seen, current, since = 0, "", time.monotonic()
        try:
            while True:
                # before the events are read, so that none of an ended process is missed
                ended = process.poll() is not None
                for event in _events(events)[seen:]:
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
                    if current or (process.returncode and process.returncode != BROKEN and waiting):
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

    # The table.

    def figure(self, stage: int, part: str, name: str) -> float | None:
        """Return a figure of a part by its name; None if it was not measured."""
        value = self.stages.get(str(stage), {}).get(part, {}).get("figures", {}).get(name)
        return value if isinstance(value, int | float) else None

    def targets(self) -> list[dict[str, object]]:
        """Return the figures that one H100 should reach, next to those measured."""
        figure = self.figure
        ready, loaded = figure(2, "steps", "moco pairs/s"), figure(2, "loading", "images/s")
        finished = (
            figure(3, "moco", "k-NN epoch") == gpu_cifar.EPOCHS
            and figure(3, "moco", "data") == "lossless"
        )
        accuracy = figure(3, "moco", "k-NN") if finished else None
        loading = loaded / ready if loaded and ready else None
        minutes = figure(3, "moco", "minutes of 200 epochs")
        plain = "MoCo in bf16 over plain MoCo in fp32, in speed"
        wanted: list[tuple[str, float, float | None]] = [  # a minimum, or, if negative, a maximum
            (f"{plain}, TF32", 3, figure(2, "steps", "plain fp32 TF32 over moco")),
            (f"{plain}, no TF32", 3, figure(2, "fp32", "plain fp32 over moco")),
            ("SynCo over MoCo, step time", -1.02, figure(2, "steps", "synco over moco")),
            ("image pairs/s, ResNet-50 MoCo, views ready", 1800, ready),
            ("images/s, loader over training", 1, loading),
            ("minutes of 200 epochs of CIFAR-10", -9, minutes),
            ("k-NN after 200 epochs, lossless images", 80.6, accuracy),
        ]
        return [
            {
                "target": name,
                "wanted": f"{'<=' if limit < 0 else '>='} {abs(limit):g}",
                "measured": value,
                "met": None if value is None else value <= -limit if limit < 0 else value >= limit,
            }
            for name, limit, value in wanted
        ]

    def table(self) -> None:
        """Print all figures, the targets, and the parts that failed or were not run."""
        for stage, parts in sorted(self.stages.items()):
            print(f"\nstage {stage}, {TITLES[int(stage)]}")
            for name, found in parts.items():
                print(f"  {name:24}{found['status']:10}{_line(found.get('figures', {}))}")
                for row in found.get("figures", {}).get("top ten", []):
                    print(
                        f"      {row['ms']:9.3f} ms  {row['share']:6.1%}  {row['calls']:5} x  "
                        f"{row['kernel']}"
                    )
        rows = self.stages.get("3", {}).get("moco", {}).get("figures", {}).get("rows", [])
        if rows:
            print(f"\n{'epoch':>7}{'loss':>9}{'published':>11}{'k-NN':>9}{'published':>11}")
            for row in rows:
                widths = {"loss": 9, "published loss": 11, "k-NN": 9, "published k-NN": 11}
                cells = {name: "" if row[name] is None else f"{row[name]:.2f}" for name in widths}
                print(
                    f"{row['epoch']:7}"
                    + "".join(f"{cells[name]:>{widths[name]}}" for name in widths)
                )
        where = "" if self.setup.cuda else " (sizes are tiny here: this is a CPU)"
        print(f"\n{'target for one H100' + where:58}{'wanted':>9}{'measured':>10}")
        for row in self.targets():
            value = "-" if row["measured"] is None else f"{row['measured']:.4g}"
            met = (
                ""
                if row["met"] is None or not self.setup.cuda
                else "  met"
                if row["met"]
                else "  MISSED"
            )
            print(f"{row['target']:58}{row['wanted']:>9}{value:>10}{met}")
        for title, lines in (("not run", self.not_run), ("failed", self.failed)):
            for line in lines:
                print(f"{title}: {line}")
        print(
            f"\n{time.monotonic() - self.began:.0f} s; {len(self.failed)} failed; {self.json}",
            flush=True,
        )


def _line(figures: dict[str, object]) -> str:
    """Return the numbers and strings among a part's figures, wrapped for a terminal."""
    shown = [
        f"{name} {value:.4g}"
        for name, value in figures.items()
        if isinstance(value, int | float) and value is not True
    ]
    shown += [f"{name} {value}" for name, value in figures.items() if isinstance(value, str)]
    return textwrap.fill("; ".join(shown), 90, subsequent_indent=" " * 36)


def _events(file: Path) -> list[dict]:
    """Return the events in a worker's file, without a line that is still being written."""
    try:
        text = file.read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    sys.exit(main())
