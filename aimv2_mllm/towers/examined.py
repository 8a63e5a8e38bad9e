"""What both doctors say alike: the versions of packages, and a sample as it is learned."""

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import torch

IGNORED = -100  # the label of what is not learned


def versions(packages: Sequence[str], others: Sequence[str] = ()) -> str:
    """Python's, those of `packages`, or that there is none, and of `others` that are there; and the
    device."""
    found = [f"python {platform.python_version()}"]
    for package in (*packages, *others):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found += [f"no {package}"] if package in packages else []
    return ", ".join([*found, "cuda" if torch.cuda.is_available() else "cpu"])


def shown(
    ids: list[int],
    labels: list[int],
    decode: Callable[[list[int]], str],
    *,
    image: int,
    stands_for: int,
) -> Iterator[str]:
    """A sample in runs of tokens that are learned and that are not, a line each; a token `image`
    stands for so many of a picture."""

    def kind(pair: tuple[int, int]) -> str:
        token, label = pair
        unlearned = "image" if token == image else "not learned"
        return unlearned if label == IGNORED else "learned"

    for name, pairs in groupby(zip(ids, labels, strict=True), kind):
        tokens = [token for token, _ in pairs]
        is_image = name == "image"
        text = f"<image> ({stands_for * len(tokens)} tokens)" if is_image else repr(decode(tokens))
        yield f"{name:11} {text}"
