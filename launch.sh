#!/usr/bin/env bash
# One entry for a fresh machine: makes .venv beside this file, installs the package (with CUDA where an NVIDIA GPU is),
# then runs a command of the package with the arguments given. Later calls start at once.
#
#   ./launch.sh train --config configs/quickstart.py
#   ./launch.sh test
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$here/.venv"

fail() {
  echo "launch.sh: $*" >&2
  exit 2
}

usage="usage: ./launch.sh train|evaluate|export|sample|plan|report|prepare|bench|interop|test [arguments]"
command=${1:-}
case "$command" in
train | evaluate | export | sample | plan | report | bench | interop) module=sngpt_jax.$command ;;
prepare) module=sngpt_jax.data.prepare ;;
test) module=pytest ;;
"") fail "$usage" ;;
*) fail "unknown command '$command'; $usage" ;;
esac
shift
path="$here/${module//.//}"
[ "$module" = pytest ] || [ -e "$path.py" ] || [ -e "$path/__main__.py" ] || fail "this version has no command '$command'"

# ------------------------------------------------------------------------------------------------ the environment

extras=()
command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && extras+=(cuda13)
[ "$command" = test ] && extras+=(test)

# What is installed is remembered as the checksum of pyproject.toml and one file for each extra: as long as they are
# there, nothing is asked of pip. Extras once installed stay.
stamp="$venv/.installed-$(cksum <"$here/pyproject.toml" | tr ' ' '-')"
missing=()
[ -e "$stamp" ] || missing+=(base)
for extra in ${extras[@]+"${extras[@]}"}; do
  [ -e "$stamp-$extra" ] || missing+=("$extra")
done

if [ ${#missing[@]} -gt 0 ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "needs Python 3.11 or newer as '$python'; name another with PYTHON=/path/to/python3 ./launch.sh …"
  (
    flock 9 2>/dev/null || true # two first calls at once would install over each other
    wanted=$(IFS=,; echo "${extras[*]-}")
    echo "launch.sh: installing sngpt-jax${wanted:+[$wanted]} into $venv (once)" >&2
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
      fail "could not make a virtual environment at $venv (on Debian and Ubuntu: apt-get install python3-venv)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$here${wanted:+[$wanted]}" >&2 ||
      fail "the installation failed: see pip's message above"
    touch "$stamp"
    for extra in ${extras[@]+"${extras[@]}"}; do touch "$stamp-$extra"; done
  ) 9>"$here/.venv.lock"
fi

# ------------------------------------------------------------------------------------------------ the command

[ "$command" = test ] && cd "$here"
exec "$venv/bin/python" -m "$module" "$@"
