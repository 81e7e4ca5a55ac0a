"""One S3 server for the session."""

from collections.abc import Iterator

import pytest

from isthmus.testing import s3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.S3Server]:
    """A running SeaweedFS; tests lay ``s3_server.environment`` over their own."""
    with s3.s3_server() as server:
        yield server
