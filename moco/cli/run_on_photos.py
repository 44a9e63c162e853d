"""Run the scripts on `photos` as their user would: what the demo and benchmarks/methods.py share."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent  # of the clone, which has the scripts
COMMON = ["photos", "--arch", "resnet18", "--image-size", "32", "--workers", "1"]
# Features of a pre-trained encoder are about four times as long as random ones, so they need lower
# learning rates. Several are tried, and the best one counts.
LINEAR = "--batch-size 32 --lr 0.01 0.03 0.1 0.3 1 --cos".split()


def run_on_photos(
    seed: int, script: str, folder: Path, *options: object, quiet: bool = False
) -> dict[str, float]:
    """Run a script, which writes to `folder`; return the metrics of its results.json, if any.

    Ends this program with the script's exit status if that is not 0. `quiet` hides its output.
    """
    command = [sys.executable, f"{script}.py", *COMMON, "--seed", seed]
    command = [str(word) for word in (*command, "--save-dir", folder.resolve(), *options)]
    print("\n$ python", *command[1:], flush=True)
    output = subprocess.DEVNULL if quiet else None
    status = subprocess.run(command, cwd=ROOT, stdout=output).returncode
    if status:
        sys.exit(status)
    written = folder / "results.json"
    return json.loads(written.read_text())["metrics"] if written.exists() else {}
