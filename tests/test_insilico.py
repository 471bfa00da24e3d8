"What is shown to a model in silico: units on the screen, the same film twice, and what cannot be shown is refused."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError
from cortexlit.insilico.stimuli import (
    Screen,
    as_films,
    grating_table,
    natural_crops,
    render_gratings,
    sparse_noise,
    white_noise,
)

SCREEN = Screen()


@settings(max_examples=25)
@given(st.sampled_from([0, 90, 180, 270]), st.sampled_from([3, 5, 8]), st.floats(0.1, 1))
def test_a_grating_has_its_cycles_on_the_screen(direction, cycles, contrast):
    wide = SCREEN.degrees[1 if direction % 180 == 0 else 0]
    table = grating_table(
        direction=direction, spatial_frequency=cycles / wide, temporal_frequency=0, contrast=contrast
    )
    picture = render_gratings(table, SCREEN, 1)[0, 0]
    line = picture[0] if direction % 180 == 0 else picture[:, 0]
    power = abs(np.fft.rfft(line))
    assert power.argmax() == cycles and abs(picture).max() <= contrast + 1e-6
    assert np.ptp(picture, axis=0 if direction % 180 == 0 else 1).max() < 1e-5


@pytest.mark.parametrize("direction", [0, 90, 180, 270])
def test_a_grating_drifts_where_it_says_and_as_fast(direction):
    still = grating_table(direction=direction, spatial_frequency=0.05, temporal_frequency=0)
    turned = grating_table(direction=direction, spatial_frequency=0.05, temporal_frequency=0, phase=0.25)
    film = render_gratings(
        grating_table(direction=direction, spatial_frequency=0.05, temporal_frequency=7.5), SCREEN, 5
    )
    assert np.allclose(film[0, 0], film[0, 4], atol=1e-4)  # 30 frames/s, 7.5 Hz: four frames a cycle
    assert np.allclose(film[0, 0], render_gratings(still, SCREEN, 1)[0, 0], atol=1e-5)
    assert np.allclose(
        film[0, 1], render_gratings(turned, SCREEN, 1)[0, 0], atol=1e-4
    )  # a quarter further on
    x, y = SCREEN.angles()
    along = x if direction % 180 == 0 else y
    step = 1.0 if direction in (0, 90) else -1.0
    moved = np.sin(2 * np.pi * (0.05 * step * along - 0.25)) * 0.8
    assert np.allclose(film[0, 1], moved, atol=1e-4)


def test_outside_the_aperture_is_grey():
    film = render_gratings(grating_table(diameter=20, azimuth=30, altitude=10), SCREEN, 3)[0]
    x, y = SCREEN.angles()
    outside = np.hypot(x - 30, y - 10) > 10
    assert not film[:, outside].any() and film[:, ~outside].any()


@pytest.mark.parametrize("draw", [sparse_noise, white_noise])
def test_noise_is_the_same_for_the_same_seed(draw):
    one, same, other = (draw(SCREEN, 6, seed=s) for s in (1, 1, 2))
    assert (one == same).all() and (one != other).any() and abs(one).max() <= 1


def test_sparse_noise_is_as_dense_as_asked():
    share = (sparse_noise(SCREEN, 400, density=0.2, seed=3) != 0).mean()
    assert abs(share - 0.2) < 0.01


def test_crops_are_pieces_and_films_have_grey_around_them():
    images = np.random.default_rng(0).integers(0, 256, (3, 60, 80), dtype=np.uint8)
    crops = natural_crops(images, SCREEN, 4, seed=1)
    films = as_films(crops, shown=2, before=3, after=1)
    assert films.shape == (4, 6, *SCREEN.size) and not films[:, :3].any() and not films[:, 5].any()
    assert (films[:, 3] == crops).all() and (films[:, 4] == crops).all()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"spatial_frequency": 0.5}, "two pixels a cycle"),
        ({"temporal_frequency": 15}, "two frames a cycle"),
        ({"contrast": 1.2}, "0 to 1"),
        ({"diameter": 0}, "above 0 degrees"),
        ({"spatial_frequency": np.nan}, "above 0"),
    ],
)
def test_what_the_screen_cannot_show_is_refused(values, told):
    with pytest.raises(DataError, match=told):
        render_gratings(grating_table(**values), SCREEN, 2)


@pytest.mark.parametrize("size", [{"size": (0, 4)}, {"degrees": (60, 400)}, {"rate": 0}])
def test_a_screen_that_cannot_be_is_refused(size):
    with pytest.raises(DataError, match="Screen"):
        Screen(**size)
