#!/usr/bin/env bash
# Makes a GKE cluster with a slice of TPUs or a machine of GPUs, by XPK. Once; then run.sh sends work to it.
#
#   CLUSTER=mmx ZONE=us-central1-a ACCELERATOR_TYPE=v5litepod-16 scripts/xpk/create.sh
#
# Environment: as place.sh; SLICES for as many runs at a time, 1 if not set; RESERVATION. On demand if neither it nor
# SPOT is set.
set -euo pipefail
source "$(dirname "$0")/place.sh"
describe_chips

if [[ -n ${RESERVATION:-} ]]; then
  capacity=--reservation=$RESERVATION
elif [[ -n ${SPOT:-} ]]; then
  capacity=--spot
else
  capacity=--on-demand
fi
[[ ${chips[0]} == --device-type=* ]] || chips+=(--num-slices="${SLICES:-1}")
run xpk cluster create "${place[@]}" "${chips[@]}" "$capacity"
