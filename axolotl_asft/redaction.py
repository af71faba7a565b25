"""Leaving secrets out of what a run writes about itself. Standard library alone."""

import re
from typing import Any

REDACTED = "[redacted]"
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SECRET_WORDS = {
    "accesskey", "accesstoken", "accountkey", "apikey", "auth", "authorization", "authtoken", "bearer", "cookie",
    "cookies", "credential", "credentials", "key", "keys", "pass", "passphrase", "passwd", "password", "passwords",
    "privatekey", "pwd", "secret", "secrets", "token",
}  # fmt: skip
# beside `token` and `key`: of a tokenizer, in `special_tokens:` and the like, or of a column of the data
_ORDINARY = {
    "token": {
        "bos", "eos", "pad", "unk", "sep", "cls", "mask", "eot", "image", "video", "audio", "special", "ids", "index",
        "indices", "embeddings", "type",
    },
    "key": {"thinking", "column"},
}  # fmt: skip
_TOKEN_ID = re.compile(r"token_?ids?$", re.IGNORECASE)
# The forms that their makers give tokens; a plain name with one of these beginnings is none.
_LOOKS_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk[-_][A-Za-z0-9]{20,}|sk-(?:proj|ant|or|svcacct|admin)-[\w-]{20,}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|(?<![-_])sk-(?=[\w-]*[\dA-Z_])[\w-]{20,}"  # url-safe; of small letters and hyphens alone it is a name
    r"|pypi-Ag[\w-]{16,}|xox[abeprs]-[\w-]{16,}|A[KS]IA[A-Z0-9]{16}|AIza[\w-]{30,}|nvapi-[\w-]{20,}"
    r"|wandb_v1_\w{16,}|(?<=Bearer )[\w.~+/=-]{16,}|(?<=Authorization: Basic )[\w+/=-]+)"
)
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_SIGNED_URL = re.compile(
    r"(?<=[?&;])([\w-]*(?:token|key|signature|secret|credential|password)[\w-]*|sig|auth)=[^&;\s]+", re.IGNORECASE
)
_SETTING = re.compile(r"([\w-]+)=[^&;\s]+")  # at the beginning, where it need not be of a URL


def redacted(value: Any, name: str = "") -> Any:
    """The same JSON value without secrets: what is called token, key, password or secret, and what looks like one.

    Args:
        value: of dicts, lists, strings and numbers; it is left as it is.
        name: the key that it stands under.
    """
    if _is_secret_name(name) and not (value is None or isinstance(value, bool) or _is_token_id(name, value)):
        return REDACTED
    if isinstance(value, dict):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, name) for item in value]
    if isinstance(value, str):
        text = _LOOKS_SECRET.sub(REDACTED, _LOGIN_IN_URL.sub(f"{REDACTED}@", value))
        text, setting = _SIGNED_URL.sub(rf"\1={REDACTED}", text), _SETTING.match(text)
        if setting and (_is_secret_name(setting[1]) or setting[1].lower().endswith(("sig", "signature"))):
            text = _SETTING.sub(rf"\1={REDACTED}", text, count=1)
        return text
    return value


def _is_token_id(name: str, value: Any) -> bool:
    """Whether it is a token's number in a vocabulary, or several."""
    numbers = value if isinstance(value, list | tuple) else [value]
    return _TOKEN_ID.search(name) is not None and all(isinstance(number, int) for number in numbers)


def _is_secret_name(name: str) -> bool:
    words = {word.lower() for word in _WORDS.findall(name)}
    for secret, beside in _ORDINARY.items():
        if words & beside:
            words.discard(secret)
    return bool(words & _SECRET_WORDS)
