"""The key that signs manifests of Content Credentials. It stays in the worker: no file is parsed where it is."""

from collections.abc import Sequence
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from server.previews.marks import LONGEST_CERTIFICATES
from server.settings import SettingError, Settings, variable


class Credentials:
    """A key of P-256 (ES256 of RFC 9053) with its certificates, its own first."""

    def __init__(self, certificates: str, key: str) -> None:
        """Both in PEM. Raises `SettingError`."""
        try:
            chain = x509.load_pem_x509_certificates(certificates.encode())
        except ValueError as problem:
            raise SettingError(f"{variable('c2pa_certificates')}: {problem}") from problem
        if len(certificates) > LONGEST_CERTIFICATES:
            raise SettingError(f"{variable('c2pa_certificates')}: must have at most {LONGEST_CERTIFICATES} characters")
        try:
            private = load_pem_private_key(key.encode(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # whose texts may hold some of it
            raise SettingError(f"{variable('c2pa_key')}: is no private key in PEM without a password") from None
        if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
            raise SettingError(f"{variable('c2pa_key')}: must be of the curve P-256, e.g. from: openssl ecparam -name prime256v1 -genkey")
        if chain[0].public_key() != private.public_key():
            raise SettingError(f"{variable('c2pa_certificates')}: the first one is not that of {variable('c2pa_key')}")
        _check_order(chain)
        self._private = private
        self.certificates = certificates
        self.expires_at = min(each.not_valid_after_utc for each in chain)

    def sign(self, content: bytes) -> bytes:
        """The signature, as DER."""
        return self._private.sign(content, ec.ECDSA(hashes.SHA256()))


def credentials_of(settings: Settings) -> Credentials | None:
    """Those of the settings, if they ask for `c2pa`. Raises `SettingError`."""
    return Credentials(settings.c2pa_certificates, settings.c2pa_key) if "c2pa" in settings.mark_outputs else None


def _check_order(chain: Sequence[x509.Certificate]) -> None:
    for each, above in pairwise(chain):
        try:
            each.verify_directly_issued_by(above)
        except (ValueError, TypeError, InvalidSignature):
            raise SettingError(f"{variable('c2pa_certificates')}: each must be issued by the next") from None
