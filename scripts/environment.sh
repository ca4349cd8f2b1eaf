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
    pip=".venv/bin/python -m pip --disable-pip-version-check"
    # Of Linux the package index has a build for CUDA, which fetches several GB more. The build for CPUs lies on
    # PyTorch's own index. Without a GPU, the former is never installed unasked.
    torch="torch==2.13.0"
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if [ "$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
            $pip install --quiet "$torch"
        elif ! $pip install --quiet --retries 0 --timeout 10 \
            --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null; then
            if $pip install --quiet --dry-run --no-deps --report - "$torch" 2>/dev/null | .venv/bin/python -c '
import json, sys
needs = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
sys.exit(not any(name.startswith("nvidia") for name in needs))'; then
                echo "PyTorch's build for CPUs cannot be reached at https://download.pytorch.org/whl/cpu, and the" \
                    "one on the package index would fetch several GB of CUDA. Install the one you want with" \
                    "'.venv/bin/python -m pip install torch', and run this again." >&2
                exit 1
            fi
            $pip install --quiet "$torch"
        fi
    fi
    $pip install --quiet --editable ".[$1]"
    touch "$stamp"
fi
. .venv/bin/activate
