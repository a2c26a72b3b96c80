#!/usr/bin/env bash
# Deletes a slice and its request, whatever runs there; from then on it costs nothing. What was written to gs:// stays.
#
#   ZONE=us-central1-a scripts/tpu/delete.sh first-run
#
# Environment: as place.sh.
set -euo pipefail
source "$(dirname "$0")/place.sh"

found=unknown
[[ -n ${DRY_RUN:-} ]] || found=$(slice_state)
[[ $found != absent ]] || exit 0
run gcloud compute tpus queued-resources delete "$name" --force "${place[@]}"
