#!/usr/bin/env python
"""Measure training on a busy CPU, for several ways in which OpenMP threads wait for each other.

Each setting trains in its own process, alone and next to busy programs, which start later. The
settings take turns: a process sleeps while the others train. `contention` is the time of a step
with our setting, divided by that of a step with one thread next to the same programs.
"""

import os
import subprocess
import sys
import time

import measure
import torch

from moco.encoder.archs import ARCHS

SETTINGS = {
    # GNU's OpenMP ignores this variable, but it keeps moco from setting GOMP_SPINCOUNT
    "torch's default": {"KMP_BLOCKTIME": "0"},
    "ours": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 30000": {"GOMP_SPINCOUNT": "30000"},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
}
CHOSEN = (
    "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
)
COMPARED = ("torch's default", "ours", "one thread")


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument(
        "--busy",
        type=measure.at_least(1),
        default=2,
        metavar="N",
        help="busy programs next to the training",
    )
    parser.add_argument(
        "--settings",
        nargs="*",
        choices=SETTINGS,
        default=[],
        help=f"settings to measure in addition to {', '.join(COMPARED)}",
    )
    parser.add_argument(
        "--steps", type=measure.at_least(1), default=5, help="measured steps of each round"
    )
    parser.add_argument("--arch", choices=ARCHS, default="resnet18")
    parser.add_argument("--size", type=measure.pixels, default=64, help="image size in pixels")
    parser.add_argument("--batch-size", type=measure.at_least(2), default=32)
    parser.add_argument(
        "--train", action="store_true", help="internal: train in this process when told to"
    )
    args = parser.parse_args()
    if args.train:
        train(args.arch, args.size, args.batch_size, args.steps)
        return
    names = list(dict.fromkeys([*COMPARED, *args.settings]))
    trainings = {name: start(name, args) for name in names}
    table, alone, busy = [], {}, {}
    for others, times in ((0, alone), (args.busy, busy)):
        command = [sys.executable, "-c", "while True: pass"]
        programs = [subprocess.Popen(command) for _ in range(others)]
        try:
            candidates = {
                name: lambda training=training: seconds(training)
                for name, training in trainings.items()
            }
            times |= measure.side_by_side(candidates, args.rounds, torch.device("cpu"), warm=1)
        finally:
            for program in programs:
                program.kill()
                program.wait()
        where = f"next to {others}" if others else "alone"
        for name, value in measure.medians(times).items():
            speed = args.batch_size * args.steps / value
            table.append({"setting": name, "where": where, "images/s": speed})
    for training in trainings.values():
        training.stdin.close()
        training.wait()
    figures = {
        "contention": measure.ratio(busy["ours"], busy["one thread"]),
        "busy_over_one_thread_alone": measure.ratio(busy["ours"], alone["one thread"]),
        "busy_default_over_one_thread": measure.ratio(busy["torch's default"], busy["one thread"]),
        "alone_over_default": measure.ratio(alone["ours"], alone["torch's default"]),
    }
    facts = {
        "arch": args.arch,
        "pixels": args.size,
        "batch": args.batch_size,
        "cores": os.cpu_count(),
        "busy": args.busy,
    }
    targets = {"contention": measure.Target(2)}
    measure.report("threads", table, figures, facts, args.json, targets)


def start(name: str, args) -> subprocess.Popen:
    """Start a process that trains with a setting, and wait until it is ready."""
    environment = {key: value for key, value in os.environ.items() if key not in CHOSEN} | SETTINGS[
        name
    ]
    shape = {
        "--arch": args.arch,
        "--size": args.size,
        "--batch-size": args.batch_size,
        "--steps": args.steps,
    }
    words = [str(word) for pair in shape.items() for word in pair]
    training = subprocess.Popen(
        [sys.executable, __file__, "--train", *words],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    answer = training.stdout.readline()
    if answer != "ready\n":
        raise RuntimeError(f"{name}: the training process ended")
    return training


def seconds(training: subprocess.Popen) -> float:
    """Return the seconds of the steps of one round in a training process."""
    training.stdin.write("\n")
    training.stdin.flush()
    return float(training.stdout.readline())


def train(arch: str, size: int, batch: int, steps: int) -> None:
    """Run some steps for each line of the input, and print how long they took."""
    import torchvision

    net, images = torchvision.models.get_model(arch), torch.randn(batch, 3, size, size)

    def run(count: int) -> None:
        for _ in range(count):
            net(images).square().mean().backward()
            net.zero_grad()

    run(2)  # the first steps allocate memory
    print("ready", flush=True)
    for _ in sys.stdin:
        run(1)  # the caches of the CPU have another program's data
        began = time.perf_counter()
        run(steps)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    measure.main(main)
