#!/usr/bin/env bash
# Deletes a workload, or with --cluster the whole cluster; only without a cluster nothing is paid for.
#
#   CLUSTER=mmx ZONE=us-central1-a scripts/xpk/delete.sh first-run
#   CLUSTER=mmx ZONE=us-central1-a scripts/xpk/delete.sh --cluster
#
# Environment: as place.sh.
set -euo pipefail
source "$(dirname "$0")/place.sh"

if [[ ${1:-} == --cluster ]]; then
  run xpk cluster delete "${place[@]}" --force
else
  check_name "${1:-}"
  run xpk workload delete --workload="$1" "${place[@]}" --force
fi
