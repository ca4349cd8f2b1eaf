# Sourced by scripts/quickstart and scripts/test: makes .venv once, reuses it, and activates it.
# Usage: . scripts/environment.sh EXTRAS

python=$(command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3 || true)
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed, and none was found." >&2
    exit 1
fi

stamp=".venv/installed-$1-$(cksum pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "Setting up .venv (once; about a minute and 1.5 GB) ..." >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # This release first, so that the range in pyproject.toml does not fetch a CUDA build of several GB.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
fi
. .venv/bin/activate
