#!/usr/bin/env bash
# Sends a command and this working tree to a cluster as a workload. One of that name that waits or runs is kept; one
# that has ended is replaced.
#
#   CLUSTER=mmx ZONE=us-central1-a ACCELERATOR_TYPE=v5litepod-16 scripts/xpk/run.sh first-run \
#     python -m mmx.train --config=experiments/moe_ablation.py --workdir=gs://my-bucket/moe
#
# The cluster starts it again when a machine is lost, or it is killed or ends with 75, RESTARTS times (10 if not set),
# and not when it ends with 1. Environment: as place.sh; IMAGE, one that has mmx and the accelerator's jax, instead of
# installing both into BASE_IMAGE (python:3.12 if not set) with this tree.
set -euo pipefail
source "$(dirname "$0")/place.sh"
describe_chips
name=${1:-}
check_name "$name"
shift
(($#)) || fail "what shall run? Such as: scripts/xpk/run.sh $name python -m mmx.train --config=..."

if [[ -z ${DRY_RUN:-} ]]; then
  if listed "$name" FINISHED; then
    run xpk workload delete --workload="$name" "${place[@]}" --force
  elif listed "$name"; then
    state "$name is there already"
    exit 0
  fi
fi

# exec: XPK passes SIGTERM to the shell of the command alone, which must have become mmx.train to save upon it.
command="exec $(shown "$@")"
if [[ -n ${IMAGE:-} ]]; then
  image=(--docker-image="$IMAGE")
else
  extra=tpu
  [[ ${chips[0]} == --tpu-type=* ]] || extra=cuda
  command="pip install --quiet -e '.[$extra,gcs]' && $command"
  image=(--base-docker-image="${BASE_IMAGE:-python:3.12}" --script-dir="$(cd "$(dirname "$0")/../.." && pwd)")
fi
# 300 seconds: mmx.train saves when it is told to stop, and a big checkpoint may take longer than the default, 30.
run xpk workload create --workload="$name" "${place[@]}" "${chips[@]}" "${image[@]}" \
  --max-restarts="${RESTARTS:-10}" --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
  --command="$command"
