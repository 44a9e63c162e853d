#!/usr/bin/env bash
# Run a script on one or several nodes under SLURM, and requeue the job until the script is done. Copy this file, edit the
# lines marked (edit), and submit it:
#
#   sbatch --nodes 1 --gpus-per-node 8 tools/slurm.sh main_synco.py --cfg configs/synco_200.yaml --save-dir RUN DIR
#   sbatch --nodes 2 --gpus-per-node 8 tools/slurm.sh main_synco.py --cfg configs/synco_200.yaml --save-dir RUN DIR
#
# Submit it in the project's folder. Every node must be able to read that folder, RUN and DIR. It works with scripts that have
# --resume: those that pre-train, main_lincls.py and main_semisup.py.
#
# Start: srun starts one task per GPU on every node. The tasks take rank and world size from SLURM and connect to a port of the
# first node, so leave out --world-size, --rank and --dist-url. --batch-size is that of a node (main_moby.py: of a task;
# main_mocov3.py: of all nodes). With twice the nodes, the total batch is twice as large (except in main_mocov3.py), and --lr may
# need to be larger, too.
#
# End and continuation: the script gets `--resume auto`, which starts a new run or continues from the newest checkpoint in RUN.
# - Time limit: SLURM sends USR1 120 s earlier (to the tasks and not to this shell, because --signal lacks `B:`). The tasks
#   finish their step, save and exit with status 75. This shell then requeues the job. If a step and a save may take longer,
#   raise the 120.
# - Preemption: SLURM sends TERM, and the tasks do the same. SLURM requeues the job itself (--requeue). It kills the tasks after
#   KillWait or GraceTime seconds, usually 30. A killed run loses the steps after its last checkpoint, so also give
#   --save-every-steps. scancel sends TERM, too; this shell does not requeue a job that ended by TERM.
# - Otherwise the job ends with the status of the script. If one task fails, all others are ended (--kill-on-bad-exit).
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

# (edit) activate the environment, which must be the same on every node
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
[ -n "$folder" ] || fail "no run folder; give --save-dir RUN, or --output OUT --tag T: a requeued job continues from there"

# A task that has saved must exit with status 0: otherwise --kill-on-bad-exit would kill the others, which finish a moment later,
# and srun would report the kill. So it creates a marker file in the run folder instead. The shell of each task forwards signals
# to the script.
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
gpus=${gpus##*:} # the value may be TYPE:COUNT
case $gpus in '' | 0 | *[!0-9]*) fail "cannot read the number of GPUs per node from '$gpus'; give sbatch --gpus-per-node COUNT" ;; esac
nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
cpus=$((${SLURM_CPUS_ON_NODE:-gpus} / gpus)) # by default a task has one core, too few for its loaders
[ "$cpus" -gt 0 ] || cpus=1
unset SLURM_CPUS_PER_GPU # srun refuses it together with --cpus-per-task

terminated=""
trap 'terminated=1' TERM # keep this shell running until the tasks have saved
status=0
srun --nodes="$nodes" --ntasks=$((nodes * gpus)) --ntasks-per-node="$gpus" --cpus-per-task="$cpus" --kill-on-bad-exit=1 \
    bash -c "$task" task "$mark" "$python" "$@" --resume auto || status=$?
if [ "$status" -eq 0 ] && [ -e "$mark" ]; then
    status=75
fi
rm -f "$mark"

if [ "$status" -eq 75 ] && [ -n "$terminated" ]; then
    echo "slurm.sh: saved; SLURM ends the job, and requeues it if it was preempted"
elif [ "$status" -eq 75 ]; then
    echo "slurm.sh: saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: error: cannot requeue job $SLURM_JOB_ID; submit it again to continue" >&2
fi
exit "$status"
