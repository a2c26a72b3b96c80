#!/usr/bin/env bash
# Waits until a job has left the queue and ends as its command did; with 75 if the job was taken away before.
#
#   scripts/slurm/watch.sh first-run
#
# Environment: as place.sh; POLL_SECONDS between two looks, 30 if not set.
set -euo pipefail
source "$(dirname "$0")/place.sh"

if [[ -n ${DRY_RUN:-} ]]; then
  run squeue --noheader --user="$(id -un)" --name="$name" --format=%T
  exit 0
fi
before=
while true; do
  now=$(job_state)
  [[ -n $now ]] || break
  [[ $now == "$before" ]] || state "${now/#RUNNING/running}"
  before=$now
  sleep "${POLL_SECONDS:-30}"
done
[[ ! -f $log ]] || tail --lines=20 "$log"
[[ -f $status_file ]] || again "$name left the queue without an exit status: preempted, out of time or cancelled"
exit "$(< "$status_file")"
