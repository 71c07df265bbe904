# shellcheck shell=bash
# Sourced by the job scripts beside it: a step that is asked to end before its job is, and is queued again.

# Run a command and end with its exit code. Two signals may reach this shell (#SBATCH --signal=B:USR1@seconds):
#   USR1, before the time limit or a preemption: the command is asked to write a checkpoint, and the job queued again;
#   TERM, by `scancel --batch --signal=TERM`: the command is asked to write a checkpoint, and the job is over.
# The command gets SIGTERM for both: srun, torchrun, `wandb agent --forward-signals` and the scripts pass it on.
# Usage: run_and_requeue WHEN COMMAND...; WHEN is `unfinished`, not queued again where the exit code is 0, or `always`.
run_and_requeue() {
    local when=$1 command_pid code signals=0 seen requeue=no
    shift
    # $! and not a variable: bash runs a trap between two commands, which may be before the variable is set.
    trap 'signals=$((signals + 1)); requeue=yes; kill -TERM "$!" 2>/dev/null' USR1
    trap 'signals=$((signals + 1)); requeue=no; kill -TERM "$!" 2>/dev/null' TERM
    "$@" &
    command_pid=$!
    while true; do
        seen=$signals code=0
        wait "$command_pid" || code=$?
        [ "$signals" = "$seen" ] && break # otherwise it was a signal that ended the waiting
    done
    if [ "$requeue" = yes ] && { [ "$when" = always ] || [ "$code" != 0 ]; }; then
        echo "job $SLURM_JOB_ID: exit code $code after its signal, queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
