#!/usr/bin/env bash
# Run a script on one or several nodes under SLURM, again and again until it is done. Copy it, edit what is marked, submit:
#
#   sbatch --nodes 1 --gpus-per-node 8 tools/slurm.sh main_synco.py --cfg configs/synco_200.yaml --save-dir RUN DIR
#   sbatch --nodes 2 --gpus-per-node 8 tools/slurm.sh main_synco.py --cfg configs/synco_200.yaml --save-dir RUN DIR
#
# Submit in the project's folder, which every node must see, as it must RUN and DIR. For scripts that have --resume: those that
# pre-train, main_lincls.py and main_semisup.py.
#
# How it starts: srun starts a task per GPU on every node. The tasks find rank and number from SLURM and meet at a port of the
# first node, so that --world-size, --rank and --dist-url stay away. --batch-size is that of a node (main_moby.py: of a task):
# with twice the nodes the total batch is twice as large, and --lr may have to follow.
#
# How it ends and goes on: `--resume auto` is added, which begins a new run or goes on from the newest checkpoint in RUN.
# - The time limit: 120 s before it SLURM sends USR1 (without `B:` to the tasks, and not to this shell). They finish their
#   step, save and exit with status 75, and the job is put back into the queue here. Raise the 120 where
#   a step and a save take longer.
# - Preemption: SLURM sends TERM, to which the tasks do the same, and puts the job back into the queue by itself (--requeue).
#   It waits KillWait or GraceTime seconds, 30 as a rule; a run that is killed loses what came after its last checkpoint, so give
#   --save-every-steps too. scancel sends TERM as well; a job that this shell has seen end by TERM is not requeued here.
# - Anything else ends the job with the script's own status. One task that fails ends all others (--kill-on-bad-exit).
#
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
# (edit) #SBATCH --partition=... --account=...
set -euo pipefail

# (edit) the environment, the same on every node
# source .venv/bin/activate
python=${PYTHON:-python}

fail() {
    echo "slurm.sh: error: $1" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no script; as in: sbatch tools/slurm.sh main_synco.py --save-dir RUN DIR"
[ -n "${SLURM_JOB_ID:-}" ] || fail "runs inside a job; submit it: sbatch --nodes 1 --gpus-per-node 8 tools/slurm.sh $1 ..."
[ -f "$1" ] || fail "$1: no such script in $PWD; submit in the project's folder"

folder="" before=""
for word in "$@"; do
    case $before in --save-dir | --save_dir | --output) folder=$word ;; esac
    case $word in
        --save-dir=* | --save_dir=* | --output=*) folder=${word#*=} ;;
        --resume | --resume=*) fail "--resume: leave it out; --resume auto is added: the run folder's newest checkpoint, if any" ;;
        --multiprocessing[-_]distributed*) fail "$word: leave it out; srun starts a process for each GPU" ;;
    esac
    before=$word
done
[ -n "$folder" ] || fail "no run folder; give --save-dir RUN, or --output OUT --tag T: a requeued job goes on from there"

# A task that has saved must not end with a status: --kill-on-bad-exit would kill the others, which are a moment later, and srun
# would tell of the kill. It leaves a mark in the run folder instead. Its shell passes signals on, however they are sent.
mkdir -p "$folder"
mark=$folder/.interrupted-$SLURM_JOB_ID
rm -f "$mark"
# shellcheck disable=SC2016 # expands in the tasks
task='
mark=$1
shift
signalled=
trap "signalled=1; kill -USR1 \$child" USR1
trap "signalled=1; kill -TERM \$child" TERM
"$@" &
child=$!
while
    signalled= status=0
    wait "$child" || status=$?
    [ -n "$signalled" ]
do :; done
[ "$status" != 75 ] || { : >"$mark" && exit 0; }
exit "$status"
'

gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
gpus=${gpus##*:} # of TYPE:COUNT
case $gpus in '' | 0 | *[!0-9]*) fail "cannot tell the GPUs of a node from '$gpus'; give sbatch --gpus-per-node COUNT" ;; esac
nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
cpus=$((${SLURM_CPUS_ON_NODE:-gpus} / gpus)) # a task has one core by default, on which all its loaders would run
[ "$cpus" -gt 0 ] || cpus=1
unset SLURM_CPUS_PER_GPU # excludes --cpus-per-task

terminated=""
trap 'terminated=1' TERM # outlast it until the tasks have saved
status=0
srun --nodes="$nodes" --ntasks=$((nodes * gpus)) --ntasks-per-node="$gpus" --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
    bash -c "$task" task "$mark" "$python" "$@" --resume auto || status=$?
if [ "$status" -eq 0 ] && [ -e "$mark" ]; then
    status=75
fi
rm -f "$mark"

if [ "$status" -eq 75 ] && [ -n "$terminated" ]; then
    echo "slurm.sh: saved; SLURM ends the job, and requeues it where it was preempted"
elif [ "$status" -eq 75 ]; then
    echo "slurm.sh: saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: error: cannot requeue job $SLURM_JOB_ID; submit it again to go on" >&2
fi
exit "$status"
