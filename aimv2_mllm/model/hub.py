"""Where weights lie: a folder, or a repository of the Hugging Face hub, downloaded.

Only configs, safetensors, the card and the licence are ever downloaded; no code is. What has been
found once stays the same commit in this process, whatever happens on the hub meanwhile.
"""

import os
import re
import socket
from collections.abc import Sequence
from os.path import exists, isdir  # pathlib's raise on a name that is too long
from pathlib import Path
from urllib.parse import urlsplit

from ..errors import UsageError, first_line
from .shapes import shapes_only

# `model*`: the same repositories hold the weights of other frameworks too.
HUB_FILES = [
    "config.json",
    "preprocessor_config.json",
    "stage.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "LICENSE*",
]
# Those that say what a repository has and under what licence, where others load its weights.
FACTS = ["config.json", "stage.json", "README.md", "LICENSE*"]
COMMITS: dict[str, str] = {}  # of what was found, by org/name or org/name@revision
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
TIMEOUT = 10  # seconds until the hub must have answered


def locate(
    source: str | Path, revision: str | None = None, files: Sequence[str] = HUB_FILES
) -> Path:
    """The folder of `source`: itself, or what was downloaded of such `files` from the hub for it.

    A text `org/name` or `org/name@revision` that is no folder here is the hub's; a Path never is.
    What was downloaded before serves when the hub cannot be reached. Raises UsageError when there
    is nothing.
    """
    if isdir(source):
        if revision is not None:
            raise UsageError(
                f"{source} is a folder, which has no revision {revision}: leave it out"
            )
        return Path(source)
    if exists(source):
        raise UsageError(f"{source} is a file: give the folder that holds it")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise UsageError(
            f"{source} is not a folder: give one that holds config.json and model.safetensors, or "
            "a hub id such as apple/aimv2-large-patch14-224"
        )
    repository, _, named = source.partition("@")
    if named and revision is not None and named != revision:
        raise UsageError(f"{source} names a revision, and another is asked for: {revision}")
    wanted = revision or named or None
    key = f"{repository}@{wanted}" if wanted else repository
    folder = _download(repository, COMMITS.get(key, wanted), files)
    COMMITS[key] = folder.name
    return folder


def facts_folder(source: str | Path) -> Path:
    """The folder that says what `source` is: itself, or of a hub id what was downloaded without its
    weights."""
    is_on_hub = not isdir(source) and HUB_ID.fullmatch(str(source))
    return locate(str(source), files=FACTS) if is_on_hub else Path(source)


def pinned(source: str | Path) -> tuple[str, dict[str, str]]:
    """What transformers' loaders are to be given for `source`, a folder or a hub id: its name, and
    as `revision` the commit where it is the hub's. UsageError when that is not to be had."""
    commit = commit_of(source, facts_folder(source))
    return (str(source).partition("@")[0], {"revision": commit}) if commit else (str(source), {})


def stay_offline_unless_reached() -> None:
    """Tell the libraries that are not imported yet to look only at what was downloaded before, if
    the hub does not answer: each would try six times for every file."""
    proxies = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    if any(name in os.environ for name in proxies):
        return
    end = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = end.port or (80 if end.scheme == "http" else 443)
    try:
        socket.create_connection((end.hostname or "", port), timeout=3.0).close()
    except OSError:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def commit_of(source: str | Path, folder: Path) -> str | None:
    """The commit of `folder` where it was downloaded for `source`, else None: the hub's cache has
    its folders as `snapshots/COMMIT`."""
    downloaded = not isdir(source) and folder.parent.name == "snapshots"
    return folder.name if downloaded else None


def _download(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise UsageError(
            f"{repository} is no folder here, and a download from the hub needs huggingface_hub: "
            "pip install 'aimv2-mllm[hub]'"
        ) from None
    page = f"https://huggingface.co/{repository}"
    wanted = [name for name in files if not (shapes_only() and name.endswith(".safetensors"))]
    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, etag_timeout=TIMEOUT
        )
        return Path(path)
    # It raises types of the network libraries below it too, others with every release.
    except Exception as error:
        known = {
            errors.GatedRepoError: f"is gated: accept its terms at {page}, then `hf auth login`",
            errors.RevisionNotFoundError: f"has no revision {revision}: see {page}/commits/main",
            errors.RepositoryNotFoundError: "is neither a folder here nor a repository that the "
            "hub shows: correct the name, or `hf auth login` if it is private",
            errors.LocalEntryNotFoundError: "is no folder here, and the hub cannot be reached: "
            "download it where there is a network and give the folder",
        }
        said = next((text for kind, text in known.items() if isinstance(error, kind)), None)
        said = said or f"cannot be downloaded ({first_line(error)})"
        raise UsageError(f"{repository} {said}") from None
