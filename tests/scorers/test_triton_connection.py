"""TLS, the client's own certificate, and headers: used, read from where they lie, and never shown."""

from __future__ import annotations

import datetime
import ipaddress
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from engine.errors import BundleError, PluginError, ScorerError
from plugins.scorers.triton import TritonScorer
from tests.scorers.triton_server import TritonLike, abort, request

Made = Callable[..., TritonScorer]


def _signed(name: str, issuer: Any = None, *names: x509.GeneralName) -> SimpleNamespace:
    """A certificate and its key, signed by an authority, or by itself as one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(key if issuer is None else issuer.key, hashes.SHA256())
    return SimpleNamespace(
        certificate=certificate,
        key=key,
        cert_pem=certificate.public_bytes(serialization.Encoding.PEM),
        key_pem=key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ca, another ca, a server's certificate for 127.0.0.1 and one for triton.example, a client's."""
    folder = tmp_path_factory.mktemp("tls")
    ca, stranger = _signed("authority"), _signed("stranger")
    made = {
        "ca": ca,
        "stranger": stranger,
        "server": _signed("server", ca, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))),
        "named": _signed("named", ca, x509.DNSName("triton.example")),
        "client": _signed("client", ca),
    }
    for name, one in made.items():
        (folder / f"{name}.pem").write_bytes(one.cert_pem)
        (folder / f"{name}.key").write_bytes(one.key_pem)
    return SimpleNamespace(folder=folder, path=lambda name: str(folder / name), **made)


@pytest.fixture
def secured(tiny_bundle: Path, files: Any) -> Iterator[Callable[..., TritonLike]]:
    servers = []

    def make(who: str = "server", *, asks: bool = False) -> TritonLike:
        one = getattr(files, who)
        credentials = grpc.ssl_server_credentials(
            [(one.key_pem, one.cert_pem)], files.ca.cert_pem if asks else None, require_client_auth=asks
        )
        servers.append(TritonLike("tiny", {"3": tiny_bundle}, credentials))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def test_scores_come_encrypted(secured: Any, made: Made, files: Any) -> None:
    scorer = made(url=secured().url, tls={"ca": files.path("ca.pem")})
    assert scorer.score(request(3)).tasks["liked"].shape == (3,)


def test_a_server_of_another_authority_or_name_is_not_believed(secured: Any, made: Made, files: Any) -> None:
    with pytest.raises(BundleError, match="unavailable"):
        made(url=secured().url, tls={"ca": files.path("stranger.pem")}, load_timeout_s=0.1)
    named = secured("named").url
    with pytest.raises(BundleError, match="unavailable"):
        made(url=named, tls={"ca": files.path("ca.pem")}, load_timeout_s=0.1)
    with pytest.raises(BundleError, match="unavailable"):  # nor spoken to in the clear
        made(url=named, load_timeout_s=0.1)
    scorer = made(url=named, tls={"ca": files.path("ca.pem"), "server_name": "triton.example"})
    assert scorer.score(request(3)).degraded == ()


def test_the_client_shows_who_it_is(secured: Any, made: Made, files: Any) -> None:
    url, ca = secured(asks=True).url, files.path("ca.pem")
    with pytest.raises(BundleError, match="unavailable"):
        made(url=url, tls={"ca": ca}, load_timeout_s=0.1)
    scorer = made(url=url, tls={"ca": ca, "cert": files.path("client.pem"), "key": files.path("client.key")})
    assert scorer.score(request(3)).degraded == ()


def test_headers_go_with_each_call(
    triton: TritonLike, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_TOKEN", "s3cret")
    (tmp_path / "key").write_text("from a file\nsecond line\n")
    headers = {
        "authorization": {"env": "TRITON_TOKEN", "prefix": "Bearer "},
        "x-key": {"file": str(tmp_path / "key")},
        "x-team": {"value": "films"},
    }
    scorer = made(headers=headers)
    scorer.score(request(3))
    found = triton.metadata[-1]
    assert (found["authorization"], found["x-key"], found["x-team"]) == ("Bearer s3cret", "from a file", "films")
    assert "s3cret" not in repr(vars(scorer)) + repr(vars(scorer._link)) + repr(vars(scorer._link._client))
    assert "s3cret" not in repr(scorer.options)


def test_a_secret_that_changed_is_read_again_when_it_is_refused(triton: TritonLike, made: Made, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("old")
    scorer = made(headers={"x-key": {"file": str(key)}}, breaker={"failures": 1000})

    def check(context: Any) -> None:
        if triton.metadata[-1]["x-key"] != "new":
            abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")(context)

    triton.before = check
    key.write_text("new")
    with pytest.raises(ScorerError) as failed:
        scorer.score(request(3))
    assert failed.value.reason == "triton: denied"
    assert scorer.score(request(3)).degraded == ()
    key.unlink()  # while it is written anew, what was read stays
    scorer._link._client._headers_until = time.monotonic() - 1
    assert scorer.score(request(3)).degraded == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headers": {"x-key": {"env": "NO_SUCH_VARIABLE"}}}, "headers.x-key: the environment variable NO_SUCH_VAR"),
        ({"headers": {"x-key": {"file": "/there/is/no/such"}}}, "headers.x-key: .*/there/is/no/such"),
        ({"headers": {"x-key": {"value": "täst"}}}, "headers.x-key: only printable ASCII"),
        ({"tls": {"ca": "/there/is/no/such"}}, r"/there/is/no/such \(tls.ca\)"),
    ],
)
def test_what_cannot_be_read_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        TritonScorer(TritonScorer.Options(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://triton:8000"}, "write host:port"),
        ({"url": "triton"}, "write host:port"),
        ({"url": "triton:99999"}, "write host:port"),
        ({"tls": {"cert": "c.pem"}}, "cert and key belong together"),
        ({"headers": {"X-Key": {"value": "v"}}}, "lower case"),
        ({"headers": {"grpc-key": {"value": "v"}}}, "lower case"),
        ({"headers": {"x-key": {"value": "v", "env": "E"}}}, "exactly one of"),
        ({"headers": {"x-key": {}}}, "exactly one of"),
        ({"fallback": "popular"}, "inproc"),
        ({"inproc": {"thread": 1}}, "thread"),
        ({"urls": []}, "urls"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TritonScorer.Options(**options)


@pytest.mark.parametrize(
    "url", ["triton:8001", "[::1]:8001", "10.0.0.1:8001", "dns:///triton:8001", "unix:/run/triton"]
)
def test_addresses_that_grpc_knows_are_taken(url: str) -> None:
    assert TritonScorer.Options(url=url).url == url
