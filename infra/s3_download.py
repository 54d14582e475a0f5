"""Whole objects of S3 into files, without asking first how large they are. Part of ``infra/s3.py``."""

from __future__ import annotations

from typing import IO, Any

_COPY_BYTES = 1 << 20


def into(file: IO[bytes], client: Any, bucket: str, key: str, transfer: Any) -> None:
    """Write an object into a file: by one request if it fits into a part, whose checksum is verified where the server keeps one, else in parallel ranges.

    Args:
        transfer: boto3's TransferConfig.
    """
    from boto3.s3.transfer import create_transfer_manager
    from s3transfer.subscribers import BaseSubscriber

    answer = client.get_object(Bucket=bucket, Key=key)
    size, etag, body = int(answer["ContentLength"]), answer.get("ETag"), answer["Body"]
    if size <= transfer.multipart_threshold:
        while data := body.read(_COPY_BYTES):
            file.write(data)
        return
    body.close()

    def say(future: Any, **_: Any) -> None:
        """What the first answer has said, and s3transfer would ask for."""
        future.meta.provide_transfer_size(size)
        if etag:
            future.meta.provide_object_etag(etag)

    known: Any = BaseSubscriber()
    known.on_queued = say
    with create_transfer_manager(client, transfer) as manager:
        manager.download(bucket=bucket, key=key, fileobj=file, subscribers=[known]).result()
