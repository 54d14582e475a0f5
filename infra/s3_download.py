"""Downloads of whole S3 objects into files, without a request that first asks for the size. Part of ``infra/s3.py``."""

from __future__ import annotations

from typing import IO, Any

_COPY_BYTES = 1 << 20


def into(file: IO[bytes], client: Any, bucket: str, key: str, transfer: Any) -> None:
    """Write an object into a file. One no larger than a part takes one request, and its checksum is verified if the server keeps one; others come in parallel
    ranges.

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
        """Tell s3transfer what the first answer has said, so that it does not ask again."""
        future.meta.provide_transfer_size(size)
        if etag:
            future.meta.provide_object_etag(etag)

    known: Any = BaseSubscriber()
    known.on_queued = say
    with create_transfer_manager(client, transfer) as manager:
        manager.download(bucket=bucket, key=key, fileobj=file, subscribers=[known]).result()
