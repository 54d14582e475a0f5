# shellcheck shell=bash
# What all *.sbatch files share; they source it. One launcher for each node under srun, then a verdict by the ledger in the run folder.
# Needs bash, SLURM, and env of coreutils (8.31 or later keeps early signals; older ones ignore them).
set -euo pipefail

: "${SLURM_JOB_ID:?submit with sbatch, from the repository: sbatch infra/slurm/STAGE.sbatch RUN_FOLDER}"
cd "${LAUNCHER_HOME:-$SLURM_SUBMIT_DIR}"
set -a
# shellcheck source=infra/slurm/site.env
. "${LAUNCHER_SITE:-infra/slurm/site.env}"
set +a

# Words before "python" for the chosen runtime, and srun's own options for it.
wrap=() container=()
choose_runtime() {
    case $LAUNCHER_RUNTIME in
        venv) PATH=$(cd "$LAUNCHER_VENV" && pwd)/bin:$PATH ;;
        apptainer) wrap=(apptainer exec --nv --bind "$PWD${LAUNCHER_MOUNTS:+,$LAUNCHER_MOUNTS}" "$LAUNCHER_IMAGE") ;;
        pyxis) container=("--container-image=$LAUNCHER_IMAGE" "--container-mounts=$PWD:$PWD${LAUNCHER_MOUNTS:+,$LAUNCHER_MOUNTS}" "--container-workdir=$PWD") ;;
        *)
            echo "LAUNCHER_RUNTIME=$LAUNCHER_RUNTIME: accepted are venv, apptainer and pyxis (infra/slurm/site.env)." >&2
            exit 78
            ;;
    esac
}

# A signal may come before Python has a handler: blocked, it waits for one; ignored (an old env), it is lost; by default, it would kill.
early_signals=(env "--block-signal=USR2,TERM,INT")
"${early_signals[@]}" true 2> /dev/null || early_signals=(bash -c 'trap "" USR2 TERM INT; exec "$@"' early)

# run_stage STAGE RUN_FOLDER_OR_PRESET [section.key=value...]
run_stage() {
    choose_runtime
    case ${2:-} in # a run folder by hand, as it was named where it was submitted
        '' | /* | *://*) ;;
        *) [ ! -e "$SLURM_SUBMIT_DIR/$2" ] || set -- "$1" "$SLURM_SUBMIT_DIR/$2" "${@:3}" ;;
    esac
    export SLURM_EXPORT_ENV=ALL # sites with SBATCH_EXPORT=NONE: what was read above is for the tasks, too
    case $1 in # the tasks of an array divide the work of these; any other stage takes a task of a sweep for a job of its own
        prepare | encode | generate)
            if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ -z "${LAUNCHER_SHARE:-}" ]; then
                export LAUNCHER_SHARE=$((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}))/${SLURM_ARRAY_TASK_COUNT:-0}
            fi
            ;;
    esac
    echo "== $1: job $SLURM_JOB_ID${SLURM_ARRAY_TASK_ID:+ (task $SLURM_ARRAY_TASK_ID)}, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
    trap '' TERM # scancel and requeues send it here too; the ranks have theirs, and the verdict waits for them
    local srun code=0
    # The number of nodes is the job's own, also where an array task has one. No --wait: the first node to end waits for the others by itself.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --label "${container[@]}" \
        "${early_signals[@]}" "${wrap[@]}" python launcher.py "$@" &
    srun=$!
    trap 'kill -USR2 "$srun" 2> /dev/null || true' USR2 # srun passes USR2 on to its tasks; TERM would kill them
    while :; do # a trap interrupts wait
        wait "$srun" || true # a signal ends this with its own code, which says nothing of srun
        kill -0 "$srun" 2> /dev/null || break
    done
    trap '' USR2 # there is nobody left to pass it on to
    wait "$srun" || code=$? # bash keeps srun's
    end "$code" "$@"
}

# end SRUN_CODE STAGE ...: what the ledger says decides, in whatever order the nodes ended; srun's code is only for the log.
end() {
    local srun_code=$1 code=0
    shift
    export LAUNCHER_CODE=$srun_code
    srun_verdict "$@" || code=$?
    echo "== $1: srun ended with $srun_code, verdict $code"
    case $code in
        0 | 64 | 65 | 78 | 93) exit "$code" ;;
        75) ;;
        *) # no verdict (the file system is away?): a crash, retried as often as the job allows
            [ "${SLURM_RESTART_COUNT:-0}" -lt "${LAUNCHER_RETRIES:-3}" ] || exit "$code"
            ;;
    esac
    # What SLURM is ending already stays cancelled (scancel), or is requeued by SLURM (scontrol requeue, a lost node): a running job requeues itself.
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = COMPLETING ] || superseded || scontrol requeue "$SLURM_JOB_ID"
    exit 75
}

# Whether SLURM, which has lost this node, has started the job again elsewhere: it would be the newer start that a requeue ends.
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
