#!/usr/bin/env bash
# The entry for a fresh machine. It makes .venv beside this file and installs the package, with CUDA if the machine has
# an NVIDIA GPU. It then runs a command of the package with the given arguments. Later calls start at once.
#
#   ./launch.sh train --config configs/quickstart.py
#   ./launch.sh test
#   srun ./launch.sh train --config cayley_large_3l     # in a Slurm job: one process per task (docs/clusters.md)
#   ./launch.sh train … --coordinator node1:12345 --process-id 1 --num-processes 2     # on every node, each with its number
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$here/.venv"

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

usage="usage: ./launch.sh prepare|train|evaluate|audit|export|sample|plan|features|report|bench|interop|docs|test [arguments]"
command=${1:-}
case "$command" in
prepare | train | evaluate | audit | export | sample | plan | features | report | bench | interop) module=sngpt_jax.$command ;;
test) module=pytest ;;
docs) module=mkdocs ;; # build, serve
-h | --help | help)
  echo "$usage"
  echo "./launch.sh COMMAND --help explains the options of a command; docs/index.md lists the documentation"
  exit
  ;;
"") fail "$usage" ;;
*) fail "unknown command '$command'; $usage" ;;
esac
shift
path="$here/${module//.//}"
case "$command" in
test | docs) ;;
*) [ -e "$path.py" ] || [ -e "$path/__main__.py" ] || fail "this version has no command '$command'" ;;
esac

# ------------------------------------------------------------------------------------------------ the environment

wanted=(base)
case "$(nvidia-smi -L 2>/dev/null || true)" in *GPU*) wanted+=(cuda13) ;; esac
case "$command" in test | docs) wanted+=("$command") ;; esac
if [ "$command" = evaluate ] || [ "$command" = audit ]; then # every cache's name begins with another letter than none's
  case " $* " in *" --tasks"[=\ ]* | *" --ngram"[=\ ][!n]*) wanted+=(eval) ;; esac
fi
if [[ "$command $* " == plan*" --topology"* || "$command $* " == plan*" --kernels"* || "$command $* " == "bench compiled "* ]]; then
  [[ " ${wanted[*]} " == *" cuda13 "* ]] || wanted+=(cuda13) # compiles for GPUs, also on a machine without one
fi
if [ "$command" = prepare ]; then
  case " $* " in *" hub:"* | *" golf "* | *" golf:"*) wanted+=(hub) ;; esac
  case " $* " in *" --executor"[=\ ]local* | *" --executor"[=\ ]slurm*) wanted+=(datatrove) ;; esac
fi

if [ "$command" = bench ] && [[ " $* " == *" --against torch "* || " $* " == *" --against=torch "* ]]; then
  wanted+=(torch)
elif [ "$command" = bench ] && [ "${1:-}" = first-light ] && [[ " $* " != *" --pack"* && " $* " != *" --device"[=\ ]cpu* ]]; then
  wanted+=(torch)
fi

# One file per installed part records the installation. Its name depends on the place of this checkout and on its
# pyproject.toml. While all files of the wanted parts exist, the script does not call pip.
stamp="$venv/.installed-$( (cat "$here/pyproject.toml" && echo "$here") | cksum | cut -d ' ' -f 1)"

is_installed() { # succeeds if no wanted part is missing
  "$venv/bin/python" -c '' 2>/dev/null || return 1
  for part in "${wanted[@]}"; do [ -e "$stamp-$part" ] || return 1; done
}

install() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "needs Python 3.11 or newer as '$python'; name another with PYTHON=/path/to/python3 ./launch.sh …"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # there is none, it is half made, or its Python is gone
    "$python" -m venv --clear "$venv" ||
      fail "could not make a virtual environment at $venv (on Debian and Ubuntu: apt-get install python3-venv)"
  fi
  [ -e "$stamp-base" ] || rm -f "$venv"/.installed-* # they belong to another pyproject.toml or another place
  extras=$(IFS=,; echo "${wanted[*]:1}")
  echo "launch.sh: installing sngpt-jax${extras:+[$extras]} into $venv (once)" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$here${extras:+[$extras]}" >&2 ||
    fail "the installation failed: see pip's message above"
  for part in "${wanted[@]}"; do : >"$stamp-$part"; done
}

if ! is_installed; then
  python=${PYTHON:-python3}
  # Two first calls at once, such as the tasks of a Slurm step, would overwrite each other's installation. The lock prevents it.
  exec 9>"$here/.venv.lock"
  command -v flock >/dev/null && flock 9
  is_installed || install
  exec 9>&-
fi

# ------------------------------------------------------------------------------------------------ the command

case "$command" in test | docs) cd "$here" ;; esac
# a process per core, and a file's tests in one process, so that they share what they make
[ "$command" != test ] || [ $# -gt 0 ] || set -- -n auto --dist loadfile
exec "$venv/bin/python" -m "$module" "$@"
