# Sourced by the other scripts here. Sets $name, $log and $status_file, and says whether the job is in the queue.
#
#   LOGS   folder for what jobs print and how they ended, on a disk that all nodes share; runs/slurm if not set
source "$(dirname "${BASH_SOURCE[0]}")/../launching.sh"

name=${1:-}
check_name "$name"
log=${LOGS:-runs/slurm}/$name.log
status_file=${LOGS:-runs/slurm}/$name.status

# 'PENDING', 'RUNNING', ...; nothing for a job that is not in the queue (any more).
job_state() {
  local found
  need_program squeue
  found=$(squeue --noheader --user="$(id -un)" --name="$name" --format=%T) || fail 'squeue could not list the queue'
  echo "${found%%$'\n'*}"
}
