"""Configuration of a teacher behind an OpenAI-compatible endpoint."""

from dataclasses import dataclass
from pathlib import Path

from xinslm.ranges import POSITIVE, Range, Settings, range_errors

_ENDPOINT = {
    "concurrency": Range(1, 1024),
    "timeout_seconds": POSITIVE,
    "max_answer_megabytes": POSITIVE,
    "retries": Range(0, 100),
    "requests_per_minute": POSITIVE,
    "tokens_per_minute": POSITIVE,
}


@dataclass(frozen=True)
class EndpointConfig(Settings):
    """How to talk to a teacher that is a URL; other teachers take nothing from here."""

    model: str | None = None
    """Name of the model there; by default the only one it lists."""
    api_key_file: Path | None = None
    """File that holds the API key and nothing else."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; the key itself is written
    nowhere.
    """
    concurrency: int = 8
    """Requests in flight at once."""
    timeout_seconds: float = 300.0
    """Longest time for one request in seconds, until the last byte of the answer."""
    max_answer_megabytes: float = 256.0
    """Largest answer that is read, in megabytes; protects the memory from a broken server."""
    retries: int = 6
    """Further tries after an overload, a server error, a lost connection or a time-out."""
    requests_per_minute: float | None = None
    """Most requests a minute; none is no limit."""
    tokens_per_minute: float | None = None
    """Most tokens a minute, prompt and answer together; none is no limit."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _ENDPOINT, "endpoint.")
        if self.api_key_file is not None and self.api_key_env is not None:
            wrong.append("give endpoint.api_key_file or endpoint.api_key_env, not both")
        return wrong
