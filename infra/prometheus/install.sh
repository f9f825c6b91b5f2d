#!/bin/sh
# Debian's Prometheus and promtool on this machine, as root: for the tests and for a farm's own monitoring.
# The package would start a server that listens on every address; that is held back. README.md says how to run one.
set -eu
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "install.sh: $*" >&2; exit 1; }

command -v prometheus >/dev/null && command -v promtool >/dev/null && { echo "install.sh: installed already" >&2; exit 0; }
[ "$(id -u)" = 0 ] || fail "needs root; run: sudo $0"
command -v apt-get >/dev/null || fail "no apt-get here; install prometheus and promtool by hand"

POLICY=/usr/sbin/policy-rc.d
if [ ! -e $POLICY ]; then
    # invoke-rc.d and deb-systemd-invoke ask this file; 101 means that no service may be started.
    printf '#!/bin/sh\nexit 101\n' >$POLICY
    chmod 755 $POLICY
    trap 'rm -f $POLICY' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update >&2
apt-get install -y --no-install-recommends prometheus >&2
# Nor at the next boot.
[ ! -d /run/systemd/system ] || systemctl disable --quiet prometheus >&2
