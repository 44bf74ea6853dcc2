"""Several processes: what torchrun's environment says, shares, collectives, equal training."""

import pytest

from common.errors import InputError
from common.world import ALONE, World


def test_world_is_what_torchrun_says() -> None:
    assert World.of({}) == ALONE == World(0, 1, 0)
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert World.of(environment) == World(5, 8, 1)
    for name, value in (("RANK", "8"), ("RANK", "x"), ("LOCAL_RANK", "6")):
        with pytest.raises(InputError, match=f"{name}={value}"):
            World.of(environment | {name: value})


@pytest.mark.parametrize(("items", "size"), [(7, 3), (2, 3), (0, 3), (8, 4), (5, 1)])
def test_shares_are_all_items_in_order_and_padded_to_one_length(items: int, size: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    shares = [world.share(items) for world in worlds]
    assert [i for share in shares for i in share] == list(range(items))
    most = max(map(len, shares))
    assert worlds[0].largest_share(items) == most
    for world, share in zip(worlds, shares, strict=True):
        padded = world.padded_share(items)
        assert (
            padded[: len(share)]
            == list(share)
            == list(ALONE.share(items))[share.start : share.stop]
        )
        assert len(padded) == most and set(padded) <= set(range(items))
