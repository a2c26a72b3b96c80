#!/usr/bin/env bash
# Takes a job out of the queue, or ends it if it runs: SIGTERM, upon which mmx.train saves.
#
#   scripts/slurm/delete.sh first-run
set -euo pipefail
source "$(dirname "$0")/place.sh"

run scancel --user="$(id -un)" --name="$name"
