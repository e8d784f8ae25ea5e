"""CAST_API_KEYS and a file of keys -> their digests, which `KeyCheck` compares with."""

import hashlib
from pathlib import Path

from cast_serve.errors import UsageError


def load_keys(text: str, file: Path | None) -> list[bytes]:
    """Digests of the keys in a setting and a file.

    Args:
        text: keys with commas between; ``sha256:HEX`` is a key already hashed.
        file: the same, one a line; empty lines and lines that begin with # are passed over.

    Raises:
        UsageError: if the file cannot be read, the text or the file is given and holds no key, or
            a digest is malformed.
    """
    keys = [key.strip() for key in text.split(",")]
    if text and not any(keys):
        raise UsageError(
            f"CAST_API_KEYS is {text!r}, which holds no API key and would leave the gateway open; "
            "name a key, or unset the variable to leave it open"
        )
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the API keys in {file}: {error}") from error
        lines = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(lines):
            raise UsageError(f"{file} holds no API key, which would leave the gateway open")
        keys += lines
    return [_digest(key) for key in keys if key]


def _digest(key: str) -> bytes:
    prefix, colon, digits = key.partition(":")
    if prefix != "sha256" or not colon:
        return hashlib.sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(digits)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise UsageError("an API key that begins with sha256: must continue with 64 hex digits")
    return digest
