# Sourced by the scripts of scripts/tpu, scripts/xpk and scripts/slurm: what they have in common.
#
# DRY_RUN=1 prints what would be run, one command a line, ready to be pasted, and runs nothing. All end with
#   0   done;
#   1   a person has to mend something, said in one line;
#   75  preempted or cut off: the same command again continues.

fail() {
  echo "error: $*" >&2
  exit 1
}

again() {
  echo "$*" >&2
  exit 75
}

# A line that mmx.sweep and a person find in the log: what the job waits for, or that it is running.
state() {
  echo "state: $*"
}

# need ZONE 'such as us-central1-a': the environment must have it.
need() {
  [[ -n ${!1:-} ]] || fail "$1 is not set: export $1, $2"
}

# XPK allows 28 characters before its own suffixes make a Kubernetes name too long; one rule for all launchers.
check_name() {
  [[ ${1:-} =~ ^[a-z]([-a-z0-9]{0,26}[a-z0-9])?$ ]] ||
    fail "the name of a job is 1 to 28 of a-z, 0-9 and -, from a letter to a letter or digit, found '${1:-}'"
}

# The words as one line of shell: quoted where they must be.
shown() {
  local word line=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  echo "$line"
}

need_program() {
  command -v "$1" > /dev/null || fail "$1 is not on PATH; docs/cloud.md says where it comes from"
}

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    shown "$@"
  else
    need_program "$1"
    "$@"
  fi
}

# pack_tree TREE FILE.tar.gz: what git tracks or would track, without history and what is ignored.
pack_tree() {
  local list=(git -C "$1" ls-files -z --cached --others --exclude-standard)
  local tar=(tar -C "$1" --null --files-from=- --ignore-failed-read -czf "$2")
  if [[ -n ${DRY_RUN:-} ]]; then
    echo "$(shown "${list[@]}") | $(shown "${tar[@]}")"
  else
    "${list[@]}" | "${tar[@]}"
  fi
}
