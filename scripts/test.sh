#!/usr/bin/env bash
# Lint, types and tests. Arguments go to pytest:
#
#     scripts/test.sh -k store
#
# The tests run in two processes, since many of them wait for processes that they start; -n 0 runs them in one.
#
# The environment is .venv in the checkout, created on the first run (see venv.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

cd "$root"
failed=()
"$python" -m ruff check || failed+=("ruff check")
"$python" -m ruff format --check || failed+=("ruff format")
"$python" -m mypy || failed+=("mypy")
# Last, so that the last line shows how many tests passed.
"$python" -m pytest -n 2 --dist worksteal "$@" || failed+=("pytest")

if ((${#failed[@]})); then
    printf 'Failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
