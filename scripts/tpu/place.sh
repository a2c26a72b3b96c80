# Sourced by the other scripts here: which slice, and where. Sets $name, ${place[@]} and, for create.sh, ${slice[@]}.
#
#   ZONE              such as us-central1-a
#   ACCELERATOR_TYPE  v5litepod-8 (v5e and v6e count chips), v5p-128 (v5p and v4 count cores, two a chip), v6e-256
#   PROJECT_ID        gcloud's own if not set
#   RUNTIME_VERSION   by the chip if not set
#   SPOT=1            cheaper, and may be taken away at any time
source "$(dirname "${BASH_SOURCE[0]}")/../launching.sh"

name=${1:-}
check_name "$name"
need ZONE 'such as us-central1-a'
place=(--zone="$ZONE" ${PROJECT_ID:+--project="$PROJECT_ID"} --quiet)

describe_slice() {
  need ACCELERATOR_TYPE 'such as v5litepod-8, v5p-128 or v6e-256'
  local runtime
  case $ACCELERATOR_TYPE in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: known are v4-N, v5litepod-N, v5p-N and v6e-N" ;;
  esac
  [[ ${ACCELERATOR_TYPE##*-} =~ ^[1-9][0-9]*$ ]] || fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: ends in no size"
  slice=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="${RUNTIME_VERSION:-$runtime}" ${SPOT:+--spot})
}

# One word: 'absent'; the state of the request until the slice is there (WAITING_FOR_RESOURCES, PROVISIONING, FAILED,
# SUSPENDED, ...); then ACTIVE, or what became of its machines (PREEMPTED, TERMINATED, ...).
slice_state() {
  local request node errors tpus=(gcloud compute tpus)
  need_program gcloud
  errors=$(mktemp)
  if request=$("${tpus[@]}" queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2> "$errors")
  then
    if [[ $request == ACTIVE ]]; then
      node=$("${tpus[@]}" tpu-vm describe "$name" "${place[@]}" --format='value(state)' 2> "$errors") || node=GONE
      [[ $node == READY ]] || request=$node
    fi
  elif grep -q NOT_FOUND "$errors"; then
    request=absent
  else
    cat "$errors" >&2
    rm -f "$errors"
    fail "gcloud could not say the state of $name"
  fi
  rm -f "$errors"
  echo "$request"
}
