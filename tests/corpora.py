"""Small corpora for tests: sheets of the embedded world as JPEG, in shards, folders and lists."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from aimv2_mllm.data.handwriting import scenes


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    """`picture` as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **{"quality": 92, **options})
    return buffer.getvalue()


def sheet(index: int, size: int = 96) -> tuple[bytes, str]:
    """Training sheet `index` of the embedded world: a JPEG and its caption."""
    scene = scenes.scene(0, "train", index)
    return jpeg(Image.fromarray(scenes.render(scene, size))), scenes.caption(scene)


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """A tar file of regular files by name, or of members that are given whole."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shard(path: Path, indices: Iterable[int], size: int = 96) -> Path:
    """A shard of those sheets as WebDataset lays them out."""
    members = {}
    for index in indices:
        picture, caption = sheet(index, size)
        members[f"{index:06}.jpg"] = picture
        members[f"{index:06}.txt"] = caption.encode()
    return write_tar(path, members)
