#!/usr/bin/env bash
# Runs on each worker of a slice, sent there by run.sh: unpacks the tree, installs it, starts the command, and follows
# its log to the end. A command that runs already is followed instead.
#
#   bash worker.sh NAME COMMAND...     with NAME.tar.gz in the same folder
#
# Leaves ~/NAME (the tree) and ~/NAME.{pid,log,status}. The command is in a session of its own, so that a connection
# that breaks does not end it. Ends as the command did; 137 if it was killed before it could say how.
set -euo pipefail
cd "$(dirname "$0")"
name=$1
shift

if ! { [[ -f $name.pid ]] && kill -0 "$(< "$name.pid")" 2> /dev/null; }; then
  rm -rf "$name" "$name.status"
  mkdir "$name"
  tar -C "$name" -xzf "$name.tar.gz"
  # The images come with Python 3.10; uv brings a newer one.
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -d venv ]] || uv venv --quiet --python 3.13 venv
  uv pip install --quiet --python venv/bin/python -e "./$name[tpu,gcs]"
  : > "$name.log" # to be followed at once, whenever the command gets to open it
  PATH="$PWD/venv/bin:$PATH" nohup setsid bash -c \
    'cd "$0" && status=0 && { "$@" || status=$?; } && echo "$status" > "../$0.status"' "$name" "$@" \
    > "$name.log" 2>&1 < /dev/null &
  echo $! > "$name.pid"
fi
tail --pid="$(< "$name.pid")" --lines=+1 --follow "$name.log"
exit "$(cat "$name.status" 2> /dev/null || echo 137)"
