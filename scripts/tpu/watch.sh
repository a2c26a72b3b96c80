#!/usr/bin/env bash
# Waits until a slice is there and says each change of its state; --once says the state and ends.
#
#   ZONE=us-central1-a scripts/tpu/watch.sh first-run
#   ZONE=us-central1-a scripts/tpu/watch.sh first-run --once
#
# Environment: as place.sh; POLL_SECONDS between two looks, 30 if not set.
set -euo pipefail
source "$(dirname "$0")/place.sh"

if [[ -n ${DRY_RUN:-} ]]; then
  run gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)'
  exit 0
fi
before=
while true; do
  now=$(slice_state)
  [[ $now == "$before" ]] || state "$now"
  before=$now
  case $now in
    ACTIVE) exit 0 ;;
    absent) fail "there is no slice $name in $ZONE; scripts/tpu/create.sh $name asks for one" ;;
    FAILED) fail "the request failed; gcloud compute tpus queued-resources describe $name --zone=$ZONE says why" ;;
    SUSPENDING | SUSPENDED | DELETING | GONE | PREEMPTED | TERMINATED | STOPPING | STOPPED) again "$name is $now" ;;
  esac
  [[ ${2:-} != --once ]] || exit 0
  sleep "${POLL_SECONDS:-30}"
done
