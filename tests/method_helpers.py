"""Tiny runs of AdCo, SogCLR and FNC, with variants that the registry of methods does not have."""

from run_helpers import INPUT, typed

SMALL = (*INPUT, "--epochs", 1)
METHODS = {
    "adco": ("main_adco", "--cluster", 20),
    "adco sym multi-crop": ("main_adco", "--cluster", 20, "--sym", 1, "--multi_crop", 1),
    "sogclr": ("main_sogclr", "--mlp-dim", 32, "--dim", 16),
    "fnc": (
        "main_fnc",
        *typed("--support-size 1 --memory-multiplier 5 --fn-threshold 0.5 --proj-out-dim 16"),
    ),
}
