#!/usr/bin/env bash
# Run a script with every combination of some options, and print the table of the results.
#
#   tools/sweep.sh [--jobs N] [--gpus-per-run N] [--slurm "OPTIONS"] [--list] OUT SCRIPT GRID... -- OPTIONS...
#   tools/sweep.sh sweep main_semisup.py "--lr-backbone 0.01 0.02 0.05" "--train-percent 1 10" -- \
#     --weights finetune --epochs 30 --pretrained CKPT DIR
#
# Each GRID is one word in quotes: an option and its values, or alternatives of several words with | between them:
#   "--lr 0.1 0.3"                                                    two values
#   "--train-percent 1 --epochs 60 | --train-percent 10 --epochs 30"  options that change together
#   "--cos | --schedule 60 80"                                        a switch, or an option with two values
#   "--mlp |"                                                         with and without a switch
# A value with a space is quoted inside the word: "--data 'my photos' 'other photos'". OPTIONS are the same for all runs.
#
# OUT/NAME is the folder of a run, named by its values: lr-backbone=0.01,train-percent=1. OUT/logs/NAME.log has its output.
# Stop the sweep (Ctrl-C, TERM) and start it again as often as you like: finished runs are skipped, and the others continue with
# --resume auto if the script has it. The grid may grow. Sweeps of one OUT may run at the same time, on several machines with a
# shared file system: each takes the runs that no other sweep has taken.
#
#   --jobs N          runs at a time: by default one for each GPU (see --gpus-per-run), or 1 without GPUs
#   --gpus-per-run N  GPUs of a run: by default 1, or all with --multiprocessing-distributed. CUDA_VISIBLE_DEVICES limits them
#   --slurm "OPTIONS" submit an array job with these options of sbatch; --jobs N limits how many of its tasks run at a time
#   --list            print the state and the name of each run, and start nothing
#   PYTHON=python     environment variable: the interpreter
#
# Exit status: 0 all have finished; 1 some have failed; 2 a mistake; 75 stopped, or other sweeps still run some.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}

fail() {
    echo "sweep.sh: error: $1" >&2
    exit 2
}

usage() {
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
}

# ---- the command line

given=("$@") jobs="" gpus_per_run="" slurm="" submits="" lists="" index="" position=0 out="" script=""
grid=() fixed=()
count_of() { # NAME VALUE
    case $2 in '' | *[!0-9]* | 0*) fail "$1 $2: must be a number from 1 on" ;; esac
}
while [ $# -gt 0 ]; do
    case $1 in
        --jobs | --gpus-per-run | --slurm | --index) [ $# -gt 1 ] || fail "$1: its value is missing" ;;
    esac
    case $1 in
        --help | -h) usage && exit 0 ;;
        --jobs) count_of --jobs "$2" && jobs=$2 && shift ;;
        --gpus-per-run) count_of --gpus-per-run "$2" && gpus_per_run=$2 && shift ;;
        --slurm) submits=1 slurm=$2 && shift ;;
        --index) index=$2 && shift ;; # of the only combination to run, in a task of the array job
        --list) lists=1 ;;
        --) shift && fixed=("$@") && break ;;
        *)
            position=$((position + 1))
            case $position in
                1) out=$1 ;;
                2) script=$1 ;;
                *) grid+=("$1") ;;
            esac
            ;;
    esac
    shift
done
[ $position -ge 2 ] || fail "give OUT, a script and a grid; --help shows an example"
case $out in
    -*) fail "OUT is missing before $out" ;;
    *[!/]*) ;;
    *) fail "OUT '$out': not a folder to write to; is a shell variable not set?" ;;
esac
[ ${#grid[@]} -gt 0 ] || fail "no grid: give an option and its values in one word, such as \"--lr 0.1 0.3\""
[ ${#fixed[@]} -gt 0 ] || fail "no -- and options of the runs after the grid, such as: -- --epochs 30 DIR"
[ -f "$script" ] || script=$here/$script
[ -f "$script" ] || fail "${script#"$here"/}: no such script"
out=${out%/}

refuse_own() { # WORD
    case ${1//_/-} in
        --save-dir | --save-dir=* | --output | --output=* | --tag | --tag=* | --resume | --resume=*)
            fail "$1: leave it out; the sweep gives each run its folder and --resume auto"
            ;;
    esac
}
for word in "${fixed[@]}"; do refuse_own "$word"; done

names=() words=() # of the combinations
# shellcheck source=tools/sweep_grid.sh
. "$here/tools/sweep_grid.sh"
name_combinations "${grid[@]}"
case $index in
    '') ;;
    *[!0-9]*) fail "--index $index: must be a number" ;;
    *) [ "$index" -lt ${#names[@]} ] || fail "--index $index: the grid has ${#names[@]} combinations" ;;
esac

# ---- the state of a run

logs=$out/logs

is_finished() { # NAME
    [ -f "$out/$1/results.json" ] || grep -qs '^  "state": "finished"' "$out/$1/status.json"
}

lock() { # NAME: take its lock with descriptor 9, which the run inherits; fail if another sweep or its run has it
    exec 9>>"$logs/.$1.lock" || fail "$logs: cannot be written"
    if command -v flock >/dev/null; then
        flock -n 9
    else
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null
    fi
}

unlock() {
    exec 9>&-
}

state_of() { # NAME -> reply: finished, running, failed, stopped or new
    reply=new
    if is_finished "$1"; then
        reply=finished
    elif [ -e "$logs/.$1.lock" ] && ! lock "$1"; then
        reply=running
    elif [ -f "$logs/$1.failed" ]; then
        reply=failed
    elif [ -f "$logs/$1.log" ]; then
        reply=stopped
    fi
    unlock
}

chosen=() # the combinations that this command runs
for ((i = 0; i < ${#names[@]}; i++)); do
    [ -n "$index" ] && [ "$i" != "$index" ] || chosen+=("$i")
done

if [ -n "$lists" ]; then
    for i in "${chosen[@]}"; do
        state_of "${names[i]}"
        printf '%-8s  %s\n' "$reply" "$out/${names[i]}"
    done
    exit 0
fi
mkdir -p "$logs" || exit 2
[ -w "$logs" ] || fail "$logs: cannot be written; choose another OUT"

# ---- submit

if [ -n "$submits" ]; then
    command -v sbatch >/dev/null || fail "--slurm: this machine has no sbatch"
    list=""
    for i in "${chosen[@]}"; do
        is_finished "${names[i]}" || list+=${list:+,}$i
    done
    [ -n "$list" ] || { echo "all ${#chosen[@]} combinations have finished" && exit 0; }
    rest=() skip=""
    for word in "${given[@]}"; do # the same command, without --slurm and --jobs before the --
        case $skip$word in
            --) skip=all ;;
            --slurm | --jobs) skip=value && continue ;;
        esac
        [ "$skip" != value ] || { skip="" && continue; }
        rest+=("$word")
    done
    quote "$here/tools/sweep.sh" --index
    command=$reply
    quote "${rest[@]}"
    {
        echo "#!/usr/bin/env bash"
        echo "#SBATCH --job-name=sweep"
        echo "#SBATCH --array=$list${jobs:+%$jobs}"
        printf '#SBATCH --output="%s/slurm-%%A_%%a.out"\n' "$logs"
        echo "#SBATCH --open-mode=append"
        echo "#SBATCH --requeue"
        echo "#SBATCH --signal=B:USR1@120"
        printf 'cd %q\n' "$PWD"
        # shellcheck disable=SC2016 # expands in the job
        printf 'PYTHON=%q exec %s"$SLURM_ARRAY_TASK_ID" %s\n' "$python" "$command" "$reply"
    } >"$out/sweep.sbatch"
    # shellcheck disable=SC2086 # several options in one word
    sbatch $slurm "$out/sweep.sbatch" || fail "sbatch has refused $out/sweep.sbatch"
    echo "watch the runs: $python $here/tools/status.py $out --watch 60"
    echo "afterwards: $python $here/tools/collect.py $out"
    exit 0
fi

# ---- run

distributed=""
for word in "${fixed[@]}" "${grid[@]}"; do
    case ${word//_/-} in --multiprocessing-distributed*) distributed=1 ;; esac
done
gpus=()
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    [ "$CUDA_VISIBLE_DEVICES" = -1 ] || IFS=', ' read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
elif command -v nvidia-smi >/dev/null; then
    while read -r gpu; do gpus+=("$gpu"); done < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
fi
if [ -n "$gpus_per_run" ] && [ "$gpus_per_run" -gt ${#gpus[@]} ]; then
    fail "--gpus-per-run $gpus_per_run: this machine has ${#gpus[@]} GPUs"
fi
[ -n "$gpus_per_run" ] || [ -z "$distributed" ] || gpus_per_run=${#gpus[@]}
[ -n "$gpus_per_run" ] && [ "$gpus_per_run" -gt 0 ] || gpus_per_run=1
sets=$((${#gpus[@]} / gpus_per_run)) # of GPUs that runs do not share
[ -n "$jobs" ] || jobs=$((sets > 0 ? sets : 1))
[ "$jobs" -le ${#chosen[@]} ] || jobs=${#chosen[@]}
if [ "$sets" -eq 0 ] && [ "$jobs" -gt 1 ] && [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    export OMP_NUM_THREADS=$((cores > jobs ? cores / jobs : 1))
fi

resume=()
if "$python" "$script" --help 2>/dev/null | grep -q -e '--resume'; then resume=(--resume auto); fi
quote "${fixed[@]}"
all=$reply began=$logs/.began-$$
: >"$began" # failures that are newer are of this sweep, or of one that runs at the same time
trap 'rm -f "$began"' EXIT

run() { # I SLOT: run a combination, unless it has finished, has failed meanwhile, or another sweep has taken it
    local name=${names[$1]} status start last command visible=() more
    is_finished "$name" && return
    lock "$name" || { unlock && return; }
    if is_finished "$name" || [ "$logs/$name.failed" -nt "$began" ]; then
        unlock
        return
    fi
    rm -f "$logs/$name.failed"
    eval "more=(${words[$1]} $all)" # both were quoted with printf %q
    command=("$script" "${more[@]}" --save-dir "$out/$name" ${resume[@]+"${resume[@]}"})
    start=$SECONDS
    if [ "$sets" -gt 0 ] && [ -z "$index" ]; then
        visible=("${gpus[@]:$2 % sets * gpus_per_run:gpus_per_run}")
        more=$(IFS=, && echo "${visible[*]}")
        echo "$name: started on GPU $more"
        export CUDA_VISIBLE_DEVICES=$more
    else
        echo "$name: started"
    fi
    quote "$python" "${command[@]}"
    echo "\$ $reply" >>"$logs/$name.log"
    "$python" "${command[@]}" </dev/null >>"$logs/$name.log" 2>&1 &
    child=$!
    [ -z "$stopping" ] || kill -s "$stopping" "$child" 2>/dev/null || true
    while
        status=0 && signalled=""
        wait "$child" || status=$?
        [ -n "$signalled" ]
    do :; done
    child=""
    if [ "$status" -eq 0 ] && is_finished "$name"; then
        echo "$name: finished after $((SECONDS - start)) s"
    elif [ "$status" -eq 75 ] || [ -n "$stopping" ]; then
        echo "$name: stopped"
    else
        [ "$status" -ne 0 ] || status="0, but without results"
        last=$(tail -c 4096 "$logs/$name.log" | grep -v '^[[:space:]]*$' | tail -n 1 || true)
        echo "exit status $status: $last" >"$logs/$name.failed"
        echo "$name: failed; $logs/$name.log says why"
    fi
    unlock
}

work() { # SLOT: run combinations until none is left
    local i
    child="" stopping="" signalled=""
    for number in TERM USR1; do
        # shellcheck disable=SC2064 # the name of the signal is known now
        trap "stopping=$number signalled=1; [ -z \"\$child\" ] || kill -s $number \"\$child\" 2>/dev/null || true" $number
    done
    trap '' INT HUP # the parent sends TERM instead
    trap - EXIT
    for i in "${chosen[@]}"; do
        [ -z "$stopping" ] || break
        run "$i" "$1"
    done
}

before=0
for i in "${chosen[@]}"; do
    is_finished "${names[i]}" || continue
    before=$((before + 1))
    if last=$(grep -s '^\$ ' "$logs/${names[i]}.log" | tail -n 1) && [[ $last != *" ${words[i]}$all--save-dir "* ]]; then
        echo "${names[i]}: has finished with other options, and is not run again: $last"
    fi
done
echo "$out: ${#chosen[@]} combinations, of which $before have finished; $jobs at a time"

workers=() stopped=""
stop() { # SIGNAL: let the runs save, and wait for them; see the loop below
    stopped=$1
    kill -s "$([ "$1" = USR1 ] && echo USR1 || echo TERM)" "${workers[@]}" 2>/dev/null || true
}
for number in TERM INT HUP USR1; do
    # shellcheck disable=SC2064 # the name of the signal is known now
    trap "stop $number" $number
done
for ((slot = 0; slot < jobs; slot++)); do
    work "$slot" &
    workers+=($!)
    # a signal that came before the worker was in the list
    [ -z "$stopped" ] || stop "$stopped"
done
for pid in "${workers[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
done

# ---- summary

finished=0 failed=() running=() left=()
for i in "${chosen[@]}"; do
    state_of "${names[i]}"
    case $reply in
        finished) finished=$((finished + 1)) ;;
        running) running+=("$i") ;;
        failed) failed+=("$i") ;;
        *) left+=("$i") ;;
    esac
done
if [ -z "$index" ] && [ "$finished" -gt 0 ]; then
    echo
    if ls "$out"/*/results.json >/dev/null 2>&1; then
        "$python" "$here/tools/collect.py" "$out" --out "$out" --force || true
    else
        "$python" "$here/tools/status.py" "$out" || true
    fi
fi
echo "$out: $finished of ${#chosen[@]} combinations have finished, ${#failed[@]} have failed," \
    "${#running[@]} run elsewhere, ${#left[@]} are left"
for i in ${failed[@]+"${failed[@]}"}; do
    echo "failed: ${names[i]}: $(cat "$logs/${names[i]}.failed")"
done
[ -z "$stopped" ] || echo "stopped by $stopped; the same command continues"
if [ "$stopped" = USR1 ] && [ -n "$index" ] && [ -n "${SLURM_JOB_ID:-}" ] && [ ${#left[@]} -gt 0 ]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "sweep.sh: error: cannot requeue job $SLURM_JOB_ID; submit the sweep again" >&2
fi
[ ${#failed[@]} -eq 0 ] || exit 1
[ $((${#left[@]} + ${#running[@]})) -eq 0 ] || exit 75
