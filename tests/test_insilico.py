"What is shown to a model in silico, in the right units or not at all, and what its answers say of its neurons."

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexlit.core import DataError, MissingError
from cortexlit.insilico import fields
from cortexlit.insilico.fields import field_correlation, fit_gabors, gradient_fields, noise_fields
from cortexlit.insilico.stimuli import (
    Screen,
    Twin,
    as_films,
    grating_table,
    natural_crops,
    render_gratings,
    sparse_noise,
    white_noise,
)
from cortexlit.insilico.tuning import (
    against_shuffled,
    angle_error,
    direction_waves,
    grating_tuning,
    measured_gratings,
    preferred_value,
    show_gratings,
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


DIRECTIONS = np.arange(0, 360, 45.0)


class KnownNeurons(torch.nn.Module):
    """Complex cells, built: (N,) directions in degrees, 0.05 cycles per degree, energy of a full-screen Gabor.

    They have no memory, so they answer at every frame of a film, grey or not, with 0.1 more.
    """

    def __init__(self, angles):
        super().__init__()
        x, y = SCREEN.angles()
        phase = [2 * np.pi * 0.05 * (x * np.cos(a) + y * np.sin(a)) for a in np.deg2rad(angles)]
        window = np.exp(-0.5 * (x**2 + y**2) / 10**2)
        pair = np.stack([[window * np.cos(p), window * np.sin(p)] for p in phase])
        self.weights = torch.nn.Parameter(
            torch.from_numpy(pair / np.abs(pair).sum((2, 3), keepdims=True)).float()
        )
        self.config = SimpleNamespace(core="other", frames=100)

    def forward(self, video, mouse_id):
        parts = torch.einsum("bthw,nkhw->bntk", video[:, 0], self.weights)
        return SimpleNamespace(logits=0.1 + parts.square().sum(-1))


def known_twin(angles):
    neurons = pd.DataFrame({"cell_id": np.arange(len(angles))})
    return Twin(KnownNeurons(angles), "m", SCREEN, (127.5, 127.5), {}, neurons, {}, np.zeros(len(angles)))


def test_the_tuning_of_known_neurons_is_found():
    angles = np.array([0.0, 20.0, 75.0, 110.0, 158.0])
    values = {"spatial_frequency": (0.025, 0.05, 0.1), "phase": (0, 1 / 3), "temporal_frequency": 2}
    table = grating_table(direction=np.arange(0, 360, 15), **values)
    found = grating_tuning(table, show_gratings(known_twin(angles), table, frames=30))
    assert angle_error(found["orientation"], angles).max() < 1
    assert found["osi"].min() > 0.8 and found["dsi"].max() < 0.02
    assert np.allclose(found["spatial_frequency"], 0.05, rtol=0.1)
    shuffled = against_shuffled(found["orientation"].to_numpy(), np.roll(angles, 2))
    assert shuffled["hits"] == 0 and shuffled["p"] > 0.2
    few = grating_table(direction=DIRECTIONS, **values)  # four orientations, too few for such sharp neurons
    coarse = grating_tuning(few, show_gratings(known_twin(angles), few, frames=30))
    assert 5 < angle_error(coarse["orientation"], angles).max() < 12


def test_grey_is_taken_off():
    table = grating_table(direction=DIRECTIONS, contrast=0.0)
    assert abs(show_gratings(known_twin([30.0]), table, frames=20)).max() < 1e-6


@settings(max_examples=30)
@given(st.floats(0, 359.9), st.floats(0.05, 1), st.integers(5, 16), st.floats(-3, 3))
def test_waves_are_those_that_were_put_in(angle, height, count, constant):
    directions = np.arange(count) * 360 / count + 7
    away = np.deg2rad(directions - angle)
    for crests in (1, 2):
        waves = direction_waves(directions, constant + height * np.cos(crests * away))
        assert np.isclose(waves[0], constant, atol=1e-9)
        assert np.isclose(abs(waves[crests]), height / 2) and abs(waves[3 - crests]) < 1e-9
        period = 360 / crests
        assert angle_error(np.rad2deg(np.angle(waves[crests])) / crests, angle, period) < 1e-6


@pytest.mark.parametrize(
    "directions", [range(0, 360, 90), range(0, 180, 30), [0, 45, 90, 180, 270], [0, 0, 90, 180, 270]]
)
def test_directions_that_cannot_tell_orientation_are_refused(directions):
    with pytest.raises(DataError, match="evenly spaced over 360"):
        direction_waves(list(directions), np.zeros((len(directions), 2)))


def test_a_preferred_value_never_leaves_what_was_shown():
    values = np.array([8.0, 1.0, 2.0, 4.0])  # in any order
    curves = np.random.default_rng(0).standard_normal((4, 500))
    found = preferred_value(values, curves)
    assert found.min() >= 1 and found.max() <= 8
    edge = np.isin(curves.argmax(0), (0, 1))  # at 8 and at 1
    assert (found[edge] == values[curves.argmax(0)[edge]]).all()
    x = np.log2(values)[:, None]
    assert np.allclose(np.log2(preferred_value(values, 5 - (x - [1.2, 1.9]) ** 2)), [1.2, 1.9])


def sweeps(random, angles, repeats, noise):
    table = pd.concat(
        [grating_table(direction=DIRECTIONS, temporal_frequency=(1, 2, 4))] * repeats, ignore_index=True
    )
    curve = 1 + np.cos(np.deg2rad(2 * (table["direction"].to_numpy()[:, None] - angles)))
    return table, curve + noise * random.standard_normal(curve.shape)


@pytest.mark.parametrize("repeats", [3, 12])
def test_intervals_hold_the_truth_as_often_as_they_say(repeats):
    random = np.random.default_rng(1)
    angles = random.uniform(0, 180, 600)
    found = grating_tuning(*sweeps(random, angles, repeats, 1.0))
    held = (angle_error(found["orientation"], angles) <= found["orientation_within"]).mean()
    assert 0.92 < held < 0.98, held


def test_one_repeat_has_no_interval_and_an_uneven_table_counts_conditions():
    random = np.random.default_rng(2)
    angles = random.uniform(0, 180, 5)
    table, responses = sweeps(random, angles, 1, 0.0)
    found = grating_tuning(table, responses)
    assert found["orientation_within"].isna().all() and angle_error(found["orientation"], angles).max() < 1e-6
    responses = responses * table["temporal_frequency"].to_numpy()[:, None]
    often = np.concatenate([np.arange(len(table)), np.repeat(5, 40)])  # one grating, 41 times
    again = grating_tuning(table.iloc[often], responses[often])
    assert angle_error(again["orientation"], angles).max() < 1e-6


@pytest.mark.parametrize("spoil", ["missing column", "missing condition", "not a number", "rows"])
def test_tables_that_do_not_fit_are_refused(spoil):
    table, responses = sweeps(np.random.default_rng(3), np.array([10.0]), 1, 0.0)
    if spoil == "missing column":
        table = table.drop(columns="direction")
    elif spoil == "missing condition":
        table, responses = table[1:], responses[1:]
    elif spoil == "not a number":
        responses[0] = np.nan
    else:
        responses = responses[1:]
    with pytest.raises(DataError):
        grating_tuning(table, responses)


def recorded(blank=1.0, end=30):
    table = pd.DataFrame(
        {
            "orientation": [0.0, 90.0, 0.0, 90.0, 0.0, np.nan],
            "temporal_frequency": [2.0, 2.0, 2.0, 15.0, 2.0, np.nan],
            "blank_sweep": [0, 0, 0, 0, 0, blank],
            "start": [0, 5, 10, 15, end, 20],
            "end": [3, 8, 13, 18, end + 3, 23],
        }
    )
    traces = np.arange(30.0)[None].repeat(2, 0) ** 2
    return SimpleNamespace(
        name="r", stimulus_tables={"drifting_gratings": table}, traces=traces, timestamps=np.arange(30) / 10, metadata={"rate": 10.0}
    )  # fmt: skip


def test_measured_responses_are_late_above_grey_and_of_what_a_film_can_show():
    table, responses = measured_gratings(recorded(), delay=0.2)
    assert table["direction"].tolist() == [0, 90, 0] and table["phase"].tolist() == [0, 0, 1]
    late = [np.square(np.arange(start + 2, start + 6)).mean() for start in (0, 5, 10, 20)]
    assert np.allclose(responses[:, 0], np.array(late[:3]) - late[3])
    with pytest.raises(MissingError, match="no blank sweep"):
        measured_gratings(recorded(blank=0.0))


def test_exchanged_neurons_are_no_better_than_chance():
    random = np.random.default_rng(4)
    angles = random.uniform(0, 180, 60)
    near = against_shuffled(angles + 5 * random.standard_normal(60), angles)
    far = against_shuffled(random.permutation(angles), angles)
    assert near["median"] < 6 and near["p"] < 0.001 and near["low"] <= near["median"] <= near["high"]
    assert far["p"] > 0.05 and abs(far["null_median"] - 45) < 8
    with pytest.raises(DataError, match="five or more"):
        against_shuffled(np.r_[angles[:4], [np.nan] * 6], angles[:10])


def gabor(azimuth, altitude, orientation, frequency, width, length, phase):
    "A Gabor on the screen, angles in degrees."
    x, y = SCREEN.angles()
    angle, dx, dy = np.deg2rad(orientation), x - azimuth, y - altitude
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    window = np.exp(-0.5 * ((along / width) ** 2 + (across / length) ** 2))
    return window * np.cos(2 * np.pi * frequency * along + np.deg2rad(phase))


@settings(max_examples=6, deadline=None)
@given(
    st.floats(-25, 25), st.floats(-12, 12), st.floats(0, 179), st.floats(0.03, 0.08), st.floats(0.9, 1.6), st.floats(0, 359)
)  # fmt: skip
def test_a_gabor_is_found_where_it_was_put(azimuth, altitude, orientation, frequency, longer, phase):
    width = 0.3 / frequency
    field = gabor(azimuth, altitude, orientation, frequency, width, longer * width, phase)
    found = fit_gabors(np.stack([field, -7 * field]), SCREEN)
    assert np.hypot(found["azimuth"] - azimuth, found["altitude"] - altitude).max() < 0.5
    assert angle_error(found["orientation"], orientation).max() < 2 and found["r2"].min() > 0.98
    assert np.allclose(found["spatial_frequency"], frequency, rtol=0.1)
    again = [
        gabor(*row)
        for row in found[[*found.columns[:3], "spatial_frequency", "width", "length", "phase"]].to_numpy()
    ]
    scale = [(a * f).sum() / (a * a).sum() for a, f in zip(again, (field, -7 * field), strict=True)]
    assert min(scale) > 0, "its phase is turned around"  # the phase has the sign


def test_the_derivative_of_what_a_gabor_leaves_is_that_of_small_steps():
    x, y = (v.ravel() for v in SCREEN.angles())
    values = np.array([3.0, -4.0, 0.5, *np.log([0.04, 8.0, 14.0])])
    field = fields._gabor_pair(values, x, y) @ [0.5, -0.3] + 0.1 * np.random.default_rng(0).standard_normal(
        len(x)
    )

    def left(at):
        pair = fields._gabor_pair(at, x, y)
        return field - pair @ fields._weights(pair, field)

    at = values + 0.07  # off the best fit
    steps = [(left(at + step) - left(at - step)) / 2e-5 for step in 1e-5 * np.eye(6)]
    np.testing.assert_allclose(fields._slope(at, field, x, y), np.transpose(steps), atol=1e-6)


def test_a_field_of_nothing_has_no_gabor_and_one_of_noise_a_bad_one():
    noise = np.random.default_rng(0).standard_normal(SCREEN.size)
    found = fit_gabors(np.stack([np.zeros(SCREEN.size), noise]), SCREEN)
    assert found.iloc[0].isna().all() and found["r2"][1] < 0.2
    with pytest.raises(DataError, match="finite"):
        fit_gabors(np.full((1, *SCREEN.size), np.nan), SCREEN)


def test_gradients_and_noise_find_the_fields_of_known_neurons():
    twin = known_twin([0.0, 50.0, 100.0, 150.0])
    built = twin.model.weights.detach().numpy()
    linear, axes = gradient_fields(twin, white_noise(SCREEN, 12, seed=1), frames=2)
    alike = field_correlation(axes[:, 0], built)
    assert np.diag(alike).min() > 0.99 and (alike.argmax(1) == range(4)).all()
    step = np.zeros(
        (1, 2, *SCREEN.size), np.float32
    )  # the gradient is that of the answer: a pixel moved by hand
    pictures = white_noise(SCREEN, 2, seed=4)
    step[0, :, 18, 32] = 0.01
    moved = [
        twin.model(torch.from_numpy(p[None, None, None]), "m").logits[0, :, 0]
        for p in (*pictures, *(pictures + step[0]))
    ]
    slope = ((moved[2] + moved[3] - moved[0] - moved[1]) / 0.02).detach().numpy()
    assert np.allclose(gradient_fields(twin, pictures, frames=3)[0][:, 18, 32], slope, rtol=0.05, atol=1e-5)
    fits = fit_gabors(axes[:, 0], SCREEN)
    assert angle_error(fits["orientation"], [0, 50, 100, 150]).max() < 2
    _, energy = noise_fields(twin, sparse_noise(SCREEN, 3000, degrees=6.0, seed=1), frames=1)
    x, y = SCREEN.angles()
    weight = np.clip(energy, 0, None) ** 2
    centre = [(weight * v).sum((1, 2)) / weight.sum((1, 2)) for v in (x, y)]
    assert np.abs(centre).max() < 5


def test_the_same_picture_again_says_nothing():
    for pictures in (
        np.zeros((3, *SCREEN.size)),
        np.zeros((1, *SCREEN.size)),
        2 * white_noise(SCREEN, 2, contrast=1.0),
    ):
        with pytest.raises(DataError):
            gradient_fields(known_twin([0.0]), pictures, frames=2)


def test_fields_in_a_plane_correlate_whatever_their_phase():
    pair = np.stack([gabor(0, 0, 40, 0.05, 8, 8, p) for p in (0, 90)])[None]
    turned = np.stack([gabor(0, 0, 40, 0.05, 8, 8, p) for p in (10, 200, 313)])
    other = np.stack([gabor(0, 0, 130, 0.05, 8, 8, 0)])
    assert field_correlation(turned, pair).min() > 0.99 and field_correlation(other, pair).max() < 0.2
