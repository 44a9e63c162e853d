"""Run the scripts on the built-in data set `photos`, for the demo and benchmarks/methods.py."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent  # the clone's folder, which has the scripts
COMMON = ["photos", "--arch", "resnet18", "--image-size", "32", "--workers", "1"]
# The features of a pre-trained encoder have about four times the norm of random ones, so they need
# lower learning rates. Several are tried, and the best one counts.
LINEAR = "--protocol moco --batch-size 32 --lr 0.01 0.03 0.1 0.3 1 --cos".split()


def run_on_photos(
    seed: int, script: str, folder: Path, *options: object, quiet: bool = False
) -> dict[str, float]:
    """Run a script, and return the metrics of its results.json; an empty dict if it has none.

    If the script fails, exit this program with the script's exit status.

    Args:
        seed: the run's seed.
        script: name of the script, without .py.
        folder: run folder that the script writes to.
        options: further words of the command line.
        quiet: whether to hide what the script prints.
    """
    command = [sys.executable, f"{script}.py", *COMMON, "--seed", seed]
    save_dir = folder.resolve()
    if save_dir.is_relative_to(ROOT):  # the report shows the command
        save_dir = save_dir.relative_to(ROOT)
    command = [str(word) for word in (*command, "--save-dir", save_dir, *options)]
    print("\n$ python", *command[1:], flush=True)
    output = subprocess.DEVNULL if quiet else None
    status = subprocess.run(command, cwd=ROOT, stdout=output).returncode
    if status:
        sys.exit(status)
    written = folder / "results.json"
    return json.loads(written.read_text())["metrics"] if written.exists() else {}
