#!/usr/bin/env python
"""Check that runs stopped at random moments end with the same bits as a run that is never stopped.

Every start uses --resume auto and a random number of loader workers. It is stopped after a random
number of steps, or before its first step. The script compares the last checkpoints: weights,
buffers (queue, bank, u), optimizer and progress. It exits with status 1 if any of them differ.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import measure
import torch

from moco.files import new_folder
from moco.launch.interrupt import STATUS
from moco.methods import METHODS

MORE = {"adco": "--ad-init 1 --cluster 96"}  # fills its bank in 12 steps before epoch 0
COMMON = (
    "photos -a resnet18 --image-size 32 -b {batch} --epochs {epochs} -p 1 "
    "--save-every-steps 2 --keep 2"
)


def main() -> int:
    """Run the check; return the exit status."""
    parser = measure.bare_parser(__doc__)
    measure.add_json(parser)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["synco", "adco", "sogclr"]
    )
    parser.add_argument("--processes", nargs="+", type=measure.at_least(1), default=[1, 2])
    parser.add_argument("--signals", nargs="+", choices=("KILL", "TERM"), default=["KILL", "TERM"])
    parser.add_argument(
        "--stops", type=measure.at_least(1), default=20, help="number of stops of each run"
    )
    parser.add_argument("--epochs", type=measure.at_least(1), default=2)
    parser.add_argument(
        "--batch-size",
        type=measure.at_least(2),
        default=8,
        help="images in a batch (with 8 an epoch has 142 steps)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments to stop")
    args = parser.parse_args()
    for processes in args.processes:
        if args.batch_size % processes or args.batch_size < 2 * processes:
            parser.error(
                f"--batch-size {args.batch_size}: cannot be split over {processes} processes with "
                "at least 2 images each; give a multiple"
            )
    results = []
    print(
        f"{'method':9}{'processes':>10}{'signal':>8}{'steps':>7}{'stops':>7}"
        f"{'while starting':>16}{'seconds':>9}  same bits"
    )
    for method in args.methods:
        for processes in args.processes:
            folder = new_folder(
                measure.ROOT / "runs" / "benchmarks" / "faults" / f"{method}-{processes}"
            )
            command = [
                sys.executable,
                f"{METHODS[method].script}.py",
                *COMMON.format(batch=args.batch_size, epochs=args.epochs).split(),
                *METHODS[method].tiny.split(),
                *MORE.get(method, "").split(),
            ]
            command += ["--multiprocessing-distributed", "--nproc-per-node", str(processes)] * (
                processes > 1
            )
            uninterrupted = Run(command, folder / "whole")
            uninterrupted.start(workers=1)
            uninterrupted.end(0)
            for name in args.signals:
                moments = random.Random(f"{args.seed} {method} {processes} {name}")
                found = stopped(
                    Run(command, folder / name),
                    signal.Signals[f"SIG{name}"],
                    args.stops,
                    uninterrupted.steps(),
                    moments,
                )
                same = equal(uninterrupted.last(), Run(command, folder / name).last())
                results.append(
                    {
                        "method": method,
                        "processes": processes,
                        "signal": name,
                        **found,
                        "same": same,
                    }
                )
                print(
                    f"{method:9}{processes:10}{name:>8}{uninterrupted.steps():7}{found['stops']:7}"
                    f"{found['starting']:16}{found['seconds']:9.0f}  {'yes' if same else 'NO'}",
                    flush=True,
                )
    measure.write("faults", args.json, results)
    return 0 if all(result["same"] for result in results) else 1


def stopped(
    run: "Run", number: signal.Signals, stops: int, total: int, moments: random.Random
) -> dict[str, float]:
    """Stop a run `stops` times, spread over its steps. Then let it end, and return the figures."""
    began, starting = time.perf_counter(), 0
    for i in range(stops):
        run.start(moments.randint(0, 2))
        before = run.steps()
        # sometimes stop it while it starts (imports, processes, data, checkpoint)
        if moments.random() < 0.2:
            time.sleep(moments.uniform(0, 5))
            starting += 1
        else:
            run.wait(before + moments.randint(1, max(1, 2 * (total - before) // (stops - i + 2))))
            time.sleep(moments.uniform(0, 0.2))
        run.stop(number)
    run.start(1)
    run.end(0)
    return {"stops": stops, "starting": starting, "seconds": time.perf_counter() - began}


class Run:
    """A run folder, and the process that currently writes to it."""

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder = command, folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, workers: int) -> None:
        """Start the run, or resume it, with `workers` loader workers."""
        self.output = (self.folder / "output.txt").open("a")
        self.process = subprocess.Popen(
            [
                *self.command,
                "--save-dir",
                str(self.folder),
                "--resume",
                "auto",
                "--workers",
                str(workers),
            ],
            cwd=measure.ROOT,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
        )

    def steps(self) -> int:
        """Return the number of logged steps. AdCo's first step number is negative."""
        path = self.folder / "log.jsonl"
        lines = (
            [line for line in path.read_text().splitlines() if line.endswith("}")]
            if path.exists()
            else []
        )
        return json.loads(lines[-1])["step"] - json.loads(lines[0])["step"] + 1 if lines else 0

    def wait(self, steps: int) -> None:
        """Wait until the run has taken `steps` steps since its first start, or has ended."""
        while self.process.poll() is None and self.steps() < steps:
            time.sleep(0.01)

    def stop(self, number: signal.Signals) -> None:
        """Send a signal: SIGKILL to every process of the run, SIGTERM only to the first.

        After SIGTERM, check the exit status: a run that was training must have saved.
        """
        if self.process.poll() is not None:
            sys.exit(
                f"{self.folder}: ended with status {self.process.returncode} before it was stopped"
            )
        if number == signal.SIGKILL:
            os.killpg(self.process.pid, number)
            self.process.wait()
            return
        self.process.send_signal(number)
        self.end(STATUS, -number)

    def end(self, *statuses: int) -> None:
        """Wait for the run to end; exit with an error if its status is not one of `statuses`."""
        if self.process.wait() not in statuses:
            sys.exit(
                f"{self.folder}: ended with status {self.process.returncode}, not {statuses}; "
                "see output.txt there"
            )
        self.output.close()

    def last(self) -> dict:
        """Return the entries of the last checkpoint that must be the same."""
        state = torch.load(max(self.folder.glob("checkpoint_*.pth.tar")), weights_only=True)
        return {
            key: state[key] for key in ("epoch", "state_dict", "optimizer", "scaler", "progress")
        }


def equal(a: object, b: object) -> bool:
    """Return whether two nested structures of dicts, lists and tensors are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


if __name__ == "__main__":
    measure.main(main)
