#!/usr/bin/env bash
# Runs the tests on every Python found, each in a fresh virtual environment with the newest packages pip gives it.
#
#   scripts/test_matrix.sh                                3.11 and newer, on PATH and under ~/.pyenv/versions
#   scripts/test_matrix.sh python3.12 /opt/python3.13     these
#   scripts/test_matrix.sh -- tests/data -x               what follows -- goes to pytest
#
# Tests a copy of the working tree as it is, so that installations do not disturb each other. Ends with a table, and
# with status 1 if anything failed; needs about 1.5 GB of temporary space (TMPDIR) for one environment at a time.
set -euo pipefail

pythons=()
while (($#)) && [[ $1 != -- ]]; do
  pythons+=("$1")
  shift
done
(($#)) && shift
pytest_arguments=("$@")

unset PYTHONPATH VIRTUAL_ENV
tree=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# '3.12.1', or nothing if it does not run (a pyenv shim may not) or is too old.
version_of() {
  "$1" -c 'import sys; sys.version_info >= (3, 11) and print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null || true
}

# One interpreter for each minor version, PATH before pyenv.
find_pythons() {
  local minor candidate
  for minor in {11..19}; do
    for candidate in "$(command -v "python3.$minor")" ~/.pyenv/versions/"3.$minor".*/bin/python; do
      if [[ -n $(version_of "$candidate") ]]; then
        echo "$candidate"
        break
      fi
    done
  done
}

copy_tree() {
  mkdir "$1"
  git -C "$tree" ls-files -z --cached --others --exclude-standard |
    tar -C "$tree" --null --files-from=- --ignore-failed-read -cf - 2> /dev/null | tar -C "$1" -xf -
}

# Appends a row to the table; everything said on the way goes to $log.
test_with() {
  local python=$1 version log=$scratch/log jax=- result began=$SECONDS status=0
  version=$(version_of "$python")
  if [[ -z $version ]]; then
    row "$python" - 'does not run, or is older than 3.11' 0
    return 1
  fi
  echo "Python $version: installing and testing ..." >&2
  copy_tree "$scratch/tree"
  {
    "$python" -m venv "$scratch/venv" &&
      (cd "$scratch/tree" && "$scratch/venv/bin/python" -m pip install --quiet -e '.[test]')
  } > "$log" 2>&1 || status=1
  if ((status)); then
    result='installation failed'
  else
    jax=$("$scratch/venv/bin/python" -c 'import importlib.metadata as m; print(m.version("jax"))')
    (cd "$scratch/tree" && "$scratch/venv/bin/python" -m pytest "${pytest_arguments[@]}") > "$log" 2>&1 || status=1
    result=$(tail -n 1 "$log" | sed -E 's/^=+ //; s/ =+$//; s/ in [0-9.]+s.*//')
  fi
  ((status)) && tail -n 40 "$log" >&2
  row "$version" "$jax" "${result:-nothing said}" "$((SECONDS - began))"
  rm -rf "$scratch/tree" "$scratch/venv"
  return "$status"
}

table=$scratch/table
row() {
  printf '%-10s %-10s %-48s %s\n' "$@" >> "$table"
}

((${#pythons[@]})) || mapfile -t pythons < <(find_pythons)
((${#pythons[@]})) || { echo 'error: found no Python 3.11 or newer; name one as an argument' >&2; exit 1; }
row python jax result seconds
failed=0
for python in "${pythons[@]}"; do
  test_with "$python" || failed=1
done
cat "$table"
exit "$failed"
