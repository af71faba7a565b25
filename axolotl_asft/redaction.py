"""Leaving secrets out of what a run writes about itself. Standard library alone."""

import re
from typing import Any

REDACTED = "[redacted]"
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_SECRET_WORDS = {
    "apikey", "auth", "authorization", "credential", "credentials", "key", "keys", "passphrase", "passwd", "password",
    "passwords", "secret", "secrets", "token",
}  # fmt: skip
# of a tokenizer, in `special_tokens:` and the like
_ORDINARY_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "eot", "image", "video", "audio", "special", "id"}
_LOOKS_SECRET = re.compile(r"\b(?:hf|sk|ghp|gho|pypi|xox[abp]|AKIA|glpat)[-_]?[A-Za-z0-9_-]{16,}")
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_SIGNED_URL = re.compile(r"(?<=[?&])([\w-]*(?:token|key|signature|secret|credential)[\w-]*)=[^&\s]+", re.IGNORECASE)


def redacted(value: Any, name: str = "") -> Any:
    """The same JSON value without secrets: what is called token, key, password or secret, and what looks like one.

    Args:
        value: of dicts, lists, strings and numbers; it is left as it is.
        name: the key that it stands under.
    """
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if _is_secret_name(name) and not (value is None or isinstance(value, bool)):
        return REDACTED
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if isinstance(value, str):
        text = _LOOKS_SECRET.sub(REDACTED, _LOGIN_IN_URL.sub(f"{REDACTED}@", value))
        return _SIGNED_URL.sub(rf"\1={REDACTED}", text)
    return value


def _is_secret_name(name: str) -> bool:
    words = {word.lower() for word in _WORDS.findall(name)}
    if "token" in words and words & _ORDINARY_TOKENS:
        words.discard("token")
    return bool(words & _SECRET_WORDS)
