"""Text from elsewhere (file names, models, servers) made safe to show and to store.

Control characters can move a terminal's cursor, recolour it or retitle its window, so they are
written as escapes. A URL's user name and password are replaced, since logs and manifests are often
shared.
"""

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_PASSWORD = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*:/{1,2})\S*@")


def printable(text: str) -> str:
    """Write control characters and lone surrogates as escapes; tabs and line feeds are kept."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def hide_passwords(text: str) -> str:
    """Hide the credentials in URLs: 'http://user:pw@host' -> 'http://***@host'."""
    return _PASSWORD.sub(r"\1***@", text)
