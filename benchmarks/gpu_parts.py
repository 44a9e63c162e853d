"""The parts of stages 1 and 2 of benchmarks/gpu.py, by stage and name."""

from functools import partial

import gpu_checks
import gpu_profile
import gpu_runs
import gpu_speed

# name: (check, lane). The checks of a lane run in order; lanes run at the same time.
CHECKS = {
    f"step {name}": (partial(gpu_checks.step, name), i % 4)
    for i, name in enumerate(gpu_checks.TRIED)
}
CHECKS |= {
    "views": (gpu_checks.views, 0),
    "hardest": (gpu_checks.hardest, 0),
    "accumulation": (gpu_checks.accumulation, 0),
    "checkpointing": (gpu_checks.checkpointing, 0),
    "channels_last": (gpu_checks.channels_last, 0),
    "resume": (gpu_runs.resume, 1),
    "k-NN": (gpu_runs.knn, 1),
    "compile": (gpu_checks.compiled, 2),
    "NCCL": (gpu_runs.nccl, 3),
    "torchrun": (gpu_runs.under_torchrun, 3),
    "probe": (gpu_runs.probe, 3),
    "waits": (gpu_checks.waits, 1),
    "layers": (gpu_checks.layers, 1),
}

SPEEDS = {
    "steps": (gpu_speed.steps, 0),
    "CIFAR-10 profile": (gpu_profile.cifar_profile, 0),
    "profile": (gpu_profile.profile, 0),
    "views": (gpu_speed.views, 0),
    "fp32": (gpu_speed.fp32, 0),
    "loading": (gpu_speed.loading, 0),
    "end to end": (gpu_speed.end_to_end, 0),
    "CIFAR-10 step": (gpu_profile.cifar_step, 0),
    "groups": (gpu_profile.groups, 0),
    "others": (gpu_speed.others, 0),
    "larger batch": (gpu_speed.larger, 0),
    "compiled": (gpu_speed.compiled, 0),
}

PARTS = {1: CHECKS, 2: SPEEDS}
