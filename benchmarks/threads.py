#!/usr/bin/env python
"""Measure training on a busy CPU, for several ways in which OpenMP threads wait for each other.

Each setting trains in its own process, alone and next to busy programs; the settings take turns.
"""

import os
import subprocess
import sys
import time

import measure
import torch

SETTINGS = {
    # GNU's OpenMP ignores this variable, but it keeps moco from setting GOMP_SPINCOUNT
    "torch's default": {"KMP_BLOCKTIME": "0"},
    "ours": {},
    "spin 300": {"GOMP_SPINCOUNT": "300"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CHOSEN = (
    "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "KMP_BLOCKTIME",
    "GOMP_CPU_AFFINITY",
)


def main() -> None:
    """Run the benchmark."""
    parser = measure.parser(__doc__.splitlines()[0])
    parser.set_defaults(rounds=5)
    parser.add_argument(
        "--busy",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="busy programs next to the training",
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each round")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="image size in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--train",
        action="store_true",
        help="internal: train in this process and print images per second",
    )
    args = parser.parse_args()
    if args.train:
        print(train(args.arch, args.size, args.batch_size, args.steps))
        return
    table, ratios = [], {}
    for busy in (0, args.busy):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            candidates = {name: lambda name=name: seconds(name, args) for name in args.settings}
            times = measure.side_by_side(candidates, args.rounds, torch.device("cpu"), warm=0)
        finally:
            for other in others:
                other.kill()
                other.wait()
        where = f"next to {busy}" if busy else "alone"
        for name, values in times.items():
            table.append(
                {
                    "setting": name,
                    "where": where,
                    "images/s": 1 / measure.medians({name: values})[name],
                }
            )
            ratios[f"{name}, {where}: speed over the default's"] = measure.ratio(
                times[args.settings[0]], values
            )
    facts = {
        "arch": args.arch,
        "pixels": args.size,
        "batch": args.batch_size,
        "cores": os.cpu_count(),
    }
    measure.report("threads", table, ratios, facts, args.json)


def seconds(name: str, args) -> float:
    """Return the seconds per image with a setting, measured in a new process."""
    environment = {key: value for key, value in os.environ.items() if key not in CHOSEN} | SETTINGS[
        name
    ]
    shape = (
        "--arch",
        args.arch,
        "--size",
        args.size,
        "--batch-size",
        args.batch_size,
        "--steps",
        args.steps,
    )
    command = [sys.executable, __file__, "--train", *map(str, shape)]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return 1 / float(found.stdout)


def train(arch: str, size: int, batch: int, steps: int) -> float:
    """Return images per second of forward and backward passes."""
    import torchvision

    net, images = torchvision.models.get_model(arch), torch.randn(batch, 3, size, size)
    for step in range(steps + 2):
        if step == 2:  # the first two steps allocate memory
            began = time.perf_counter()
        net(images).square().mean().backward()
        net.zero_grad()
    return steps * batch / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
