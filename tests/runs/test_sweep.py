"""Test tools/sweep.sh with a stand-in for Python, which records the commands of the runs."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, own_lines, settings
from fault_helpers import until
from run_helpers import bash

import main_semisup

# The stand-in runs for $SECONDS_OF_A_RUN. A signal stops it: it saves and exits with status 75.
STUB = """
case " $* " in *" --help "*) echo "${HELP---resume FILE}" && exit ;; esac
case $1 in */collect.py | */status.py) echo "TABLE ${1##*/} ${*:2}" && exit ;; esac
words=$(printf '<%s>' "${@:2}")
run=""
while [ $# -gt 0 ]; do [ "$1" != --save-dir ] || run=$2; shift; done
mkdir -p "$run"
event() { echo "$1 ${run##*/} gpu=${CUDA_VISIBLE_DEVICES-none} $words" >>"$EVENTS"; }
event start
trap 'event saved; echo saved; exit 75' TERM USR1
sleep "${SECONDS_OF_A_RUN:-0.02}" 9>&- & # without the lock of the sweep
wait $!
case ${run##*/} in ${FAIL:-none}) echo "error: it failed"; echo; event failed; exit 3 ;; esac
[ -n "${NO_RESULTS:-}" ] || echo '{}' >"$run/${RESULT:-results.json}"
event done
"""


def as_in_a_terminal():
    """Start a session, and react to Ctrl-C although the tests may run in a shell's background."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Sweep:
    """tools/sweep.sh with the stand-in, in a folder of its own."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        (folder / "python").write_text(f"#!/bin/bash\n{STUB}")
        (folder / "python").chmod(0o755)
        self.env = {"PYTHON": str(folder / "python"), "EVENTS": str(folder / "events")}
        self.env["CUDA_VISIBLE_DEVICES"] = ""

    def words(self, *grid, options=("--epochs", 3, "DIR"), before=()):
        words = [*before, self.out, "main_lincls.py", *grid, "--", *options]
        return [str(ROOT / "tools/sweep.sh"), *map(str, words)]

    def run(self, *grid, env=None, **more):
        return bash(*self.words(*grid, **more), env={**self.env, **(env or {})})

    def start(self, *grid, env=None, **more):
        words = ["bash", *self.words(*grid, **more)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        env = {**os.environ, **self.env, **(env or {})}
        return subprocess.Popen(words, env=env, preexec_fn=as_in_a_terminal, **pipes)

    def events(self, kind):
        """Return the names of the runs that have had an event: start, saved, failed or done."""
        path = self.folder / "events"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1] for line in lines if line.startswith(f"{kind} ")]

    def commands(self):
        """Return the words of each run, by its name."""
        lines = (self.folder / "events").read_text().splitlines()
        starts = [line.split(" ", 3) for line in lines if line.startswith("start ")]
        return {name: words for _, name, _, words in starts}


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


SIX = ("--lr 1 2 3", "--wd 0 1e-4")
NAMES = sorted(f"lr={lr},wd={wd}" for lr in "123" for wd in ("0", "1e-4"))


def test_each_combination_runs_once_and_finished_ones_are_skipped(sweep):
    done = sweep.run(*SIX)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(sweep.events("done")) == NAMES
    for name, words in sweep.commands().items():
        lr, wd = (part.split("=")[1] for part in name.split(","))
        run = f"<--save-dir><{sweep.out}/{name}><--resume><auto>"
        assert words == f"<--lr><{lr}><--wd><{wd}><--epochs><3><DIR>{run}"
    assert f"TABLE collect.py {sweep.out} --out {sweep.out} --force\n" in done.stdout
    end = f"{sweep.out}: 6 of 6 combinations have finished, 0 have failed, 0 run elsewhere"
    assert done.stdout.endswith(f"{end}, 0 are left\n")
    done = sweep.run("--lr 1 2 3 4", SIX[1])
    assert done.returncode == 0 and "8 combinations, of which 6 have finished" in done.stdout
    assert sorted(sweep.events("done")) == sorted([*NAMES, "lr=4,wd=0", "lr=4,wd=1e-4"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_sweep_that_is_stopped_and_started_again_runs_each_once(number, jobs, sweep):
    slow, before = {"SECONDS_OF_A_RUN": "0.7"}, ("--jobs", jobs)
    stops = 0
    while stops < 2:
        process = sweep.start(*SIX, env=slow, before=before)
        done = len(sweep.events("done"))

        def in_the_middle(done=done):
            ended = len(sweep.events("done"))
            return ended > done and len(sweep.events("start")) - len(sweep.events("saved")) > ended

        until(in_the_middle, process)
        # Ctrl-C reaches all processes of the terminal; the stand-in ignores it in the background
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 75, out
        assert f"stopped by {number.name[3:]}; the same command continues" in out
        assert "failed:" not in out
        stops += 1
        # nothing goes on in the background
        events = (sweep.folder / "events").read_text()
        time.sleep(0.3)
        assert (sweep.folder / "events").read_text() == events
    done = sweep.run(*SIX, before=before)
    assert done.returncode == 0, done.stdout
    assert sorted(sweep.events("done")) == NAMES
    assert sweep.events("saved") and not sweep.events("failed")
    starts, ends = sweep.events("start"), [*sweep.events("done"), *sweep.events("saved")]
    assert len(starts) == len(ends)


def test_a_killed_sweep_leaves_its_run_alone_and_another_sweep_does_not_start_it_again(sweep):
    process = sweep.start("--lr 1", env={"SECONDS_OF_A_RUN": "3"})
    until(lambda: sweep.events("start"), process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    for pid in (process.pid, *map(int, workers.stdout.split())):
        os.kill(pid, signal.SIGKILL)
    done = sweep.run("--lr 1 2")
    assert done.returncode == 75 and "1 run elsewhere, 0 are left" in done.stdout
    assert "running" in sweep.run("--lr 1", before=["--list"]).stdout
    end = time.monotonic() + 20
    while len(sweep.events("done")) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert sorted(sweep.events("done")) == ["lr=1", "lr=2"]
    assert sweep.run("--lr 1 2").returncode == 0 and len(sweep.events("start")) == 2


def test_sweeps_at_the_same_time_share_the_runs(sweep):
    env = {"SECONDS_OF_A_RUN": "0.3", "FAIL": "lr=2,*"}
    both = [sweep.start(*SIX, env=env, before=("--jobs", 2)) for _ in range(2)]
    outs = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(sweep.events("start")) == NAMES, outs
    assert len(sweep.events("done")) == 4 and len(sweep.events("failed")) == 2
    # each lists what has failed in the other, and neither tries that again
    assert [process.returncode for process in both] == [1, 1]
    assert all(out.count("failed: lr=2,") == 2 for out in outs)


def test_failures_are_listed_and_tried_again_by_the_next_sweep(sweep):
    done = sweep.run(*SIX, env={"FAIL": "lr=[13],wd=0"})
    assert done.returncode == 1
    for lr in "13":
        assert f"failed: lr={lr},wd=0: exit status 3: error: it failed\n" in done.stdout
    assert "4 of 6 combinations have finished, 2 have failed" in done.stdout
    assert "TABLE" in done.stdout
    listed = sweep.run(*SIX, before=["--list"]).stdout.splitlines()
    assert len(listed) == 6 and listed[0] == f"failed    {sweep.out}/lr=1,wd=0"
    assert sum(line.startswith("finished  ") for line in listed) == 4
    assert sweep.run(*SIX).returncode == 0
    assert len(sweep.events("start")) == 8 and sorted(sweep.events("done")) == NAMES
    log = (sweep.out / "logs" / "lr=1,wd=0.log").read_text()
    assert log.count("error: it failed") == 1 and log.count("\n$ ") == 1 and log.startswith("$ ")


def test_a_run_without_results_has_failed(sweep):
    done = sweep.run("--lr 1", env={"NO_RESULTS": "1"})
    assert done.returncode == 1
    assert "failed: lr=1: exit status 0, but without results" in done.stdout


def test_a_pretraining_has_finished_if_its_record_says_so(sweep):
    env = {"RESULT": "status.json"}
    assert sweep.run("--lr 1", env=env).returncode == 1  # the stand-in's file says nothing
    (sweep.out / "lr=1" / "status.json").write_text('{\n  "state": "running",\n}\n')
    assert "failed" in sweep.run("--lr 1", before=["--list"]).stdout
    (sweep.out / "lr=1" / "status.json").write_text('{\n  "state": "finished",\n}\n')
    done = sweep.run("--lr 1", env=env)
    assert done.returncode == 0 and f"TABLE status.py {sweep.out}\n" in done.stdout


def test_a_finished_run_with_other_options_is_named(sweep):
    assert sweep.run("--lr 1").returncode == 0
    done = sweep.run("--lr 1", options=("--epochs", 4, "DIR"))
    assert "lr=1: has finished with other options, and is not run again: $ " in done.stdout
    assert "other options" not in sweep.run("--lr 1").stdout
    assert len(sweep.events("start")) == 1


def test_grids_of_any_options(sweep):
    grids = (
        "--cos | --schedule 60 80 |",
        """--pretrained 'my run/a.pth' "it's" x%y""",
    )
    assert sweep.run(*grids, "--wd -0.5 '$HOME' '*'").returncode == 0
    found = sweep.commands()
    assert len(found) == 27
    run = "cos,pretrained=my%20run~a.pth,wd=-0.5"
    end = f"<--epochs><3><DIR><--save-dir><{sweep.out}/{run}><--resume><auto>"
    assert found[run] == f"<--cos><--pretrained><my run/a.pth><--wd><-0.5>{end}"
    run = "schedule=60+80,pretrained=it%27s,wd=%24HOME"
    assert found[run].startswith("<--schedule><60><80><--pretrained><it's><--wd><$HOME><--epochs>")
    assert found["none,pretrained=x%25y,wd=%2A"].startswith("<--pretrained><x%y><--wd><*><--ep")


def test_names_are_distinct_and_not_too_long(sweep):
    long = [f"{'x' * 300}{i}" for i in range(2)]
    values = ["a/b", "a~b", "'a b'", "a+b", "a%b", "é", *long]
    assert sweep.run(f"--pretrained {' '.join(values)}").returncode == 0
    assert len(set(sweep.events("done"))) == len(values)
    assert all(len(name) < 200 for name in sweep.events("done"))


def test_scripts_without_resume_do_not_get_it(sweep):
    assert sweep.run("--k 1", env={"HELP": "--k"}).returncode == 0
    assert "--resume" not in sweep.commands()["k=1"]


def gpus_of(sweep):
    lines = (sweep.folder / "events").read_text().splitlines()
    return [tuple(line.split()[:3:2]) for line in lines]


def test_each_gpu_has_one_run_at_a_time(sweep):
    env = {"CUDA_VISIBLE_DEVICES": "2,3,5", "SECONDS_OF_A_RUN": "0.2"}
    assert sweep.run(*SIX, env=env).returncode == 0
    busy = set()
    for event, gpu in gpus_of(sweep):
        assert (gpu in busy) == (event == "done")
        busy ^= {gpu}
    assert {gpu for _, gpu in gpus_of(sweep)} == {"gpu=2", "gpu=3", "gpu=5"}


@pytest.mark.parametrize(
    ("before", "options", "expected"),
    [
        ((), ("--multiprocessing_distributed", "DIR"), {"gpu=0,1,2,3"}),
        (("--gpus-per-run", 2), ("--multiprocessing-distributed", "DIR"), {"gpu=0,1", "gpu=2,3"}),
        (("--jobs", 1), ("DIR",), {"gpu=0"}),
    ],
)
def test_runs_on_several_gpus(before, options, expected, sweep):
    env = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SECONDS_OF_A_RUN": "0.2"}
    done = sweep.run(*SIX, env=env, before=before, options=options)
    assert done.returncode == 0, done.stderr
    assert {gpu for _, gpu in gpus_of(sweep)} == expected


# Run the tasks of an array job one after the other, as sbatch would later. $FIRST_ONLY runs one.
SBATCH = """
printf '<%s>' "$@" >>"$SUBMITTED"
script=${!#}
tasks=$(sed -n 's/^#SBATCH --array=//p' "$script")
echo "Submitted batch job 7"
for task in $(echo "${tasks%%%*}" | tr , ' '); do
    SLURM_JOB_ID=8$task SLURM_ARRAY_TASK_ID=$task bash "$script" >"$SUBMITTED.$task" 2>&1
done
"""


@pytest.fixture
def slurm(sweep):
    folder = sweep.folder / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", 'echo "$@" >>"$REQUEUED"')):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    sweep.env["PATH"] = f"{folder}:{os.environ['PATH']}"
    sweep.env["SUBMITTED"] = str(sweep.folder / "submitted")
    sweep.env["REQUEUED"] = str(sweep.folder / "requeued")
    return sweep


def test_slurm_runs_each_combination_as_a_task(slurm):
    assert slurm.run("--name 'a b' '$x'", env={"FAIL": "name=%24x"}).returncode == 1
    before = ("--slurm", "--gpus-per-node 1 --time 1:00:00", "--jobs", 4)
    options = ("--epochs", 3, "two words", "--jobs", 9, "DIR")
    done = slurm.run("--name 'a b' '$x' 3", before=before, options=options)
    assert done.returncode == 0, done.stderr
    script = slurm.out / "sweep.sbatch"
    words = f"<--gpus-per-node><1><--time><1:00:00><{script}>"
    assert (slurm.folder / "submitted").read_text() == words
    assert "#SBATCH --array=1,2%4\n" in script.read_text()
    assert sorted(slurm.events("done")) == ["name=%24x", "name=3", "name=a%20b"]
    last = slurm.commands()["name=%24x"]
    assert last.startswith("<--name><$x><--epochs><3><two words><--jobs><9><DIR><--save-dir>")
    assert "1 of 1 combinations have finished" in (slurm.folder / "submitted.1").read_text()
    assert "tools/status.py" in done.stdout and not (slurm.folder / "requeued").exists()
    done = slurm.run("--name 'a b' '$x' 3", before=before, options=options)
    assert "all 3 combinations have finished" in done.stdout


def test_a_task_at_its_time_limit_saves_and_is_requeued(slurm):
    env = {"SLURM_JOB_ID": "81", "SECONDS_OF_A_RUN": "20"}
    process = slurm.start("--lr 1 2", env=env, before=("--index", 1))
    until(lambda: slurm.events("start"), process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75, process.communicate()
    assert slurm.events("saved") == ["lr=2"]
    assert (slurm.folder / "requeued").read_text() == "requeue 81\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give OUT, a script and a grid"),
        (["OUT", "main_lincls.py", "--", "DIR"], "no grid"),
        (["OUT", "main_lincls.py", "--lr 1"], "no -- and options"),
        (["OUT", "main_lincls.py", "--lr 1", "--"], "no -- and options"),
        (["OUT", "main_nothing.py", "--lr 1", "--", "DIR"], "main_nothing.py: no such script"),
        (["--lr 1", "main_lincls.py", "--wd 1", "--", "DIR"], "OUT is missing before --lr 1"),
        (["", "main_lincls.py", "--wd 1", "--", "DIR"], "OUT '': not a folder"),
        (["OUT", "main_lincls.py", "--lr", "--", "DIR"], "has no value"),
        (["OUT", "main_lincls.py", "1 2", "--", "DIR"], "must start with an option"),
        (["OUT", "main_lincls.py", "--cos | 3", "--", "DIR"], "starts with an option"),
        (["OUT", "main_lincls.py", "--lr 1 --wd 2", "--", "DIR"], "write | between"),
        (["OUT", "main_lincls.py", "--lr 1 'x", "--", "DIR"], "a quote is not closed"),
        (["OUT", "main_lincls.py", "--lr 1 1", "--", "DIR"], "has lr=1 twice"),
        (["OUT", "main_lincls.py", " ", "--", "DIR"], "an empty grid"),
        (["OUT", "main_lincls.py", "--tag a b", "--", "DIR"], "--tag: leave it out"),
        (["OUT", "main_lincls.py", "--lr 1", "--", "--save_dir=x", "DIR"], "leave it out"),
        (["--jobs", "0", "OUT", "main_lincls.py", "--lr 1", "--", "DIR"], "--jobs 0: must be"),
        (["--jobs", "x", "OUT", "main_lincls.py", "--lr 1", "--", "DIR"], "--jobs x: must be"),
        (["OUT", "main_lincls.py", "--lr 1", "--jobs"], "--jobs: its value is missing"),
        (["--index", "1", "OUT", "main_lincls.py", "--lr 1", "--", "DIR"], "has 1 combinations"),
        (["--gpus-per-run", "2", "OUT", "main_lincls.py", "--lr 1", "--", "DIR"], "0 GPUs"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(words, said, sweep):
    words = [str(sweep.out) if word == "OUT" else word for word in words]
    done = bash("tools/sweep.sh", *words, env=sweep.env)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert len(own_lines(done.stderr)) == 1 and not sweep.events("start")


def test_an_out_that_cannot_be_written(sweep):
    sweep.out.write_text("a file")
    done = sweep.run("--lr 1")
    assert done.returncode == 2 and str(sweep.out) in done.stderr


def test_help():
    out = bash("tools/sweep.sh", "--help").stdout
    assert out.startswith("Run a script with every combination") and "Exit status:" in out


def test_the_documented_sweep_of_few_labels_is_the_papers(sweep):
    """main_semisup.py parses the commands of docs/evaluation.md."""
    page = (ROOT / "docs/evaluation.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in page.splitlines() if line.startswith("tools/sweep.sh")]
    env = {**os.environ, **sweep.env}
    line = line.replace("tools/sweep.sh sweep ", f"tools/sweep.sh {sweep.out} ")
    subprocess.run(line, shell=True, cwd=ROOT, env=env, check=True)
    found = set()
    for words in sweep.commands().values():
        args = settings(main_semisup, words[1:-1].split("><"))
        found.add((args.train_percent, args.epochs, args.lr_backbone, args.lr_classifier))
        assert (args.batch_size, args.weights, args.wd) == (1024, "finetune", 1e-6)
        assert (args.val_from_train, args.pretrained) == (0.1, "RUN/checkpoint_0199.pth.tar")
    rates = (0.01, 0.02, 0.05, 0.1, 0.005)
    assert found == {(p, e, lr, 0.5) for p, e in ((1, 60), (10, 30)) for lr in rates}


@pytest.mark.slow
def test_real_runs_are_interrupted_and_continued(shared_images, tmp_path):
    """Stop a sweep in the middle; the second start continues, and prints the table."""
    words = ["tools/sweep.sh", str(tmp_path / "sweep"), "main_semisup.py"]
    words += ["--lr-backbone 0.01 0.02", "--", "-a", "resnet18", "--image-size", "32", "-j", "0"]
    words += ["-b", "8", "--weights", "finetune", "--val-from-train", "0.1", "--epochs", "3"]
    words += ["-p", "1", str(shared_images)]
    env = {**os.environ, "PYTHON": sys.executable}
    process = subprocess.Popen(words, cwd=ROOT, env=env, preexec_fn=as_in_a_terminal)
    log = tmp_path / "sweep" / "lr-backbone=0.01" / "log.jsonl"
    until(lambda: log.exists() and log.stat().st_size, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 75
    done = bash(*words, env={"PYTHON": sys.executable}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    first = (tmp_path / "sweep" / "logs" / "lr-backbone=0.01.log").read_text()
    assert "SIGTERM: saved" in first or "SIGINT: saved" in first
    assert "resumed from" in first and first.count("* Acc@1") == 1
    assert "the best of 2 settings is lr_backbone 0.0" in done.stdout
    assert (tmp_path / "sweep" / "table.tex").exists()
