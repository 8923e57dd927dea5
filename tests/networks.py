r"""Score networks: a small one, and that of a run by SDA."""

from pathlib import Path

from sda_ray.core.config import CONFIG
from sda_ray.nn.score import MCScoreNet, make_score, network_settings

__all__ = ["REFERENCE", "RUN", "SMALL", "small"]

REFERENCE = Path(__file__).parent / "reference"
RUN = REFERENCE / "runs" / "crimson-cloud-4_6k7cjnx7"

SMALL = CONFIG | {
    "window": 3,
    "embedding": 8,
    "hidden_channels": (4, 6),
    "hidden_blocks": (1, 1),
}


def small(size: int = 16, **changes: object) -> MCScoreNet:
    return make_score(**network_settings(SMALL | changes), size=size)
