#!/usr/bin/env bash
# Waits until a workload has ended: 0 if it ended well, 1 if the cluster gave it up.
#
#   CLUSTER=mmx ZONE=us-central1-a scripts/xpk/watch.sh first-run
#
# Environment: as place.sh; POLL_SECONDS between two looks, 30 if not set. Its output: kubectl logs, or Cloud Logging.
set -euo pipefail
source "$(dirname "$0")/place.sh"
name=${1:-}
check_name "$name"

if [[ -n ${DRY_RUN:-} ]]; then
  run xpk workload list "${place[@]}" --wait-for-job-completion="$name"
  exit 0
fi
listed "$name" || fail "there is no workload $name in $CLUSTER; scripts/xpk/run.sh $name COMMAND sends one"
if listed "$name" QUEUED; then
  state QUEUED
  while listed "$name" QUEUED; do
    sleep "${POLL_SECONDS:-30}"
  done
fi
state running
status=0
xpk workload list "${place[@]}" --wait-for-job-completion="$name" || status=$?
case $status in
  0) ;;
  125) fail "the workload $name failed; its log says why, and the cluster had started it as often as it may" ;;
  *) again "xpk stopped watching $name ($status)" ;;
esac
