"""HAProxy's configuration, closed."""

import dataclasses

import pytest

from farm.ingress import Front, IngressError, closed

FRONT = Front(bind="127.0.0.1:8000", binary="/haproxy", answers="/run", nothing='{"error": {"code": "not_found"}}')
SERVES = """\
global
    log 127.0.0.1:514 local0 info
    stats socket /run/admin.sock mode 666 level admin expose-fd listeners
    maxconn 4096
defaults
    log global
    timeout client 3600s
    option splice-request
    option splice-response
    errorfile 502 /run/500.http
    errorfile 503 /run/500.http
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if { path /metrics }
frontend http_frontend
    bind 127.0.0.1:43000
    acl healthcheck path -i /-/healthz
    http-request set-log-level debug if healthcheck
    acl backend_http-farm_server_up nbsrv(http-farm) ge 1
    http-request return status 200 content-type text/plain string "success" if healthcheck backend_http-farm_server_up
    http-request return status 503 content-type text/plain string "Service Unavailable" if healthcheck
    acl routes path -i /-/routes
    http-request set-log-level debug if routes
    http-request return status 200 content-type application/json string "{}" if routes
    use_backend http-farm if is_http-farm
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \'%[path]\' not found."
backend http-farm
    server gateway 127.0.0.1:30000
listen stats
  bind *:8404
  stats enable
"""


def lines(front: Front = FRONT, config: str = SERVES, files: int = 20_000) -> list[str]:
    return [line.strip() for line in closed(config, front, files=files).splitlines()]


def test_only_the_endpoint_listens() -> None:
    found = lines()
    assert [line for line in found if line.startswith("bind")] == ["bind 127.0.0.1:8000"]
    assert not {"frontend prometheus", "listen stats", "stats enable"} & set(found)
    assert "use_backend http-farm if is_http-farm" in found
    assert "server gateway 127.0.0.1:30000" in found


def test_the_admin_socket_is_its_owners_and_no_syslog_hears_of_requests() -> None:
    found = lines()
    assert "stats socket /run/admin.sock mode 600 level admin expose-fd listeners" in found
    assert [line for line in found if line.startswith("log ")] == ["log global"]


def test_a_client_that_hangs_up_is_heard_of() -> None:
    assert not [line for line in lines() if "splice" in line]


def test_without_a_gateway_the_answer_is_the_farms_own() -> None:
    found = lines()
    assert [line for line in found if line.startswith("errorfile")] == [
        f'errorfile {status} "/run/{status}.http"' for status in (400, 408, 500, 501, 502, 503, 504)
    ]
    assert found[found.index("backend default_backend") + 1] == "backend http-farm"


def test_serves_own_pages_are_for_nobody() -> None:
    found = lines()
    assert [line for line in found if "/-/" in line or "healthcheck" in line or "routes" in line] == [
        'http-request return status 404 content-type application/json string \'{"error": {"code": "not_found"}}\' '
        "if { path,url_dec -i -m beg /-/ }"
    ]


def test_a_client_that_says_nothing_is_not_kept() -> None:
    found = lines()
    assert [line for line in found if line.startswith("timeout")] == ["timeout client 75s", "timeout http-request 30s"]


def test_one_address_takes_a_quarter_of_the_connections_at_most_but_for_this_machine_and_a_proxy() -> None:
    found = lines()
    assert found.index("tcp-request connection accept if { src 127.0.0.0/8 ::1 }") < found.index(
        "tcp-request connection reject if { sc0_conn_cur gt 1024 }"
    )
    assert not [line for line in lines(dataclasses.replace(FRONT, only_from="10.0.0.5/32")) if "conn_cur" in line]


@pytest.mark.parametrize(("front", "scheme"), [({}, "http"), ({"pem": "/a"}, "https"), ({"only_from": "::2"}, "https")])
def test_no_client_says_by_which_scheme_it_came(front: dict[str, str], scheme: str) -> None:
    assert f"http-request set-header X-Forwarded-Proto {scheme}" in lines(dataclasses.replace(FRONT, **front))


def test_tls_is_spoken_where_there_is_a_certificate() -> None:
    bound = 'bind 127.0.0.1:8000 ssl crt "/run/a b.pem" ssl-min-ver TLSv1.2 alpn h2,http/1.1'
    assert bound in lines(dataclasses.replace(FRONT, pem="/run/a b.pem"))


def test_behind_a_proxy_only_it_and_this_machine_may_connect() -> None:
    rule = "tcp-request connection reject unless { src 127.0.0.0/8 ::1 10.0.0.5/32 }"
    assert rule in lines(dataclasses.replace(FRONT, only_from="10.0.0.5/32"))
    assert rule not in lines()


@pytest.mark.parametrize(("files", "connections"), [(20_000, 4096), (1024, 308), (10, 1)])
def test_no_more_connections_are_taken_than_files_may_be_open(files: int, connections: int) -> None:
    assert f"maxconn {connections}" in lines(files=files)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SERVES + "frontend grpc_frontend\n  bind :9000 proto h2\n", "frontend grpc_frontend listens too: bind :9000"),
        (SERVES + "listen stats_2\n  bind *:1\n", "listen stats_2 listens too"),
        (SERVES.replace("    bind 127.0.0.1:43000\n", ""), "frontend http_frontend has 0 bind lines"),
        (SERVES.replace("43000\n", "43000\n    bind :1\n"), "frontend http_frontend has 2 bind lines"),
        (SERVES.replace("mode 666 ", ""), "the admin socket has no mode"),
    ],
)
def test_what_is_not_known_is_not_started(config: str, message: str) -> None:
    with pytest.raises(IngressError, match=message):
        closed(config, FRONT, files=1024)


def test_a_path_that_would_end_the_quotes_is_refused() -> None:
    with pytest.raises(IngressError, match="which HAProxy's configuration cannot hold"):
        lines(dataclasses.replace(FRONT, answers='/run/"x'))
