"""A real S3 server on loopback (moto's), and the environment that leads s3fs and boto3 to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "something", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[Any]:
    """Yields a boto3 client of the server."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
            for name, value in KEYS.items():
                patch.setenv(name, value)
            # fsspec keeps its file systems, with the address that they were made with.
            s3fs.S3FileSystem.clear_instance_cache()
            yield boto3.client("s3")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
