#!/bin/sh
# Installs the Debian or Ubuntu packages whose commands are missing. Usage: system.sh venv|demo|test|deploy
# Where it cannot (no root, no network) it says what is missing and goes on: without Orthanc the demo uses a PACS of
# its own and says so, and tests that need a peer skip and say so.
set -eu

python=${PYTHON:-python3}
triton_python=${TRITON_PYTHON:-$python}
needed=""
useful=""
missing() { # missing COMMAND: also looks where Debian puts what root runs
    ! PATH="$PATH:/usr/sbin" command -v "$1" >/dev/null 2>&1
}

"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || needed="$needed python3-venv"
# Triton's Python backend is linked against libpython, which Debian's python3 does without.
"$triton_python" - <<'PY' >/dev/null 2>&1 ||
import pathlib, sys, sysconfig
name = sysconfig.get_config_var("INSTSONAME") or "absent"
folders = [sysconfig.get_config_var("LIBDIR"), sys.base_prefix + "/lib"]
sys.exit(not any((pathlib.Path(folder) / name).is_file() for folder in folders if folder))
PY
    needed="$needed libpython$("$triton_python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"

if [ "${1:-demo}" = demo ] || [ "${1:-demo}" = test ]; then
    missing Orthanc && useful="$useful orthanc"
fi
if [ "${1:-demo}" = test ]; then
    # Orthanc's DICOMweb and the browser in which the tests look at the findings.
    [ -e /usr/share/orthanc/plugins/libOrthancDicomWeb.so ] || useful="$useful orthanc-dicomweb"
    missing chromium && useful="$useful chromium"
    missing storescu && useful="$useful dcmtk"
    missing dciodvfy && useful="$useful dicom3tools"
    missing dcm2niix && useful="$useful dcm2niix"
    missing gdcminfo && useful="$useful libgdcm-tools"
    missing systemd-analyze && useful="$useful systemd"
    missing minisign && useful="$useful minisign"
    if missing node || missing npm; then useful="$useful nodejs npm"; fi
    missing cc && useful="$useful gcc libc6-dev"
fi
if [ "${1:-demo}" = deploy ]; then
    missing systemd-nspawn && useful="$useful systemd-container"
    missing mmdebstrap && useful="$useful mmdebstrap"
    missing ip && useful="$useful iproute2"
    missing mkfs.ext4 && useful="$useful e2fsprogs"
    missing ssh && useful="$useful openssh-client"
    missing Orthanc && useful="$useful orthanc"
fi
[ -n "$needed$useful" ] || exit 0

if [ "$(id -u)" = 0 ]; then
    sudo=""
elif sudo -n true >/dev/null 2>&1; then
    sudo="sudo"
else
    sudo="none"
fi
if [ "$sudo" = none ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "scanside: missing packages:$needed$useful" >&2
    echo "scanside: install them with: sudo apt-get install --no-install-recommends$needed$useful" >&2
    exit 0
fi

# Debian starts a service when its package is installed. The tests and the demo start their own Orthanc on ports
# of their own; none shall run here because of us.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap '$sudo rm -f "$policy"' EXIT
    trap 'exit 130' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
    $sudo chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
echo "scanside: installing$needed$useful"
$sudo apt-get update -qq || echo "scanside: apt-get update failed" >&2
for package in $needed $useful; do
    $sudo apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
        echo "scanside: not installed: $package" >&2
done
