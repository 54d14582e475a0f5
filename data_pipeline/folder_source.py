"""A folder of images with same-named .txt files, one caption a line; local or s3://."""

from __future__ import annotations

from data_pipeline.pairs import Pair
from infra import storage
from infra.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


class FolderSource:
    """Images below a folder that have a same-named .txt file. The group of an image is its path below the folder, without suffix."""

    def __init__(self, url: str) -> None:
        self.url = url

    def keys(self) -> list[str]:
        """Relative paths of the images, sorted.

        Raises:
            DataError: the folder is missing, or holds no image with a caption file.
        """
        names = [name for name in storage.list_files(self.url) if not name.rsplit("/", 1)[-1].startswith(".")]
        if not names:
            raise DataError(
                f"{self.url}: no such folder, or it is empty; data.sources accepts 'emoji' and folders of images with same-named .txt files."
            )
        texts = {name[: -len(".txt")] for name in names if name.endswith(".txt")}
        keys = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and name.rsplit(".", 1)[0] in texts]
        if not keys:
            raise DataError(
                f"{self.url}: none of its {len(names)} files is an image with a same-named .txt file; expected for example apple.png "
                f"({', '.join(IMAGE_SUFFIXES)}) beside apple.txt, one caption a line."
            )
        return keys

    def read(self, key: str) -> Pair:
        """Read one image and its captions. Bytes of the .txt that are not UTF-8 are replaced.

        Raises:
            DataError: a file has vanished.
        """
        stem = key.rsplit(".", 1)[0]
        text = storage.read_bytes(storage.join(self.url, stem + ".txt")).decode("utf-8-sig", errors="replace")
        captions = tuple(line.strip() for line in text.splitlines() if line.strip())
        return Pair(f"{self.url}/{key}", captions, storage.read_bytes(storage.join(self.url, key)), self.url, "unknown", self.group(key))

    def group(self, key: str) -> str:
        return f"folder/{key.rsplit('.', 1)[0]}"  # without the URL: a folder that moves keeps its split

    def version(self) -> str:
        return "folder/1"

    def credits(self) -> dict[str, str]:
        return {self.url: f"Images and captions from {self.url}; their licence is not recorded."}
