import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import ViewsConfig
from roadwork_dist.photos.views import (
    ViewGeometry,
    geometry_for,
    layout_of,
    make_views,
    photo_boxes,
    reduction_of,
    tile_offsets,
    turn_upright,
)

SIDES = st.integers(64, 6000)


def tensor_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def photo(width: int, height: int) -> Image.Image:
    """A real photograph, resized."""
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.Resampling.LANCZOS)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.float() - b.float()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def test_a_dash_camera_photo_has_the_offsets_of_the_specification() -> None:
    layout = layout_of(ViewGeometry(512), 4032, 3024)
    assert layout.shared == layout.padded == (1280, 960)
    assert layout.tiles == tuple((x, y) for y in (0, 224, 448) for x in (0, 384, 768))
    assert layout.squares == ((160, 0), (320, 0))
    boxes = photo_boxes(ViewGeometry(512), 4032, 3024)
    assert boxes[0] == (0, 0, 4032, 3024)
    assert boxes[1] == pytest.approx((0, 0, 1612.8, 1612.8))
    assert boxes[-1] == pytest.approx((1008, 0, 3024, 3024))


@settings(max_examples=150, deadline=None)
@given(
    SIDES,
    SIDES,
    st.sampled_from([32, 224, 512, 518]),
    st.sampled_from([(3, 2.5), (2, 2.0), (4, 2.5), (5, 5.0)]),
)
def test_tiles_cover_every_pixel_of_any_photo(
    width: int, height: int, size: int, grid: tuple[int, float]
) -> None:
    geometry = ViewGeometry(size, *grid, policy="all")
    layout = layout_of(geometry, width, height)
    assert len(layout.tiles) == grid[0] ** 2
    for axis in (0, 1):
        assert layout.shared[axis] + layout.origin[axis] <= layout.padded[axis]
        starts = sorted({tile[axis] for tile in layout.tiles})
        assert starts[0] == 0
        assert starts[-1] == layout.padded[axis] - size
        assert all(b - a <= size for a, b in itertools.pairwise(starts))
    assert set(layout.tiles) == set(
        itertools.product({x for x, _ in layout.tiles}, {y for _, y in layout.tiles})
    )


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES)
def test_the_shared_image_follows_the_aspect_rules(width: int, height: int) -> None:
    size = 64
    layout = layout_of(ViewGeometry(size, policy="all"), width, height)
    aspect = max(width, height) / min(width, height)
    long, short = max(layout.shared), min(layout.shared)
    if aspect <= 2.5:
        assert (long, short) == (160, pytest.approx(160 / aspect, abs=1))
    elif aspect <= 3:
        assert (long, short) == (pytest.approx(size * aspect, abs=1), size)
    else:
        assert (long, short) == (3 * size, pytest.approx(3 * size / aspect, abs=1))
    assert min(layout.padded) >= size
    assert (layout.shared[0] > layout.shared[1]) == (width > height) or long - short <= 1


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES)
def test_a_portrait_photo_is_the_transposed_landscape_one(width: int, height: int) -> None:
    if width == height:
        return
    geometry = ViewGeometry(48, policy="all")
    for box, other in zip(
        photo_boxes(geometry, width, height), photo_boxes(geometry, height, width), strict=True
    ):
        assert box == (other.top, other.left, other.height, other.width)


@pytest.mark.parametrize("size", [(300, 200), (300, 111), (400, 90), (200, 200), (97, 64)])
def test_views_of_a_transposed_photo_are_transposed(size: tuple[int, int]) -> None:
    geometry = ViewGeometry(48, policy="all")
    image = tensor_of(photo(*size))
    views, other = make_views(image, geometry), make_views(image.transpose(1, 2), geometry)
    assert views.shape == (12, 3, 48, 48)
    if size[0] == size[1]:  # a square counts as landscape both times: tiles come in another order
        other[1:10] = other[1:10].reshape(3, 3, 3, 48, 48).transpose(0, 1).reshape(9, 3, 48, 48)
        views, other = views[:11], other[:11]
    # Not bit-identical: the two passes of the resize round to integers in the other order.
    assert psnr(views, other.transpose(2, 3)) >= 50


def test_views_are_close_to_direct_lanczos_crops() -> None:
    geometry, image = ViewGeometry(128), photo(1008, 756)
    views = make_views(tensor_of(image), geometry)
    for view, box in zip(views, photo_boxes(geometry, 1008, 756), strict=True):
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        direct = image.resize((128, 128), Image.Resampling.LANCZOS, box=edges)
        assert psnr(view, tensor_of(direct)) >= 41


def stored(upright: torch.Tensor, orientation: int) -> torch.Tensor:
    """How a camera stores the upright pixels under a value of the tag: the inverse of the turn."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    return turn_upright(upright, inverse)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(30, 300),
    st.integers(30, 300),
    st.integers(1, 8),
    st.sampled_from(["auto", "all", "global"]),
    st.integers(0, 9),
)
def test_a_turned_photo_of_any_shape_gives_the_views_of_the_upright_one(
    width: int, height: int, orientation: int, policy: str, seed: int
) -> None:
    geometry = ViewGeometry(40, policy=policy)  # type: ignore[arg-type]
    noise = torch.randint(0, 256, (3, 6, 8), generator=torch.Generator().manual_seed(seed)).float()
    image = torch.nn.functional.interpolate(noise[None], size=(height, width), mode="bilinear")[0].byte()
    views = make_views(image, geometry)
    turned = make_views(stored(image, orientation), geometry, (width, height), orientation)
    assert turned.shape == views.shape
    assert turned.is_contiguous()
    # The passes of the resize round to integers, in another order where the axes are swapped.
    assert (views.int() - turned.int()).abs().max() <= 3
    if orientation in (1, 4):
        assert psnr(views + 0.0, turned + 1e-3) > 50


def test_tiles_are_slices_of_the_shared_image() -> None:
    image = photo(320, 240)  # already as large as the shared image of S = 128
    views = make_views(tensor_of(image), ViewGeometry(128))
    whole = tensor_of(image)
    assert torch.equal(views[1], whole[:, :128, :128])
    assert torch.equal(views[5], whole[:, 56:184, 96:224])
    assert torch.equal(views[9], whole[:, 112:, 192:])


def test_a_very_long_photo_is_padded_with_the_mean_colour_and_its_squares_are_not() -> None:
    geometry = ViewGeometry(64, policy="all", pad_colour=(10, 200, 30))
    views = make_views(torch.full((3, 100, 1000), 77, dtype=torch.uint8), geometry)
    assert (views[1, :, :20] == torch.tensor([10, 200, 30])[:, None, None]).all()
    assert (views[1, :, 32] == 77).all()
    for unpadded in (0, 10, 11):
        assert (views[unpadded] == 77).all()
    tall = make_views(torch.full((3, 1000, 100), 77, dtype=torch.uint8), geometry)
    assert torch.equal(tall, views.transpose(2, 3))


def test_policy() -> None:
    small, large = (torch.zeros(3, height, 400, dtype=torch.uint8) for height in (95, 96))
    assert make_views(small, ViewGeometry(64)).shape == (1, 3, 64, 64)
    assert make_views(large, ViewGeometry(64)).shape == (12, 3, 64, 64)
    assert make_views(small, ViewGeometry(64, policy="all")).shape == (12, 3, 64, 64)
    assert make_views(large, ViewGeometry(64, policy="global")).shape == (1, 3, 64, 64)
    assert ViewGeometry(64, policy="global").max_views == 1


def test_the_layout_is_that_of_the_photo_where_the_decode_is_reduced() -> None:
    geometry = ViewGeometry(64)
    reduced = torch.zeros(3, 90, 120, dtype=torch.uint8)  # on its own too small for tiles
    assert len(make_views(reduced, geometry)) == 1
    assert len(make_views(reduced, geometry, (1200, 900))) == 12


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.sampled_from(["auto", "all", "global"]), st.sampled_from([32, 224, 512]))
def test_a_reduced_decode_is_never_enlarged_and_has_whole_columns(
    width: int, height: int, policy: str, size: int
) -> None:
    geometry = ViewGeometry(size, policy=policy)  # type: ignore[arg-type]
    reduction = reduction_of(geometry, width, height)
    shared = layout_of(geometry, width, height).shared

    def fits(by: int) -> bool:
        pairs = zip((width, height), shared, strict=True)
        return all(side % by == 0 and side // by >= needed for side, needed in pairs)

    assert reduction == max(by for by in (1, 2, 4, 8) if by == 1 or fits(by))
    assert reduction_of(replace(geometry, quality="exact"), width, height) == 1


def test_a_dash_camera_photo_is_decoded_at_half_its_size() -> None:
    assert reduction_of(ViewGeometry(512), 4032, 3024) == 2
    assert reduction_of(ViewGeometry(224), 4032, 3024) == 4
    assert reduction_of(ViewGeometry(512), 4031, 3024) == 1
    assert reduction_of(ViewGeometry(224, policy="global"), 4032, 3024) == 8


def test_a_small_photo_that_already_fits_is_left_as_it_is() -> None:
    image = tensor_of(photo(224, 224))
    assert torch.equal(make_views(image, ViewGeometry(224))[0], image)


def test_tiles_that_would_leave_gaps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"views.scale is 2.5 but views.grid is 2.*set views.grid to 3"):
        geometry_for(ViewsConfig(grid=2), 512, (0, 0, 0))


def test_configuration_becomes_geometry() -> None:
    assert geometry_for(ViewsConfig(), 224, (1, 2, 3)) == ViewGeometry(224, 3, 2.5, "auto", (1, 2, 3))
    assert geometry_for(ViewsConfig(size=96, policy="all"), 224, (1, 2, 3)).size == 96
    assert geometry_for(ViewsConfig(quality="exact"), 224, (1, 2, 3)).quality == "exact"
    identities = {
        str(ViewGeometry(*fields).identity())
        for fields in [
            (64,),
            (65,),
            (64, 4),
            (64, 3, 2.0),
            (64, 3, 2.5, "all"),
            (64, 3, 2.5, "auto", (0, 0, 0)),
            (64, 3, 2.5, "auto", (124, 116, 104), "exact"),
        ]
    }
    assert len(identities) == 7


def test_offsets_are_even() -> None:
    assert tile_offsets(960, 512, 3) == (0, 224, 448)
    assert tile_offsets(100, 100, 1) == (0,)
    assert tile_offsets(101, 100, 3) == (0, 0, 1)
