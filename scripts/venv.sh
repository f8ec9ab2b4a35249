# Creates or updates the project's virtual environment and puts it first on PATH. The other scripts source it:
#
#   source scripts/venv.sh requirements.txt        # what the package needs
#   source scripts/venv.sh requirements-dev.txt    # and what tests and linters need
#
# The environment is .venv at the repository root, or DINOBLOOM_VENV (a relative path counts from the root). PYTHON names
# the interpreter to create it with (default: python3). pip runs only if the requirement files, setup.py, the Python
# version or the repository's path changed since its last success, which a file in the environment records.

_dinobloom_require_python() { # interpreter
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "scripts/venv.sh: need Python 3.10 or newer, found $("$1" --version 2>&1) at $1;" \
            "set PYTHON to another one, and remove an environment that was made from the old one" >&2
        return 1
    }
}

_dinobloom_is_installed() { # environment, requirements file, wanted state
    [[ -f $1/.installed-$2 && $(<"$1/.installed-$2") == "$3" ]]
}

_dinobloom_pip_install() { # interpreter, arguments of pip install
    "$1" -m pip install -qq --disable-pip-version-check "${@:2}" || {
        echo "scripts/venv.sh: pip failed (see above); check network, proxy and disk space, then run the same again." \
            "To see all that pip says: '$1' -m pip install ${*:2}" >&2
        return 1
    }
}

_dinobloom_venv() { # requirements file
    local requirements=${1:-} root venv python base state started
    case $requirements in
        requirements.txt | requirements-dev.txt) ;;
        *)
            echo "scripts/venv.sh: its argument is requirements.txt or requirements-dev.txt, found '$requirements'" >&2
            return 1
            ;;
    esac
    root=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || return 1
    venv=${DINOBLOOM_VENV:-.venv}
    [[ $venv == /* ]] || venv=$root/$venv
    python=$venv/bin/python

    if ! "$python" -c 'import pip' 2>/dev/null; then # missing, incomplete, or without its interpreter
        base=$(command -v "${PYTHON:-python3}") || {
            echo "scripts/venv.sh: no '${PYTHON:-python3}' on PATH; install Python 3.10 or newer or set PYTHON" >&2
            return 1
        }
        _dinobloom_require_python "$base" || return 1
        echo "Making a virtual environment in $venv"
        "$base" -m venv "$venv" || return 1
    fi
    _dinobloom_require_python "$python" || return 1

    state=$(cd "$root" && "$python" -c '
import hashlib, os, sys
digest = hashlib.sha256(repr((os.getcwd(), sys.version_info[:2])).encode())
for name in ("requirements.txt", "requirements-dev.txt", "setup.py"):
    with open(name, "rb") as file:
        digest.update(file.read())
print(digest.hexdigest())') || return 1
    if ! _dinobloom_is_installed "$venv" "$requirements" "$state"; then
        echo "Installing $requirements into $venv; the first time takes 2 to 10 minutes (PyTorch is 3 GB)"
        started=$SECONDS
        _dinobloom_pip_install "$python" --requirement "$root/$requirements" || return 1
        if ! _dinobloom_is_installed "$venv" requirements.txt "$state"; then
            _dinobloom_pip_install "$python" --no-deps --editable "$root" || return 1
        fi
        echo "$state" >"$venv/.installed-requirements.txt" # requirements-dev.txt includes it
        echo "$state" >"$venv/.installed-$requirements"
        echo "Installed in $((SECONDS - started)) s"
    fi

    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    unset PYTHONHOME
    hash -r
}

_dinobloom_venv "${1:-}"
