# shellcheck shell=bash
# Shared by all *.sbatch files, which source it. It starts one launcher on each node with srun; then the ledger in the run folder decides how the job ends.
# Needs bash, SLURM, and env of coreutils (8.31 or later keeps early signals; older ones ignore them).
set -euo pipefail

: "${SLURM_JOB_ID:?submit with sbatch, from the repository: sbatch infra/slurm/STAGE.sbatch RUN_FOLDER}"
cd "${LAUNCHER_HOME:-$SLURM_SUBMIT_DIR}"
site=${LAUNCHER_SITE:-infra/slurm/site.env}
set -a
# shellcheck source=infra/slurm/site.env
. "$site"
set +a

# Words before "python" for the chosen runtime, and srun's own options for it.
wrap=() container=()
choose_runtime() {
    case $LAUNCHER_RUNTIME in
        venv)
            [ -x "$LAUNCHER_VENV/bin/python" ] || refuse "LAUNCHER_VENV=$LAUNCHER_VENV: no environment with a bin/python in $PWD on $HOSTNAME; name one that all nodes see."
            PATH=$(cd "$LAUNCHER_VENV" && pwd)/bin:$PATH
            ;;
        apptainer) wrap=(apptainer exec --nv --bind "$PWD${LAUNCHER_MOUNTS:+,$LAUNCHER_MOUNTS}" "$LAUNCHER_IMAGE") ;;
        pyxis) container=("--container-image=$LAUNCHER_IMAGE" "--container-mounts=$PWD:$PWD${LAUNCHER_MOUNTS:+,$LAUNCHER_MOUNTS}" "--container-workdir=$PWD") ;;
        *) refuse "LAUNCHER_RUNTIME=$LAUNCHER_RUNTIME: accepted are venv, apptainer and pyxis." ;;
    esac
    [ "$LAUNCHER_RUNTIME" = venv ] || [ -n "$LAUNCHER_IMAGE" ] || refuse "LAUNCHER_RUNTIME=$LAUNCHER_RUNTIME needs LAUNCHER_IMAGE: a .sif file, a .sqsh file or registry#name@sha256:..."
}

refuse() {
    echo "$1 ($site)" >&2
    exit 78
}

# A signal may come before Python has installed its handler. Blocked, it waits for the handler; ignored (with an old env), it is lost; otherwise it would kill.
early_signals=(env "--block-signal=USR2,TERM,INT")
"${early_signals[@]}" true 2> /dev/null || early_signals=(bash -c 'trap "" USR2 TERM INT; exec "$@"' early)

# run_stage STAGE RUN_FOLDER_OR_PRESET [section.key=value...]
run_stage() {
    choose_runtime
    case ${2:-} in # a relative run folder is meant from the folder of the submission
        '' | /* | *://*) ;;
        *) [ ! -e "$SLURM_SUBMIT_DIR/$2" ] || set -- "$1" "$SLURM_SUBMIT_DIR/$2" "${@:3}" ;;
    esac
    export SLURM_EXPORT_ENV=ALL # for sites with SBATCH_EXPORT=NONE: the tasks need the variables that were read above
    case $1 in # the tasks of an array divide the work of these stages; for any other stage each task is a job of its own (a sweep)
        prepare | encode | generate)
            if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -z "${LAUNCHER_SHARE:-}" ]; then
                export LAUNCHER_SHARE=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))/${SLURM_ARRAY_TASK_COUNT:-0}
            fi
            ;;
    esac
    echo "== $1: job $SLURM_JOB_ID${SLURM_ARRAY_TASK_ID:+ (task $SLURM_ARRAY_TASK_ID)}, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
    trap '' TERM # scancel and requeues send it to this script, too, which must wait for the ranks and give the verdict
    local srun code=0
    # SLURM numbers the steps of every start from 0. Where it had lost a node that was only asleep, the srun there wakes, hears of it, and aborts its step by that
    # number, which would be the next start's: so every second start begins at 1.
    [ $((${SLURM_RESTART_COUNT:-0} % 2)) -eq 0 ] || srun --nodes=1 --ntasks=1 true || true
    # No --wait: a launcher that ends first waits for the others by itself.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --label "${container[@]}" \
        "${early_signals[@]}" "${wrap[@]}" python launcher.py "$@" &
    srun=$!
    trap 'kill -USR2 "$srun" 2> /dev/null || true' USR2 # srun passes USR2 on to its tasks; TERM would kill them
    while :; do # a trap interrupts "wait", so wait again while srun lives
        wait "$srun" || true # after a signal this code is the signal's, not srun's
        kill -0 "$srun" 2> /dev/null || break
    done
    trap '' USR2 # srun has ended
    wait "$srun" || code=$? # bash remembers srun's code
    end "$code" "$@"
}

# end SRUN_CODE STAGE ...: the ledger decides, because srun's code depends on the order in which the nodes ended; that code is only logged.
end() {
    local srun_code=$1 code=0
    shift
    export LAUNCHER_CODE=$srun_code
    srun_verdict "$@" || code=$?
    echo "== $1: srun ended with $srun_code, verdict $code"
    case $code in
        0 | 64 | 65 | 78 | 93) exit "$code" ;;
        75) ;;
        *) # no verdict, perhaps because the file system is gone: counts as a crash, retried as often as the job allows
            [ "${SLURM_RESTART_COUNT:-0}" -lt "${LAUNCHER_RETRIES:-3}" ] || exit "$code"
            ;;
    esac
    # A job that SLURM is ending already stays cancelled (scancel), or is requeued by SLURM (scontrol requeue, a lost node). Any other requeues itself here.
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = COMPLETING ] || superseded || scontrol requeue "$SLURM_JOB_ID"
    exit 75
}

# Whether SLURM had lost contact to this node and has started the job again elsewhere: a requeue from here would end that newer start.
superseded() {
    local restarts
    restarts=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' | head -n 1)
    [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ] && echo "== job $SLURM_JOB_ID runs elsewhere by now (restart $restarts): not requeued from here"
}

srun_verdict() {
    if [ ${#container[@]} -gt 0 ]; then
        srun --nodes=1 --ntasks=1 "${container[@]}" python launcher.py verdict "$@"
    else
        "${wrap[@]}" python launcher.py verdict "$@"
    fi
}
