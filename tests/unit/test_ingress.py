"""HAProxy's configuration, closed."""

import dataclasses

import pytest

from farm.ingress import Front, IngressError, closed

FRONT = Front(bind="127.0.0.1:8000", binary="/haproxy", unavailable="/run/503.http")
SERVES = """\
global
    log 127.0.0.1:514 local0 info
    stats socket /run/admin.sock mode 666 level admin expose-fd listeners
    maxconn 4096
defaults
    log global
    option splice-request
    option splice-response
    errorfile 502 /run/500.http
    errorfile 503 /run/500.http
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if { path /metrics }
frontend http_frontend
    bind 127.0.0.1:43000
    use_backend http-farm if is_http-farm
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
        'errorfile 502 "/run/503.http"',
        'errorfile 503 "/run/503.http"',
    ]


def test_tls_is_spoken_where_there_is_a_certificate() -> None:
    bound = 'bind 127.0.0.1:8000 ssl crt "/run/a b.pem" ssl-min-ver TLSv1.2 alpn h2,http/1.1'
    assert bound in lines(dataclasses.replace(FRONT, pem="/run/a b.pem"))


def test_behind_a_proxy_only_it_and_this_machine_may_connect() -> None:
    rule = "tcp-request connection reject unless { src 127.0.0.0/8 ::1 10.0.0.5/32 }"
    assert rule in lines(dataclasses.replace(FRONT, only_from="10.0.0.5/32"))
    assert not any(line.startswith("tcp-request") for line in lines())


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
        lines(dataclasses.replace(FRONT, unavailable='/run/"x'))
