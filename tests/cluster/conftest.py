r"""What the tests on a real cluster share: one cluster, launched once by `ray up`."""

from collections.abc import Iterator

import pytest
from lab import Lab, laboratory, obstacle


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    r"""The hosts, with a cluster on them and tiny data in its root."""

    if why := obstacle():
        pytest.exit(f"{why}.", returncode=1)

    with laboratory() as lab:
        lab.data()
        lab.up()
        yield lab
