#!/bin/sh
# Installs the Debian or Ubuntu packages whose commands are missing. Usage: system.sh demo|test
# Without root (or a sudo that does not ask) it says what is missing and goes on: the demo then uses its own
# stand-in for the PACS and says so, and the tests that need a peer skip and say so.
set -eu

wanted=""
need() { # need COMMAND PACKAGE...
    command=$1
    shift
    PATH="$PATH:/usr/sbin" command -v "$command" >/dev/null 2>&1 || wanted="$wanted $*"
}

need Orthanc orthanc
if [ "${1:-demo}" = test ]; then
    need storescu dcmtk
    need dciodvfy dicom3tools
    command -v node >/dev/null 2>&1 && command -v npm >/dev/null 2>&1 || wanted="$wanted nodejs npm"
fi
"${PYTHON:-python3}" -c 'import ensurepip, venv' >/dev/null 2>&1 || wanted="$wanted python3-venv"

# Triton's Python backend is linked against libpython, which Debian's python3 does without.
"${TRITON_PYTHON:-${PYTHON:-python3}}" - <<'PY' >/dev/null 2>&1 || wanted="$wanted libpython$("${TRITON_PYTHON:-${PYTHON:-python3}}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
import pathlib, sys, sysconfig
name = sysconfig.get_config_var("INSTSONAME") or "absent"
folders = [sysconfig.get_config_var("LIBDIR"), sys.base_prefix + "/lib"]
sys.exit(not any((pathlib.Path(folder) / name).is_file() for folder in folders if folder))
PY

[ -n "$wanted" ] || exit 0

if [ "$(id -u)" = 0 ]; then
    sudo=""
elif sudo -n true >/dev/null 2>&1; then
    sudo="sudo"
else
    echo "scanside: missing packages:$wanted" >&2
    echo "scanside: install them with: sudo apt-get install --no-install-recommends$wanted" >&2
    exit 0
fi

if ! command -v apt-get >/dev/null 2>&1; then
    echo "scanside: no apt-get here; please install:$wanted" >&2
    exit 0
fi

# Debian starts a service when its package is installed. The tests and the demo start their own Orthanc on ports
# of their own; none shall run here because of us.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
    $sudo chmod 755 "$policy"
    trap '$sudo rm -f "$policy"' EXIT
fi
echo "scanside: installing$wanted"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
# shellcheck disable=SC2086
$sudo apt-get install -y -qq --no-install-recommends $wanted >/dev/null
