# Sourced by test.sh and demo.sh: creates the environment if needed, and sets $root and $python.
#
# The environment is .venv in the checkout, whatever environment is active, so that both scripts share
# one and change no other. It is created with $PYTHON (by default python3), and packages are installed
# again only when the requirements have changed or the checkout has moved. To start over, remove .venv.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

# An incomplete environment, left by an interrupted run, has no pip yet; creating it again completes it.
if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=${PYTHON:-python3}
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Error: $base: no Python 3.10 or newer; name one with: PYTHON=/path/to/python3 bash $0" >&2
        exit 1
    fi
    echo "Creating $root/.venv ..."
    if ! "$base" -m venv "$root/.venv"; then
        echo "Error: could not create $root/.venv; on Debian and Ubuntu, install python3-venv first" >&2
        exit 1
    fi
fi

wanted=$(cat "$root/setup.cfg" "$root/setup.py" && echo "$root")
stamp=$root/.venv/installed-from
if [[ ! -f $stamp || $wanted != "$(<"$stamp")" ]]; then
    echo "Installing into $root/.venv (the first time this downloads a few GB) ..."
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$root[test,dev]"
    echo "$wanted" >"$stamp"
fi
