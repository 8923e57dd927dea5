r"""What the tests on a real cluster share: one cluster, launched once by `ray up`."""

from collections.abc import Iterator

import pytest
from lab import Lab, laboratory, obstacle


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    r"""The hosts, with a cluster on them and tiny data in its root."""

    if why := obstacle():
        pytest.exit(f"{why}.", returncode=1)

    with laboratory(tmp_path_factory.mktemp("hosts")) as lab:
        lab.data()
        lab.up()
        yield lab
