# Sourced by the other scripts here: which cluster, and where. Sets ${place[@]} and ${chips[@]}.
#
#   CLUSTER           name of the GKE cluster
#   ZONE              such as us-central1-a
#   ACCELERATOR_TYPE  v5litepod-16, v5p-128, v6e-256, or one machine of GPUs such as h200-141gb-8
#   PROJECT_ID        gcloud's own if not set
#   SPOT=1            cheaper, and may be taken away at any time
source "$(dirname "${BASH_SOURCE[0]}")/../launching.sh"

need CLUSTER 'the name of a cluster that scripts/xpk/create.sh made'
need ZONE 'such as us-central1-a'
place=(--cluster="$CLUSTER" --zone="$ZONE" ${PROJECT_ID:+--project="$PROJECT_ID"})

describe_chips() {
  need ACCELERATOR_TYPE 'such as v5litepod-16, v5p-128, v6e-256 or h200-141gb-8'
  case $ACCELERATOR_TYPE in
    v[4-6]*) chips=(--tpu-type="$ACCELERATOR_TYPE") ;;
    *) chips=(--device-type="$ACCELERATOR_TYPE" --num-nodes=1) ;; # several find each other under Slurm, not here
  esac
}

# listed NAME [STATUS]: whether the cluster has a workload of that name (QUEUED, RUNNING, FINISHED, ...).
listed() {
  local found
  need_program xpk
  found=$(xpk workload list "${place[@]}" --filter-by-job="$1" --filter-by-status="${2:-EVERYTHING}" < /dev/null) ||
    fail "xpk could not list the workloads of $CLUSTER"
  awk -v name="$1" '$1 == name { found = 1 } END { exit !found }' <<< "$found"
}
