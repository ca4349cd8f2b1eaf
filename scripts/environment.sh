# Sourced by scripts/quickstart and scripts/test: makes .venv once, reuses it, and activates it.
# Usage: . scripts/environment.sh EXTRAS

python=
for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
    # Tried by running it: a version manager's stub may be there without its Python.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
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
