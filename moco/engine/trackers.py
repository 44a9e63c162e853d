"""Send metrics to an experiment tracker. `tracking.Tracker` runs this file in a process of its own.

The process reads one JSON object a line from stdin: first the run (see `Tracked`), then `metrics`
with their `step`, `results`, and at last `end`. It answers on stdout with lines of a word and a
text: `note`, `error`, or `done`. The trackers' own output goes to stderr, which is a file.

Only the standard library is imported before the tracker, so that this process starts quickly.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = "hard-negatives"  # the project or experiment, unless the environment names another
PATIENCE = 60  # seconds to finish after the training process was killed

Values = dict[str, float]


class Tracked(NamedTuple):
    """The run to track: its folder, its name, its settings, and the id of the run to continue."""

    tracker: str
    folder: str
    name: str
    config: dict[str, Any]
    id: str | None


class Wandb:
    """A run of Weights & Biases, offline unless the user has logged in."""

    def __init__(self, run: Tracked):
        import wandb

        mode, folder = os.environ.get("WANDB_MODE"), os.environ.get("WANDB_DIR", run.folder)
        if mode is None:
            try:
                wandb.login(verify=False)
            except wandb.UsageError:  # no key, and no terminal to ask for one
                mode = "offline"
        # the training process is the one whose CPU and memory use are of interest
        settings = {"console": "off", "x_stats_pid": os.getppid()}
        known = {name: value for name, value in settings.items() if _knows(wandb.Settings, name)}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            dir=folder,
            id=run.id,
            resume="allow",
            mode=mode,
            settings=wandb.Settings(**known),
        )
        self.run.config.update(run.config, allow_val_change=True)
        # wandb's own step cannot be negative, and ignores lines that a resumed run repeats
        self.run.define_metric("*", step_metric="step")
        self.id, self.where = self.run.id, self.run.url
        if not self.where:
            files = Path(folder, "wandb", f"offline-run-*-{self.id}")
            self.where = f"offline; wandb sync {files} uploads the run"

    def log(self, values: Values, step: int) -> None:
        """Log the metrics of a step."""
        self.run.log({"step": step, **values})

    def results(self, values: Values) -> None:
        """Write the final results to the summary of the run."""
        self.run.summary.update(values)

    def end(self, how: str) -> None:
        """Upload what is left, and end the run."""
        self.run.finish(exit_code=int(how == "failed"))


class Trackio:
    """A run of Trackio, which keeps it on this machine unless the environment names a server."""

    def __init__(self, run: Tracked):
        import trackio

        # Trackio finds the run to continue by its name, which must therefore be unique
        name = run.id or f"{run.name}-{os.urandom(3).hex()}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        resume = "allow" if run.id else "never"
        self.trackio, self.step = trackio, 0
        self.run = trackio.init(
            project=project, name=name, config=run.config, resume=resume, embed=False
        )
        self.id, self.where = name, f"trackio show --project {project} shows the run {name}"
        if "TRACKIO_SPACE_ID" in os.environ or "TRACKIO_SERVER_URL" in os.environ:
            # the address may contain a token
            self.where = f"the run {name} on the server that the environment names"

    def log(self, values: Values, step: int) -> None:
        """Log the metrics of a step."""
        self.step = step
        self.run.log(values, step=step)

    def results(self, values: Values) -> None:
        """Log the final results at the last step."""
        self.run.log(values, step=self.step)

    def end(self, how: str) -> None:  # noqa: ARG002 (Trackio does not distinguish)
        """Write what is left, and end the run."""
        self.trackio.finish()


class MLflow:
    """A run of MLflow, in a file in the run folder unless the environment names a server."""

    def __init__(self, run: Tracked):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.exceptions import MlflowException

        if "MLFLOW_TRACKING_URI" in os.environ:
            # the address may contain a password
            where = "on the server of MLFLOW_TRACKING_URI"
        else:
            store = Path(run.folder).resolve() / "mlflow.db"
            if not store.exists():
                # creating the tables takes seconds; if it is interrupted, the file is useless
                unfinished = store.with_suffix(".tmp")
                unfinished.unlink(missing_ok=True)
                mlflow.set_tracking_uri(f"sqlite:///{unfinished}")
                mlflow.search_experiments()
                unfinished.replace(store)
            mlflow.set_tracking_uri(f"sqlite:///{store}")
            where = f"mlflow ui --backend-store-uri {mlflow.get_tracking_uri()} shows the run"
        self.mlflow, self.step = mlflow, 0
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        started = None
        if run.id:
            try:
                started = mlflow.start_run(run_id=run.id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if started is None:
            started = mlflow.start_run(run_name=run.name)
            # parameters cannot change, so that a continued run keeps its first ones
            mlflow.log_params({name: str(value)[:500] for name, value in run.config.items()})
        self.id, self.where = started.info.run_id, where

    def log(self, values: Values, step: int) -> None:
        """Log the metrics of a step."""
        self.step = step
        self.mlflow.log_metrics(values, step=step)

    def results(self, values: Values) -> None:
        """Log the final results at the last step."""
        self.mlflow.log_metrics(values, step=self.step)

    def end(self, how: str) -> None:
        """End the run."""
        states = {"finished": "FINISHED", "stopped": "KILLED"}
        self.mlflow.end_run(states.get(how, "FAILED"))


TRACKERS = {"wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}


def _knows(settings: Any, name: str) -> bool:
    """Return whether this version of wandb has a setting."""
    return name in getattr(settings, "model_fields", ())


def id_file(folder: str | Path, tracker: str) -> Path:
    """Return the file in the run folder that keeps the id of the tracked run."""
    return Path(folder) / f"tracked-{tracker}.txt"


def follow(messages: Iterator[dict[str, Any]], answer: Any) -> None:
    """Track a run from its first message to its last one.

    Args:
        messages: the messages of the training process.
        answer: called with a word and a text.
    """
    first = next(messages)
    # the tracker describes the run by the command line of the training
    sys.argv = first.pop("argv")
    run = Tracked(**first)
    # looked up here, because the tests replace the package
    tracker = TRACKERS[run.tracker](run)
    file = id_file(run.folder, run.tracker)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(tracker.id)
    unfinished.replace(file)
    answer("note", tracker.where)
    how = "failed"  # unless the last message says otherwise, the training process was killed
    for message in messages:
        if "metrics" in message:
            tracker.log(_numbers(message["metrics"]), message["step"])
        elif "results" in message:
            tracker.results(_numbers(message["results"]))
        else:
            how = message["end"]
            break
    else:
        signal.alarm(PATIENCE)
    tracker.end(how)


def _numbers(values: dict[str, float | None]) -> Values:
    """Return the values that are numbers. JSON cannot hold NaN and infinity, and has null."""
    return {name: value for name, value in values.items() if value is not None}


def main() -> None:
    """Serve the training process that has started this one, until it ends."""
    # this file's folder, whose files are no packages
    sys.path.pop(0)
    # a signal to the job is for the training process, which then sends its last messages
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(word: str, text: str = "") -> None:
        with contextlib.suppress(OSError):  # the training process was killed
            channel.write(f"{word} {' '.join(text.split())}\n")

    try:
        follow(map(json.loads, sys.stdin.buffer), answer)
    except BaseException as error:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        answer("error", f"{type(error).__name__}: {error}")
        os._exit(1)  # without the tracker's own work at exit, which may fail or hang
    answer("done")


if __name__ == "__main__":
    main()
