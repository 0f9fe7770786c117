"""Who is at the other end of a link: a certificate for each place, from the site's own authority.

The name of a place in its certificate (subject alternative name) decides what the peer may do, nothing else.
Both ends show one; TLS 1.3 only. ``cumbre init`` makes the files, an observatory may bring its own.
"""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cumbre.core.configuration import Site, Tls
from cumbre.core.errors import ConfigurationError, ConflictError, TransientError
from cumbre.stores.files import write_atomic

AUTHORITY_DAYS = 3650
PLACE_DAYS = 825
AUTHORITY_KEY = "ca.key"
EARLY = datetime.timedelta(days=1)
"""Certificates are valid from a day before they are made: clocks differ and step."""


@dataclass(frozen=True, slots=True)
class Security:
    """TLS of one place of a site; ``None`` stands for plain connections."""

    site: Site
    settings: Tls
    place: str

    @classmethod
    def of(cls, site: Site, place: str) -> Security | None:
        """What the configuration wants, ``None`` without a ``tls`` block."""
        return None if site.config.tls is None else cls(site, site.config.tls, place)

    def context(self, *, server: bool) -> ssl.SSLContext:
        """A context that shows this place's certificate and wants one of the authority from the peer.

        Raises
        ------
        ConfigurationError
            A file is missing or not what it should be.
        """
        paths = certificate_paths(self.site, self.settings, self.place)
        try:
            changed = tuple(path.stat().st_mtime_ns for path in paths)
            return _context(*paths, changed, server=server)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"tls: {', '.join(map(str, paths))}: {error}; see docs/how-to/secure-links.md"
            ) from error

    def peer(self, connection: ssl.SSLSocket) -> str:
        """Place whose certificate the other end has shown (the authority's signature was verified before).

        Raises
        ------
        TransientError
            The certificate is of no place of this site.
        """
        certificate: dict[str, Any] = dict(connection.getpeercert() or {})
        names = [value for _, value in certificate.get("subjectAltName", ())]
        for name, place in self.site.config.places.items():
            if (place.certificate_name or name) in names:
                return name
        raise TransientError(
            f"certificate of {', '.join(map(str, names)) or 'nobody'}: no place of this site"
        )


@lru_cache(maxsize=8)
def _context(
    authority: Path, certificate: Path, key: Path, changed: tuple[int, ...], *, server: bool
) -> ssl.SSLContext:
    """Made anew when a file changes, so that renewed certificates need no restart."""
    del changed
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the name is that of a place, see Security.peer
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate, key)
    if server:
        context.num_tickets = 0  # no resumption: each connection shows its certificate
    return context


def certificate_paths(site: Site, settings: Tls, place: str) -> tuple[Path, Path, Path]:
    """Authority, certificate and key of a place."""
    return (
        site.path(settings.authority.format(place=place)),
        site.path(settings.certificate.format(place=place)),
        site.path(settings.key.format(place=place)),
    )


def make_authority(folder: Path, name: str) -> None:
    """Make a key and certificate that sign those of the places.

    Raises
    ------
    ConflictError
        There is one already.
    """
    if (folder / AUTHORITY_KEY).exists():
        raise ConflictError(f"{folder / AUTHORITY_KEY}: there is an authority already; it is never replaced")
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = f"{name} authority"[:64]
    builder = _builder(subject, AUTHORITY_DAYS, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = builder.add_extension(own, critical=False)
    _write(folder / AUTHORITY_KEY, folder / "ca.crt", key, builder, key, _name(subject))


def issue(folder: Path, name: str, *, days: float = PLACE_DAYS, file_name: str | None = None) -> None:
    """Make key and certificate of a place (or renew them), signed by the authority in ``folder``.

    Raises
    ------
    ConfigurationError
        There is no authority in the folder.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        signer = serialization.load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
        authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{folder}: no authority of this site that could sign ({error}); where an observatory brings its "
            "own certificates they are renewed there"
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, days, key.public_key())
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())  # type: ignore[arg-type]
    builder = builder.add_extension(signed_by, critical=False)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    stem = file_name or name
    _write(folder / f"{stem}.key", folder / f"{stem}.crt", key, builder, signer, authority.subject)


def make_certificates(folder: Path, observatory: str, places: Iterable[str]) -> None:
    """Authority and certificates of a new site."""
    make_authority(folder, observatory)
    for place in places:
        issue(folder, place)


def expiries(site: Site) -> dict[str, datetime.datetime]:
    """File of each certificate that the site uses → when it ends (UTC).

    Raises
    ------
    ConfigurationError
        A file is missing or no certificate.
    """
    from cryptography import x509

    found: dict[str, datetime.datetime] = {}
    if site.config.tls is None:
        return found
    for place in site.config.places:
        for path in certificate_paths(site, site.config.tls, place)[:2]:
            try:
                certificate = x509.load_pem_x509_certificate(path.read_bytes())
            except (OSError, ValueError) as error:
                raise ConfigurationError(f"tls: {path}: {error}; see docs/how-to/secure-links.md") from error
            found[str(path)] = certificate.not_valid_after_utc
    return found


def _builder(name: str, days: float, public_key: Any) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + datetime.timedelta(days=days)) - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(text: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> Any:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(key_path: Path, path: Path, key: Any, builder: Any, signer: Any, issuer: Any) -> None:
    from cryptography.hazmat.primitives import hashes, serialization

    signed = builder.issuer_name(issuer).sign(signer, hashes.SHA256())
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(key_path, secret, mode=0o600)
    write_atomic(path, signed.public_bytes(serialization.Encoding.PEM), mode=0o600)
