#!/bin/sh
# A real S3 server on this machine: Ceph's object gateway with one monitor and one OSD, all on 127.0.0.1.
# For tests and trials; one copy of the data and nothing redundant.
#
#   ceph.sh install       Debian's packages, as root
#   ceph.sh start DIR     start, or start again on the data in DIR; prints the environment to use it with
#   ceph.sh env DIR       print that environment again
#   ceph.sh status DIR    say what runs
#   ceph.sh stop DIR      stop what start started, and nothing else (the data stays)
#   ceph.sh kill DIR      the same by kill -9
#
# Settings, read at the first start: CEPH_MON_PORT, CEPH_GATEWAY_PORT (free ones where empty), CEPH_DISK_GB (8).
set -eu
PATH=$PATH:/usr/sbin:/sbin

fail() { echo "ceph.sh: $*" >&2; exit 1; }
say() { echo "ceph.sh: $*" >&2; }

DAEMONS="mon osd rgw"
BUCKET=farm

installed() { command -v radosgw >/dev/null && command -v ceph-osd >/dev/null && command -v ceph-mon >/dev/null; }

install() {
    installed && { say "installed already"; return; }
    [ "$(id -u)" = 0 ] || fail "install needs root; run: sudo $0 install"
    command -v apt-get >/dev/null || fail "no apt-get here; install radosgw, ceph-osd, ceph-mon and ceph-common by hand"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update >&2
    apt-get install -y --no-install-recommends radosgw ceph-osd ceph-mon ceph-common ceph-base >&2
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# True while the process in a pid file is the daemon that was started, not another one with its number.
alive() {
    [ -s "$DIR/$1.pid" ] || return 1
    pid=$(cat "$DIR/$1.pid")
    [ -r "/proc/$pid/cmdline" ] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "$CONF"
}

admin() { timeout 60 ceph --conf "$CONF" --connect-timeout 30 "$@"; }

wait_for() {
    what=$1; shift
    tries=0
    until "$@" >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 240 ] || fail "$what did not come up in 60 s; see $DIR/log"
        sleep 0.25
    done
}

# A daemon in a session of its own, so that a Ctrl-C meant for the caller does not reach it.
launch() {
    name=$1; shift
    alive "$name" && return
    setsid "$@" >>"$DIR/log/$name.out" 2>&1 </dev/null &
    echo $! >"$DIR/$name.pid"
}
run_mon() { launch mon ceph-mon --conf "$CONF" --id a --mon-data "$DIR/mon" --foreground; }
run_osd() { launch osd ceph-osd --conf "$CONF" --id 0 --osd-data "$DIR/osd" --foreground; }
run_rgw() { launch rgw radosgw --conf "$CONF" --name client.rgw --foreground; }

osd_up() { admin osd stat | grep -q '1 up'; }

answers() {
    port=$(cat "$DIR/gateway.port")
    python3 -c 'import sys, urllib.request; urllib.request.urlopen("http://127.0.0.1:" + sys.argv[1], timeout=2).read()' "$port"
}

configure() {
    fsid=$(python3 -c 'import uuid; print(uuid.uuid4())')
    mon_port=${CEPH_MON_PORT:-$(free_port)}
    port=${CEPH_GATEWAY_PORT:-$(free_port)}
    echo "$port" >"$DIR/gateway.port"
    cat >"$CONF" <<END
[global]
fsid = $fsid
mon_initial_members = a
mon_host = [v2:127.0.0.1:$mon_port]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_ipv6 = false
ms_bind_msgr1 = false
# Without authentication the gateway hangs, so all of cephx stays on.
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = $DIR/admin.keyring
run_dir = $DIR/run
admin_socket = $DIR/run/\$name.sock
log_file = $DIR/log/\$name.log
crash_dir = $DIR/crash
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 500
mon_data_avail_warn = 1
mon_data_avail_crit = 1

[mon]
keyring = $DIR/mon/keyring

[osd]
keyring = $DIR/osd/keyring
osd_objectstore = bluestore
bluestore_block_size = $((${CEPH_DISK_GB:-8} * 1024 * 1024 * 1024))
bluestore_block_create = true
bluestore_cache_autotune = false
bluestore_cache_size = 67108864
osd_memory_target = 939524096

[client.rgw]
keyring = $DIR/rgw.keyring
rgw_frontends = beast endpoint=127.0.0.1:$port
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
END
}

create() {
    # What a start that was cut short had left cannot be gone on from.
    rm -rf "$DIR/mon" "$DIR/osd" "$DIR"/*.keyring
    mkdir -p "$DIR/mon" "$DIR/osd" "$DIR/log" "$DIR/run" "$DIR/crash"
    configure
    ceph-authtool --create-keyring "$DIR/first.keyring" --gen-key -n mon. --cap mon 'allow *' >&2
    ceph-authtool --create-keyring "$DIR/admin.keyring" --gen-key -n client.admin \
        --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' --cap mds 'allow *' >&2
    ceph-authtool "$DIR/first.keyring" --import-keyring "$DIR/admin.keyring" >&2
    mon_addr=$(sed -n 's/^mon_host = //p' "$CONF")
    monmaptool --create --fsid "$(sed -n 's/^fsid = //p' "$CONF")" --addv a "$mon_addr" "$DIR/monmap" --clobber >&2
    ceph-mon --conf "$CONF" --mkfs --id a --mon-data "$DIR/mon" --monmap "$DIR/monmap" --keyring "$DIR/first.keyring" >&2
    run_mon
    wait_for "the monitor" admin mon stat
    uuid=$(python3 -c 'import uuid; print(uuid.uuid4())')
    ceph-authtool --create-keyring "$DIR/osd/keyring" --gen-key -n osd.0 >&2
    printf '{"cephx_secret": "%s"}' "$(ceph-authtool "$DIR/osd/keyring" -n osd.0 --print-key)" >"$DIR/secret.json"
    admin osd new "$uuid" -i "$DIR/secret.json" >&2
    ceph-osd --conf "$CONF" --id 0 --osd-data "$DIR/osd" --mkfs --osd-uuid "$uuid" >&2
    run_osd
    admin auth get-or-create client.rgw mon 'allow rw' osd 'allow rwx' -o "$DIR/rgw.keyring" >&2
    rm -f "$DIR/first.keyring" "$DIR/secret.json"
    wait_for "the OSD" osd_up
    run_rgw
    wait_for "the gateway" answers
    timeout 60 radosgw-admin --conf "$CONF" user create --uid farm --display-name farm >"$DIR/user.json"
    python3 - "$DIR/user.json" "$port" >"$DIR/env" <<'END'
import json, sys
keys = json.load(open(sys.argv[1]))["keys"][0]
print(f"AWS_ACCESS_KEY_ID={keys['access_key']}")
print(f"AWS_SECRET_ACCESS_KEY={keys['secret_key']}")
print(f"FARM_S3_ENDPOINT=http://127.0.0.1:{sys.argv[2]}")
print("FARM_S3_ADDRESSING=path")
END
}

# One signed PUT, so that making the bucket needs no other package than Python.
make_bucket() {
    python3 - "$DIR/env" "$BUCKET" <<'END'
import datetime, hashlib, hmac, sys, urllib.error, urllib.request
env = dict(line.strip().split("=", 1) for line in open(sys.argv[1]))
host, path = env["FARM_S3_ENDPOINT"].removeprefix("http://"), "/" + sys.argv[2]
now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
empty, scope = hashlib.sha256(b"").hexdigest(), f"{now[:8]}/us-east-1/s3/aws4_request"
signed = "host;x-amz-content-sha256;x-amz-date"
request = f"PUT\n{path}\n\nhost:{host}\nx-amz-content-sha256:{empty}\nx-amz-date:{now}\n\n{signed}\n{empty}"
text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
key = ("AWS4" + env["AWS_SECRET_ACCESS_KEY"]).encode()
for part in scope.split("/"):
    key = hmac.new(key, part.encode(), "sha256").digest()
signature = hmac.new(key, text.encode(), "sha256").hexdigest()
credential = f"{env['AWS_ACCESS_KEY_ID']}/{scope}"
headers = {
    "x-amz-date": now,
    "x-amz-content-sha256": empty,
    "Authorization": f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={signed}, Signature={signature}",
}
url = env["FARM_S3_ENDPOINT"] + path
urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), timeout=30).read()
END
}

start() {
    installed || fail "radosgw, ceph-osd or ceph-mon is not installed; run: sudo $0 install"
    mkdir -p "$DIR"
    if [ -s "$DIR/ready" ]; then
        mkdir -p "$DIR/run"
        run_mon
        wait_for "the monitor" admin mon stat
        run_osd
        wait_for "the OSD" osd_up
        run_rgw
        wait_for "the gateway" answers
    else
        stop KILL
        create
        make_bucket
        echo "FARM_STORE=s3://$BUCKET" >>"$DIR/env"
        date -u >"$DIR/ready"
    fi
    cat "$DIR/env"
}

stop() {
    for name in rgw osd mon; do
        if alive $name; then
            kill -"$1" "$(cat "$DIR/$name.pid")"
            tries=0
            while alive $name; do
                tries=$((tries + 1))
                [ $tries -lt 120 ] || { say "$name does not end, killing it"; kill -KILL "$(cat "$DIR/$name.pid")"; }
                sleep 0.25
            done
        fi
        rm -f "$DIR/$name.pid"
    done
}

status() {
    running=0
    for name in $DAEMONS; do
        if alive $name; then
            echo "$name runs, pid $(cat "$DIR/$name.pid")"
            running=$((running + 1))
        else
            echo "$name is down"
        fi
    done
    [ $running = 3 ]
}

command=${1:-}
[ "$command" = install ] && { install; exit; }
[ $# = 2 ] || fail "say: $0 install | start DIR | env DIR | status DIR | stop DIR | kill DIR"
DIR=$(readlink -m "$2")
CONF=$DIR/ceph.conf
case $command in
    start) start ;;
    env) cat "$DIR/env" 2>/dev/null || fail "nothing was started in $DIR; run: $0 start $DIR" ;;
    status) status ;;
    stop) stop TERM ;;
    kill) stop KILL ;;
    *) fail "there is no command $command; say: install, start, env, status, stop or kill" ;;
esac
