#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource. One that waits or is there already is kept; what is left of one that was
# preempted or failed is deleted and asked for anew.
#
#   ZONE=us-central1-a ACCELERATOR_TYPE=v5litepod-8 scripts/tpu/create.sh first-run
#
# place.sh lists the environment. Ends at once; watch.sh waits until the slice is there.
set -euo pipefail
source "$(dirname "$0")/place.sh"
describe_slice

found=absent
[[ -n ${DRY_RUN:-} ]] || found=$(slice_state)
case $found in
  absent) ;;
  ACTIVE | CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | STARTING | RESTARTING | REPAIRING)
    state "$found"
    exit 0
    ;;
  *)
    state "$found, asked for anew"
    run gcloud compute tpus queued-resources delete "$name" --force "${place[@]}"
    ;;
esac
run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${slice[@]}" "${place[@]}"
