#!/usr/bin/env bash
# Copies this working tree to every worker of a slice, runs a command there and shows what it prints, to the end.
#
#   ZONE=us-central1-a scripts/tpu/run.sh first-run python -m mmx.train --config=experiments/moe_ablation.py \
#     --workdir=gs://my-bucket/moe
#
# What is started outlives this connection: the same command again attaches to it (worker.sh). Ends as the command did;
# with 75 where the slice was taken away or the connection broke. Environment: as place.sh.
set -euo pipefail
source "$(dirname "$0")/place.sh"
shift
(($#)) || fail "what shall run on $name? Such as: scripts/tpu/run.sh $name python -m mmx.train --config=..."

tree=$(cd "$(dirname "$0")/../.." && pwd)
packed=${TMPDIR:-/tmp}/$name.tar.gz
worker=(bash worker.sh "$name" "$@")

pack_tree "$tree" "$packed"
status=0
run gcloud compute tpus tpu-vm scp "$packed" "$tree/scripts/tpu/worker.sh" "$name:" --worker=all "${place[@]}" ||
  status=$?
if ((status == 0)); then
  [[ -n ${DRY_RUN:-} ]] || state running
  run gcloud compute tpus tpu-vm ssh "$name" --worker=all "${place[@]}" --command="$(shown "${worker[@]}")" ||
    status=$?
fi
[[ -n ${DRY_RUN:-} ]] || rm -f "$packed"
((status)) || exit 0

now=$(slice_state)
[[ $now == ACTIVE ]] || again "$name is $now; the command ended with $status"
((status == 255)) && again "the connection to $name broke; the command goes on there"
exit "$status"
