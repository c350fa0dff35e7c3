"""An identity survives its folder, stays private, and does not mix with another one's key."""

from __future__ import annotations

import datetime
import stat
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from whimbrel.agent.stream.errors import LocalError
from whimbrel.agent.stream.identity import Identity, fingerprint

if TYPE_CHECKING:
    from pathlib import Path


def test_saved_private_and_loaded_the_same(tmp_path: Path) -> None:
    identity = Identity.load_or_create("a", tmp_path / "identity")
    assert Identity.load_or_create("a", tmp_path / "identity") == identity
    files = list((tmp_path / "identity").iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o700


def test_every_identity_is_another() -> None:
    assert Identity.create("a").fingerprint != Identity.create("a").fingerprint


def test_a_key_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    Identity.create("a").save(tmp_path)
    key = (tmp_path / "identity.key").read_text()
    Identity.create("a").save(tmp_path)
    (tmp_path / "identity.key").write_text(key)
    with pytest.raises(LocalError, match="unusable"):
        Identity.load("a", tmp_path)


def test_a_clock_that_is_behind_does_no_harm() -> None:
    certificate = x509.load_pem_x509_certificate(Identity.create("x" * 63).certificate_pem.encode())
    now = datetime.datetime.now(datetime.UTC)
    assert certificate.not_valid_before_utc < now - datetime.timedelta(days=7)


@pytest.mark.parametrize(
    "pem", ["", "nonsense", "-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_certificate_is_refused(pem: str) -> None:
    with pytest.raises(LocalError, match="not a PEM certificate"):
        fingerprint(pem)
    with pytest.raises(LocalError, match="not a PEM certificate"):
        Identity.create("a").client_context(pem)
