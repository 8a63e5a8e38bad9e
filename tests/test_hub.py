"""Weights by their hub id: what is asked for, and one line for whatever goes wrong. No network."""

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from test_namings import assert_same, tiny_encoder

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model import hub
from aimv2_mllm.model.weights import load_encoder, save_encoder


def test_a_hub_id_without_a_network_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        load_encoder("apple/aimv2-large-patch14-224@main")
    assert str(caught.value).startswith("apple/aimv2-large-patch14-224 is no folder here, and the")
    assert "\n" not in str(caught.value)


def test_what_was_downloaded_before_serves_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--name"
    save_encoder(tiny_encoder(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for source, revision in (
        ("org/name", None),
        ("org/name@main", None),
        ("org/name", commit),
        (f"org/name@{commit}", commit),
    ):
        assert hub.commit_of(source, hub.locate(source, revision)) == commit
        loaded = load_encoder(source, revision=revision)
        assert_same(loaded.state_dict(), tiny_encoder().state_dict())
    with pytest.raises(UsageError, match="names a revision, and another is asked for: other"):
        load_encoder("org/name@main", revision="other")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepoError", "is gated: accept its terms at https://huggingface.co/org/name, then"),
        ("RepositoryNotFoundError", "is neither a folder here nor a repository that the hub shows"),
        (
            "RevisionNotFoundError",
            "has no revision v9: see https://huggingface.co/org/name/commits",
        ),
        ("LocalEntryNotFoundError", "is no folder here, and the hub cannot be reached"),
        ("XetDownloadError", r"cannot be downloaded \(first line\)"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(
    monkeypatch: pytest.MonkeyPatch, error: str, said: str
) -> None:
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error)

    def refuse(*_: object, **__: object) -> str:
        raise kind.__new__(kind, "first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UsageError, match=f"org/name {said}") as caught:
        load_encoder("org/name", revision="v9")
    assert "second line" not in str(caught.value)


def test_without_the_hub_library_the_exact_line_to_install_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'aimv2-mllm\[hub\]'"):
        load_encoder("apple/aimv2-large-patch14-224")


def test_only_configs_safetensors_and_texts_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def snapshot(repository: str, **options: object) -> str:
        asked.update(options, repository=repository)
        raise OSError("enough")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(UsageError, match="enough"):
        load_encoder("org/name@v1.0")
    assert (asked["repository"], asked["revision"]) == ("org/name", "v1.0")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    for name in ("modeling.py", "pytorch_model.bin", "mlx_model.safetensors", "flax_model.msgpack"):
        assert not any(fnmatch(name, pattern) for pattern in patterns), name
    for name in ("config.json", "model.safetensors", "model-00001-of-00003.safetensors"):
        assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize(
    "source", ["nowhere", "./a/b", "/a/b", "a/b/c", "a b/c", "", "a/b@", "x" * 5000]
)
def test_what_is_no_folder_and_cannot_be_a_hub_id_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match=r"is not a folder: give one that holds .*or a hub id"):
        load_encoder(source)


def test_a_file_and_a_revision_of_a_folder_are_refused(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(), tmp_path)
    with pytest.raises(UsageError, match=r"model.safetensors is a file: give the folder"):
        load_encoder(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="is a folder, which has no revision v1"):
        load_encoder(tmp_path, revision="v1")


def test_a_hub_that_cannot_be_reached_is_said_within_seconds(tmp_path: Path) -> None:
    """Not told to be offline: it tries, at a port of this machine where nobody listens."""
    code = (
        "import time, huggingface_hub.errors\n"
        "from aimv2_mllm import load_encoder\n"
        "begun = time.monotonic()\n"
        "try: load_encoder('apple/aimv2-large-patch14-224')\n"
        "except ValueError as error: print(time.monotonic() - begun, error)\n"
    )
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    environment = {**os.environ, **unreachable, "PYTHONPATH": str(Path(hub.__file__).parents[2])}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    seconds, _, said = done.stdout.partition(" ")
    assert float(seconds) < 10
    assert said.startswith("apple/aimv2-large-patch14-224 is no folder here, and the hub cannot be")
    assert said.count("\n") == 1
