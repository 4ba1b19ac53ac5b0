"""`xinslm publish`: an exported folder as a repository of the Hugging Face Hub.

Only the files that the folder's manifest lists are uploaded, after a comparison with their hashes;
the manifest stays here, because it holds paths of this machine. Everything goes into one commit,
so the repository never has half a model. huggingface_hub finds the token: `hf auth login`, or the
variable HF_TOKEN.

    run(PublishConfig(Path("student-hf"), "me/student"))
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.export.config import PublishConfig
from xinslm.export.kinds import CARD, EXPORT, EXPORTS
from xinslm.files import MANIFEST, damaged_files, read_json, sha256_file
from xinslm.folders import manifest_kind
from xinslm.progress import Listener, Progress, ignore

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"}
_TOKEN = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,})\b")
_TEXTS = {".json", ".jinja", ".md", ".txt", ".yaml", ".py", ""}
_INSTEAD = {
    "quantized": "no runtime reads a quantized folder: export it with `xinslm export all`",
    "model": "export it with `xinslm export hf`, which writes a model card",
}


@dataclass(frozen=True)
class Result:
    """What was uploaded, or would be."""

    repo: str
    files: dict[str, int]
    """Sizes in bytes by name."""
    visibility: str
    message: str
    url: str | None
    """Address of the commit; None after a dry run."""

    def describe(self) -> str:
        """Lines for the terminal."""
        width = max(map(len, self.files))
        lines = [f"{name:<{width}}  {size:>15,} bytes" for name, size in self.files.items()]
        total = f"{len(self.files)} files, {sum(self.files.values()) / 1e6:,.1f} MB"
        to = f"{self.repo} ({self.visibility}), '{self.message}'"
        end = "dry run: nothing was uploaded" if self.url is None else f"output  {self.url}"
        return "\n".join([*lines, f"total   {total}", f"to      {to}", end])


def run(config: PublishConfig, on_progress: Listener = ignore) -> Result:
    """Check a folder and upload it; UsageError for what must not be uploaded."""
    if not _REPO.fullmatch(config.repo):
        raise UsageError(f"'{config.repo}' is no name on the Hub: give USER/NAME")
    files = _files(config.folder, on_progress)
    sizes = {name: (config.folder / name).stat().st_size for name in files}
    message = config.message or f"Upload {config.folder.resolve().name}"
    visibility = "public" if config.public else "private"
    if config.dry_run:
        return Result(config.repo, sizes, visibility, message, None)
    hub = _Hub(config.repo)
    existing = hub.existing()
    if existing is not None:
        visibility = "as it is"
        _refuse_other_content(config, files, existing)
    else:
        hub.create(config.public)
    url = hub.commit(config.folder, list(files), message)
    return Result(config.repo, sizes, visibility, message, url)


def _files(folder: Path, on_progress: Listener) -> dict[str, str]:
    """Names of the files to upload with the SHA-256 of each; UsageError if one must not be."""
    kind = manifest_kind(folder) if folder.is_dir() else None
    if kind not in (EXPORT, EXPORTS):
        what = "does not exist" if not folder.exists() else "is not an exported folder"
        hint = _INSTEAD.get(
            kind or "", "make one with `xinslm export hf`, `mlx`, `coreml` or `all`"
        )
        raise UsageError(f"{folder} {what}: {hint}")
    manifest = read_json(folder / MANIFEST)
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not listed:
        raise XinslmError(f"{folder / MANIFEST} lists no files; export again")
    for path in sorted(folder.rglob("*") if kind == EXPORT else folder.glob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in listed and name != MANIFEST:
            raise UsageError(f"{path} {_reason(path)}; remove it, or export again")
    total = sum(facts["bytes"] for facts in listed.values())

    def tell(done: int) -> None:
        on_progress(Progress("check", done, total, "bytes"))

    # the card may be edited by hand
    damaged = [name for name in damaged_files(folder, manifest, tell) if name != CARD]
    if damaged or not (folder / CARD).is_file():
        raise XinslmError(f"{folder / (damaged or [CARD])[0]} is missing or damaged; export again")
    for name in listed:
        _refuse_secrets(folder / name)
    return {name: facts["sha256"] for name, facts in listed.items()} | {
        CARD: sha256_file(folder / CARD)
    }


def _reason(path: Path) -> str:
    if re.search(r"\.(partial|old)-\d+$|\.incomplete$|\.tmp$", path.name):
        return "is half-written"
    if _may_be_pickle(path):
        return "may be a pickle, which can run code when it is opened"
    return "is not part of the export"


def _may_be_pickle(path: Path) -> bool:
    """By its name; Core ML's packages have their weights in a `.bin` that is none."""
    in_package = any(parent.suffix == ".mlpackage" for parent in path.parents)
    return path.suffix in _PICKLES and not in_package


def _refuse_secrets(path: Path) -> None:
    if _may_be_pickle(path):
        raise UsageError(f"{path} {_reason(path)}; remove it, or export again")
    if path.suffix in _TEXTS and _TOKEN.search(path.read_bytes()):
        raise UsageError(f"{path} contains what looks like an access token; remove it there")


def _refuse_other_content(
    config: PublishConfig, files: dict[str, str], existing: dict[str, tuple[str | None, str]]
) -> None:
    """Raise UsageError if the repository holds other files, or the same with another content."""
    if config.force:
        return
    for name, (sha256, blob) in existing.items():
        if name == ".gitattributes":
            continue
        if name not in files:
            what = f"holds {name}, which is not in {config.folder}"
        elif files[name] != sha256 and blob != _git_blob(config.folder / name):
            what = f"holds another {name}"
        else:
            continue
        raise UsageError(
            f"{config.repo} exists and {what}. Give another name, or add --force to replace the "
            "files of the same names"
        )


def _git_blob(path: Path) -> str:
    """Git's name of a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class _Hub:
    """The requests for one repository, with errors that say what to do."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import HfApi, get_token

        if get_token() is None:
            raise UsageError(
                "the Hub needs a token that may write: run `hf auth login`, or set HF_TOKEN"
            )
        self.repo, self._api = repo, HfApi()

    def existing(self) -> dict[str, tuple[str | None, str]] | None:
        """SHA-256 (of large files) and Git's name of each file; None if there is no repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            with _Explained(self.repo, self._api.endpoint):
                info = self._api.model_info(self.repo, files_metadata=True)
        except RepositoryNotFoundError:
            return None
        return {
            file.rfilename: (file.lfs.sha256 if file.lfs else None, str(file.blob_id))
            for file in info.siblings or ()
        }

    def create(self, public: bool) -> None:
        """Make the repository."""
        with _Explained(self.repo, self._api.endpoint):
            self._api.create_repo(self.repo, private=not public)

    def commit(self, folder: Path, names: list[str], message: str) -> str:
        """Upload files in one commit; return its address."""
        from huggingface_hub import CommitOperationAdd

        with _Explained(self.repo, self._api.endpoint):
            operations = [CommitOperationAdd(name, folder / name) for name in names]
            done = self._api.create_commit(self.repo, operations, commit_message=message)
        return str(done.commit_url)


class _Explained:
    """Turns the errors of huggingface_hub and of the connection into XinslmError."""

    def __init__(self, repo: str, endpoint: str) -> None:
        self._repo, self._endpoint = repo, endpoint

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

        if not isinstance(error, Exception) or isinstance(error, RepositoryNotFoundError):
            return
        status = getattr(getattr(error, "response", None), "status_code", None)
        first = next(iter(_sentences(error)), type(error).__name__)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            text = (
                f"the Hub refuses this token for {self._repo} ({status}): {first}. Take a token "
                "that may write there: `hf auth login`"
            )
        elif isinstance(error, HfHubHTTPError):
            text = f"the Hub refuses {self._repo} ({status}): {first}"
        elif type(error).__module__.startswith("httpx") or isinstance(error, OSError):
            text = f"the Hub at {self._endpoint} cannot be reached: {first}. Nothing was committed"
        else:
            text = f"the upload to {self._repo} failed: {first}. Nothing was committed"
        raise XinslmError(text) from None


def _sentences(error: Exception) -> Iterator[str]:
    """Lines of a message that say something."""
    text = getattr(error, "server_message", None) or str(error)
    return (line.strip().rstrip(".") for line in text.splitlines() if line.strip())
