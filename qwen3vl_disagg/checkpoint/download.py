"""`--model`: a folder, the small checkpoint inside the package, or ORG/NAME[@REVISION] of the Hugging Face hub.

From the hub, `config.json` comes first: a model of another architecture is refused before anything large is asked for.
Then come the small files, then exactly the safetensors files that the index names; pickled weights and code are never
asked for. Files land in the hub client's own cache (HF_HOME, HF_HUB_CACHE), from which a complete snapshot loads
without a network (HF_HUB_OFFLINE says not to try).
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen3vl_disagg.checkpoint.folder import CONFIG_FILE, INDEX_FILE, MAX_JSON_BYTES, SINGLE_FILE, read_config
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.core.json_text import parse_json, shown
from qwen3vl_disagg.model.config import ARCHITECTURES

logger = logging.getLogger(__name__)
SMALL_FILES = (
    *("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja", INDEX_FILE),
    "modules.json",
)
_TINY = Path(__file__).parent.parent / "assets" / "tiny"
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
_MAX_REPO = 96
_ALWAYS = ("generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
_TEMPLATES = ("chat_template.json", "chat_template.jinja")
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)
_TOKEN_HELP = "`hf auth login`, or HF_TOKEN"


@dataclass(frozen=True)
class HubId:
    """A repository of models and one of its revisions (branch, tag or commit; None for the default branch)."""

    repo: str
    revision: str | None

    @classmethod
    def parse(cls, model: str) -> HubId | None:
        """None for what is spelled as a path. InputError for what is neither a path nor a possible name."""
        repo, at, revision = model.partition("@")
        if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
            return None
        parts = repo.split("/")
        good = len(repo) <= _MAX_REPO and all(_NAME.fullmatch(part) for part in parts)
        if not good or "--" in repo or ".." in repo or repo.endswith(".git"):
            raise InputError(f"--model {model}: no such folder, and no possible ORG/NAME of the hub", param="model")
        if at and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
            raise InputError(f"--model {model}: {revision!r} is no possible revision", param="model")
        return cls(repo, revision or None)


def hub_id(model: str | None) -> HubId | None:
    """The hub's name if `model` is one: a folder that exists wins over a name of the same spelling."""
    return None if model is None or Path(model).is_dir() else HubId.parse(model)


def resolve_model_folder(model: str | None, *, weights: bool = True) -> Path:
    """The checkpoint folder: the one given, the small one inside the package, or a snapshot of a hub's repository.

    A snapshot is fetched as far as the cache lacks it, and its commit is said in one line on stderr. Without
    `weights`, only what config, prompts and sizes need. InputError of one line when there is nothing to be had,
    CheckpointError when a config of the right architecture cannot be used.
    """
    hub = hub_id(model)
    if hub is not None and model is not None:
        return _fetch(model, hub, weights)
    folder = _TINY if model is None else Path(model)
    if not folder.is_dir():
        raise InputError(f"--model {folder}: no such folder (of the hub: ORG/NAME)", param="model")
    return folder


def model_name(folder: Path) -> str:
    """What to call the model of a folder: the folder's name; of a snapshot in a hub cache, ORG/NAME."""
    real = folder.resolve()
    repo = real.parent.parent.name
    if real.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/")
    return real.name


def _fetch(model: str, hub: HubId, weights: bool) -> Path:
    """The snapshot of a repository. The first answer fixes the commit: everything later comes from the same."""
    if (complete := _complete_snapshot(model, hub, weights)) is not None:
        logger.info("model %s at %s", hub.repo, complete.name)
        return complete
    download = _Download(model, hub.repo, _why_unreachable(model, hub))
    snapshot = download.take(hub.revision, [CONFIG_FILE])
    download.require(snapshot, [CONFIG_FILE], "the repository has no {}")
    _check_architecture(model, snapshot)
    read_config(snapshot)
    logger.info("model %s at %s", hub.repo, snapshot.name)
    download.take(snapshot.name, SMALL_FILES)
    if weights:
        names = _weight_names(snapshot)
        download.check_room(snapshot, names)
        download.take(snapshot.name, names, is_shown=True)
        reason = "pickled weights and code are not fetched" if names == [SINGLE_FILE] else f"{INDEX_FILE} names it"
        download.require(snapshot, names, f"there is no {{}} ({reason})")
    return snapshot


def _complete_snapshot(model: str, hub: HubId, weights: bool) -> Path | None:
    """The snapshot of a commit that the cache holds whole: no need to ask the hub. None for all else.

    The client knows what belongs to a snapshot where it kept the repository's list of files. Other clients and older
    ones keep none: then what such a model always has must be there.
    """
    if not re.fullmatch(r"[0-9a-f]{40}", hub.revision or ""):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [CONFIG_FILE, *SMALL_FILES]
    with _explained(model, hub.repo):
        try:
            found = snapshot_download(hub.repo, revision=hub.revision, allow_patterns=patterns, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
    snapshot = Path(found)
    is_listed = (snapshot.parent.parent / "trees" / f"{snapshot.name}.json").exists()
    names = [CONFIG_FILE, *(() if is_listed else _ALWAYS), *(_weight_names(snapshot) if weights else ())]
    has_template = is_listed or any((snapshot / name).exists() for name in _TEMPLATES)
    if not has_template or not all((snapshot / name).exists() for name in names):
        return None
    _check_architecture(model, snapshot)
    read_config(snapshot)
    return snapshot


def _why_unreachable(model: str, hub: HubId) -> Exception | None:
    """What is in the way of asking the hub; None if it answers.

    Settled once and first: without a network the client would try for 20 s in each of its calls, and where it then
    takes what the cache holds, it does not say so.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    revision = hub.revision or constants.DEFAULT_REVISION
    with _explained(model, hub.repo):
        try:
            HfApi().model_info(hub.repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except RevisionNotFoundError:
            raise
        except Exception as error:  # of httpx, of httpx2, of the client itself: perhaps the cache holds everything
            return error
    return None


class _NotCachedError(Exception):
    """The cache lacks something, and the hub cannot be asked because of `__cause__`."""


@dataclass(frozen=True)
class _Download:
    """Files of a repository, from the hub, or from the cache alone if it is `unreachable`. InputError for failures."""

    model: str
    repo: str
    unreachable: Exception | None

    def take(self, revision: str | None, patterns: Sequence[str], *, is_shown: bool = False) -> Path:
        """Fetch what the cache lacks of the files named. `is_shown`: with a bar, where stderr is a terminal."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        bar = None if is_shown and sys.stderr.isatty() else _NoBar
        with _explained(self.model, self.repo):
            try:
                folder = snapshot_download(
                    self.repo,
                    revision=revision,
                    allow_patterns=list(patterns),
                    tqdm_class=bar,
                    local_files_only=self.unreachable is not None,
                )
            except LocalEntryNotFoundError:
                if self.unreachable is None:
                    raise
                raise _NotCachedError from self.unreachable
        return Path(folder)

    def require(self, snapshot: Path, names: Sequence[str], reason: str) -> None:
        """InputError, with a file's name in `reason`, if the repository lacks it."""
        missing = [name for name in names if not (snapshot / name).exists()]
        if missing and self.unreachable is not None:
            with _explained(self.model, self.repo):
                raise _NotCachedError from self.unreachable
        if missing:
            raise InputError(f"--model {self.model}: {reason.format(missing[0])}", param="model")

    def check_room(self, snapshot: Path, names: Sequence[str]) -> None:
        """InputError before anything is fetched for which the disk has no room."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import DryRunError

        if self.unreachable is not None:
            return
        with _explained(self.model, self.repo):
            try:
                files = snapshot_download(
                    self.repo, revision=snapshot.name, allow_patterns=list(names), tqdm_class=_NoBar, dry_run=True
                )
            except DryRunError:
                return  # nothing can be fetched anyway
        missing = sum(file.file_size or 0 for file in files if file.will_download)
        free = shutil.disk_usage(snapshot).free
        if missing > free:
            have = f"{missing / 2**30:.1f} GiB are to be fetched, {free / 2**30:.1f} GiB are free at {_cache()}"
            raise InputError(f"--model {self.model}: {have}", param="model")


def _check_architecture(model: str, snapshot: Path) -> None:
    """InputError unless `config.json` says one of the architectures that this package has."""
    try:
        raw = _parsed(snapshot / CONFIG_FILE)
    except ValueError as error:
        raise InputError(f"--model {model}: {CONFIG_FILE} is not JSON: {error}", param="model") from None
    named = raw.get("architectures") if isinstance(raw, dict) else None
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in ARCHITECTURES:
        wrong = f"architecture {shown(architecture)} is not served, only {' and '.join(ARCHITECTURES)}"
        raise InputError(f"--model {model}: {wrong}", param="model")


def _weight_names(snapshot: Path) -> list[str]:
    """The files that the index names, as far as they may be fetched; the single file where there is no index.

    What is wrong with the index is said when the folder is opened.
    """
    try:
        weight_map = _parsed(snapshot / INDEX_FILE)["weight_map"]
        names = {name for name in weight_map.values() if isinstance(name, str)}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return [SINGLE_FILE]
    return sorted(name for name in names if re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", name))


def _parsed(path: Path) -> Any:
    """ValueError for what is not JSON, or too much of it."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
    return parse_json(path.read_bytes())


class _NoBar(tqdm):
    """A progress bar that shows nothing."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.pop("name", None)  # the client's own bars have one
        super().__init__(*args, **options | {"disable": True})


@contextmanager
def _explained(model: str, repo: str) -> Iterator[None]:
    """What the client raises becomes an InputError of one line in our words: its own hold addresses, and long advice.

    Its log keeps silent meanwhile, for the same reason.
    """
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:  # of httpx, of httpx2, of the client itself, of the operating system
        raise InputError(f"--model {model}: {_reason(error, repo)}", param="model") from error
    finally:
        log.setLevel(level)


def _reason(error: Exception, repo: str) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    lacks = ""
    if isinstance(error, (_NotCachedError, errors.LocalEntryNotFoundError)):
        lacks = f", and the cache at {_cache()} does not hold all of it"
        cause = error.__cause__
        if constants.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set{lacks}"
        if not isinstance(cause, errors.HfHubHTTPError):
            return f"the hub cannot be reached{lacks}"
        error = cause
    match error:
        case errors.GatedRepoError():
            return f"gated: ask for access at https://huggingface.co/{repo}, then {_TOKEN_HELP}"
        case errors.RepositoryNotFoundError():
            return f"no such folder, and no such repository on the hub, or a private one that needs {_TOKEN_HELP}"
        case errors.RevisionNotFoundError():
            return f"the repository {repo} has no such revision"
        case errors.HfHubHTTPError(response=response) if response.status_code == 401:
            return f"the hub refused the token: {_TOKEN_HELP}"
        case errors.HfHubHTTPError(response=response):
            return f"the hub answered {response.status_code}{lacks}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"no room left at {_cache()}"
        case OSError(errno=number, strerror=str() as reason) if number in _CANNOT_WRITE:
            return f"cannot write to the cache at {_cache()}: {reason}"
    what = getattr(error, "strerror", None) or type(error).__name__
    return f"the download broke off ({what}): start again, complete files are kept"


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
