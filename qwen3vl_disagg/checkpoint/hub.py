"""`--model`: a folder, the small checkpoint inside the package, or ORG/NAME[@REVISION] of the Hugging Face hub.

From the hub, `config.json` comes first: a model of another architecture is refused before anything large is asked for.
Then come the small files, then exactly the safetensors files that the index names; pickled weights and code are never
asked for. Files land in the hub client's own cache (HF_HOME, HF_HUB_CACHE), from which a complete snapshot loads
without a network (HF_HUB_OFFLINE says not to try).
"""

from __future__ import annotations

import errno
import json
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

from qwen3vl_disagg.checkpoint.folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_config
from qwen3vl_disagg.core.errors import InputError
from qwen3vl_disagg.model.config import ARCHITECTURES

SMALL_FILES = (
    *("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja", INDEX_FILE),
)
_TINY = Path(__file__).parent.parent / "assets" / "tiny"
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]*[A-Za-z0-9_-])?")
_MAX_REPO = 96
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
    snapshot = _snapshot(model, hub.repo, hub.revision, [CONFIG_FILE])
    _check_architecture(model, snapshot)
    read_config(snapshot)
    commit = snapshot.name
    print(f"model {hub.repo} at {commit}", file=sys.stderr, flush=True)
    _snapshot(model, hub.repo, commit, SMALL_FILES)
    if weights:
        names = _weight_names(snapshot)
        _check_room(model, hub.repo, commit, names, snapshot)
        _snapshot(model, hub.repo, commit, names, is_shown=True)
        if missing := [name for name in names if not (snapshot / name).exists()]:
            reason = "pickled weights and code are not fetched" if names == [SINGLE_FILE] else f"{INDEX_FILE} names it"
            raise InputError(f"--model {model}: there is no {missing[0]} ({reason})", param="model")
    return snapshot


def _check_architecture(model: str, snapshot: Path) -> None:
    """InputError unless `config.json` is there and says one of the architectures that this package has."""
    try:
        raw = json.loads((snapshot / CONFIG_FILE).read_bytes())
    except FileNotFoundError:
        raise InputError(f"--model {model}: the repository has no {CONFIG_FILE}", param="model") from None
    except ValueError:
        raise InputError(f"--model {model}: {CONFIG_FILE} is not JSON", param="model") from None
    named = raw.get("architectures") if isinstance(raw, dict) else None
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise InputError(f"--model {model}: architecture {architecture!r} is not served, only {known}", param="model")


def _weight_names(snapshot: Path) -> list[str]:
    """The files that the index names, as far as they may be fetched; the single file where there is no index.

    What is wrong with the index is said when the folder is opened.
    """
    try:
        weight_map = json.loads((snapshot / INDEX_FILE).read_bytes())["weight_map"]
        names = {name for name in weight_map.values() if isinstance(name, str)}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return [SINGLE_FILE]
    return sorted(name for name in names if re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", name))


def _check_room(model: str, repo: str, commit: str, names: Sequence[str], snapshot: Path) -> None:
    """InputError before anything is fetched for which the disk has no room."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    with _explained(model, repo):
        try:
            files = snapshot_download(
                repo, revision=commit, allow_patterns=list(names), tqdm_class=_NoBar, dry_run=True
            )
        except DryRunError:
            return  # nothing can be fetched anyway
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    free = shutil.disk_usage(snapshot).free
    if missing > free:
        have = f"{missing / 2**30:.1f} GiB are to be fetched, {free / 2**30:.1f} GiB are free at {_cache()}"
        raise InputError(f"--model {model}: {have}", param="model")


def _snapshot(model: str, repo: str, revision: str | None, patterns: Sequence[str], *, is_shown: bool = False) -> Path:
    """Fetch what the cache lacks of the files named. `is_shown`: with a bar, where stderr is a terminal."""
    from huggingface_hub import snapshot_download

    with _explained(model, repo):
        bar = None if is_shown and sys.stderr.isatty() else _NoBar
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), tqdm_class=bar))


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

    lacks = f"the cache at {_cache()} does not hold all of it"
    match error:
        case errors.GatedRepoError():
            return f"gated: ask for access at https://huggingface.co/{repo}, then {_TOKEN_HELP}"
        case errors.RepositoryNotFoundError():
            return f"no such folder, and no such repository on the hub, or a private one that needs {_TOKEN_HELP}"
        case errors.RevisionNotFoundError():
            return f"the repository {repo} has no such revision"
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return f"HF_HUB_OFFLINE is set, and {lacks}"
        case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError() as cause):
            return f"the hub answered {cause.response.status_code}, and {lacks}"
        case errors.LocalEntryNotFoundError():
            return f"the hub cannot be reached, and {lacks}"
        case errors.HfHubHTTPError(response=response) if response.status_code == 401:
            return f"the hub refused the token: {_TOKEN_HELP}"
        case errors.HfHubHTTPError(response=response):
            return f"the hub answered {response.status_code}"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"no room left at {_cache()}"
        case OSError(strerror=str() as reason):
            return f"cannot write to the cache at {_cache()}: {reason}"
    return f"the download broke off ({type(error).__name__}): start again, complete files are kept"


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE
