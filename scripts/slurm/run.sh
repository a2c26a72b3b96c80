#!/usr/bin/env bash
# Sends a command to Slurm as a job (run.sbatch), unless one of that name waits or runs already.
#
#   NODES=4 scripts/slurm/run.sh first-run python -m mmx.train --config=... --workdir=/shared/moe
#
# Environment: as place.sh; NODES, 1 if not set; and sbatch's own SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT.
set -euo pipefail
source "$(dirname "$0")/place.sh"
shift
(($#)) || fail "what shall run? Such as: scripts/slurm/run.sh $name python -m mmx.train --config=..."
[[ ${NODES:-1} =~ ^[1-9][0-9]*$ ]] || fail "NODES=$NODES: expected a whole number, at least 1"

if [[ -z ${DRY_RUN:-} ]]; then
  found=$(job_state)
  if [[ -n $found ]]; then
    state "$found"
    exit 0
  fi
  mkdir -p "$(dirname "$log")"
  rm -f "$status_file"
fi
run sbatch --job-name="$name" --nodes="${NODES:-1}" --output="$log" \
  --export=ALL,MMX_STATUS_FILE="$(realpath -m "$status_file")" "$(dirname "$0")/run.sbatch" "$@"
