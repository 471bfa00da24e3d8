"""Maps of attention and contribution: arithmetic on known models, planted regions, grids that differ, and what must raise."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import nn

from cortexlit.core import DataError
from cortexlit.data.volumes import read_nifti, write_nifti
from cortexlit.evaluation.attention_maps import (
    MapChoice,
    as_smooth_as,
    atlas_regions,
    auc,
    auc_against,
    enrichment,
    gradient_times_input,
    occlusion,
    random_maps,
    record_attention,
)


class Attention(nn.Module):
    "Softmax attention that tells its weights."

    def weights(self, q, k, near=None):
        return (q @ k.transpose(-1, -2)).softmax(-1) * self.scale

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, q, k, v, near=None):
        return self.weights(q, k, near) @ v


class Stack(nn.Module):
    def __init__(self, depth=3, scale=1.0):
        super().__init__()
        self.layers = nn.ModuleList([Attention(scale) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, x, x, None)
        return x


def test_every_layer_and_head_is_recorded_and_hooks_leave_no_trace():
    model, x = Stack(), torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    plain = model(x)
    with record_attention(model) as maps:
        assert torch.equal(model(x), plain)
        model(x[:1])
    assert [tuple(m.shape) for m in maps] == [(2, 4, 5, 5)] * 3 + [(1, 4, 5, 5)] * 3
    torch.testing.assert_close(maps[0], (x @ x.transpose(-1, -2)).softmax(-1))
    assert not torch.allclose(maps[0][:, 0], maps[0][:, 1])  # heads are not averaged
    model(x)
    assert len(maps) == 6
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_forward_pass_fails():
    model = Stack()
    with pytest.raises(RuntimeError), record_attention(model):
        model(torch.zeros(1, 1, 5, 6).double() @ torch.zeros(3, 3))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_recorded_is_said():
    with pytest.raises(DataError, match="no attention that tells"), record_attention(nn.Linear(2, 2)):
        pass
    with pytest.raises(DataError, match="sum to 1"), record_attention(model := Stack(scale=1.5)):
        model(torch.zeros(1, 1, 2, 2))


def test_contributions_of_a_linear_model_sum_to_its_output():
    draw = torch.Generator().manual_seed(1)
    x, w = torch.randn(7, 10, generator=draw), torch.randn(10, 3, generator=draw)
    found = gradient_times_input(lambda v: v @ w, x, 2)
    torch.testing.assert_close(found, x * w[:, 2])
    torch.testing.assert_close(found.sum(1), (x @ w)[:, 2])


def test_occlusion_finds_the_region_a_model_uses():
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(50, 9)), np.zeros((9, 2))
    w[:3] = draw.normal(size=(3, 2))
    regions = pd.DataFrame(
        {"used": np.arange(9) < 3, "unused": np.arange(9) >= 3, "both": np.arange(9) % 4 == 2}
    )
    found = occlusion(lambda v: v @ w, x, x @ w, regions).set_index("region")
    assert found["error"]["used"] == pytest.approx(np.square(x @ w).mean())
    assert found["change"]["unused"] == found["error"]["unused"] == 0
    assert 0 < found["error"]["both"] < found["error"]["used"]
    assert found["voxels"].tolist() == [3, 6, 2]


def cube(side=10):
    return np.argwhere(np.ones((side, side, side), bool))


def test_enrichment_is_a_quotient_of_shares():
    place = cube()
    draw = np.random.default_rng(0)
    values = draw.uniform(size=len(place))
    regions = pd.DataFrame({f"r{k}": draw.uniform(size=len(place)) < 0.1 * k for k in range(1, 5)})
    found = enrichment(values, regions, place, 50).set_index("region")
    for name in regions:
        inside = regions[name].to_numpy()
        assert found["enrichment"][name] == pytest.approx(values[inside].mean() / values.mean())
    scaled = enrichment(7 * values, regions, place, 50).set_index("region")
    pd.testing.assert_frame_equal(scaled, found)


def test_a_planted_region_stands_out_and_others_do_not():
    place = cube()
    inside, far = (place < 4).all(1), (place >= 6).all(1)
    values = np.random.default_rng(0).uniform(size=len(place)) * (1 + 2 * inside)
    found = enrichment(values, pd.DataFrame({"planted": inside, "far": far}), place, 500).set_index("region")
    assert found["p"]["planted"] < 0.05 < found["p"]["far"]
    assert found["enrichment"]["planted"] > found["null high"]["planted"] > 1


def test_smooth_maps_have_wide_nulls():
    place = cube(12)
    smooth = np.exp(-((place - [2, 9, 4]) ** 2).sum(1) / 30)
    shuffled = np.random.default_rng(0).permutation(smooth)
    region = pd.DataFrame({"r": (place < 5).all(1)})
    wide, narrow = (enrichment(v, region, place, 300).iloc[0] for v in (smooth, shuffled))
    assert wide["null high"] - wide["null low"] > 3 * (narrow["null high"] - narrow["null low"])


def test_p_values_are_even_under_the_null():
    place, p = cube(8), []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        centre = place[draw.integers(len(place))]
        near = np.argsort(((place - centre) ** 2).sum(1), kind="stable")[:40]
        region = pd.DataFrame({"r": np.isin(np.arange(len(place)), near)})
        field = np.exp(-((place - draw.uniform(0, 7, 3)) ** 2).sum(1) / 20)
        p.append(enrichment(field, region, place, 200, seed)["p"][0])
    assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) < 0.1) < 0.25


def test_voxels_without_a_value_are_left_out():
    place = cube(5)
    values = np.ones(len(place))
    values[:60] = np.nan
    regions = pd.DataFrame({"lost": np.arange(125) < 60, "half": np.arange(125) < 90})
    found = enrichment(values, regions, place, 20).set_index("region")
    assert found["voxels"].tolist() == [0, 30] and np.isnan(found["enrichment"]["lost"])
    assert found["enrichment"]["half"] == pytest.approx(1) and found["share of voxels"]["half"] == 30 / 65


@pytest.mark.parametrize(
    ("values", "regions", "place", "told"),
    [
        (-np.ones(8), {"a": [True] * 8}, np.zeros((8, 3)), "absolute values"),
        (np.zeros(8), {"a": [True] * 8}, np.zeros((8, 3)), "not all 0"),
        (np.ones(8), {"a": [True] * 8}, np.zeros((8, 2)), "places"),
        (np.ones(8), {"a": [True] * 7}, np.zeros((8, 3)), "one row per voxel"),
        (np.ones(8), {"a": [False] * 8}, np.zeros((8, 3)), "region a has no voxel"),
    ],
)
def test_maps_that_do_not_fit_are_refused(values, regions, place, told):
    with pytest.raises(DataError, match=told):
        enrichment(values, pd.DataFrame(regions), place)


def test_atlas_labels_are_read_in_mm():
    atlas = np.zeros((6, 6, 6), int)
    atlas[3:, :, :] = 7
    shifted = np.diag([-3.0, 3, 3, 1])  # x runs the other way, as in many MNI files
    shifted[:3, 3] = [15, 0, 0]
    mask = np.zeros((20, 6, 6), bool)
    mask[:18, 1] = True
    affine = np.diag([1.0, 3, 3, 1])
    found = atlas_regions(mask, affine, atlas, shifted, {7: "left"})
    x = np.argwhere(mask)[:, 0]
    expected = np.rint((x - 15) / -3.0)
    assert np.array_equal(found["left"], (expected >= 3) & (expected < 6))
    assert np.array_equal(found["background"], ~found["left"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"atlas": np.full((4, 4, 4), 0.5)}, "64 of 64 voxels of the atlas hold no label, the first 0.5"),
        ({"atlas": np.full((4, 4, 4), np.nan)}, "hold no label, the first nan"),
        ({"atlas": np.full((4, 4, 4), -1)}, "hold no label, the first -1"),
        ({"atlas": np.zeros((4, 4, 4))}, "no label, only 0"),
        ({"atlas": np.ones((4, 4, 4, 2))}, "most probable region"),
        ({"mask": np.ones((4, 4), bool)}, "a mask of shape"),
        ({"names": {}}, "label 1 of the atlas has no name"),
        ({"affine": np.full((4, 4), np.nan)}, "not known"),
        ({"affine": np.array([[1, 0, 0, 900], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])}, "register"),
    ],
)
def test_atlases_that_do_not_fit_are_refused(change, told):
    good = {
        "mask": np.ones((4, 4, 4), bool), "affine": np.eye(4), "atlas": np.ones((4, 4, 4), int),
        "atlas_affine": np.eye(4), "names": {1: "a"},
    }  # fmt: skip
    with pytest.raises(DataError, match=told):
        atlas_regions(**{**good, **change})


def test_an_atlas_file_of_another_grid_gives_a_table_of_regions(tmp_path):
    labels = np.zeros((7, 8, 9), np.int16)
    labels[2:5, 3:6, 4:7] = 5
    turned = np.array(
        [[0, -4.0, 0, 30], [5, 0, 0, -12], [0, 0, 6, -20], [0, 0, 0, 1]]
    )  # axes x and y swapped
    file = write_nifti(tmp_path / "atlas.nii.gz", labels, turned)
    affine = np.diag([3.0, 3, 3, 1])
    affine[:3, 3] = [-2, -8, -10]
    mask = np.ones((10, 11, 12), bool)
    regions = atlas_regions(mask, affine, *read_nifti(file), {5: "cube"}, file)
    mm = np.argwhere(mask) * 3.0 + [-2, -8, -10]
    i, j, k = (mm[:, 1] + 12) / 5, (30 - mm[:, 0]) / 4, (mm[:, 2] + 20) / 6
    cube = (np.abs(i - 3) < 1.5) & (np.abs(j - 4) < 1.5) & (np.abs(k - 5) < 1.5)
    assert 0 < cube.sum() < len(mm) and np.array_equal(regions["cube"], cube)
    found = enrichment(1 + cube, regions, mm, 20).set_index("region")
    assert found["enrichment"]["cube"] == pytest.approx(2 / (1 + cube.mean()))
    with pytest.raises(DataError, match="atlas.nii.gz"):
        atlas_regions(mask, affine, labels / 2, turned, {5: "cube"}, file)


def test_auc_is_the_chance_of_the_right_order():
    informative = np.array([True, False, True, False, False])
    values = np.array([3.0, 1, 2, 2.5, np.nan])
    assert auc(values, informative) == pytest.approx(3 / 4)  # of four pairs, one is in the wrong order
    assert auc(informative.astype(float), informative) == 1 and auc(np.ones(5), informative) == 0.5
    with pytest.raises(DataError, match="both kinds"):
        auc(values, np.ones(5, bool))


def ball(side=9):
    place = np.argwhere(np.ones((side, side, side)))
    inside = np.linalg.norm(place - (side - 1) / 2, axis=1) < side / 2
    return inside.reshape(side, side, side)


def test_random_maps_are_equally_strong_everywhere_and_one_side_does_not_see_the_other():
    mask = ball()
    maps = random_maps(mask, 1.5, 600, seed=3)
    assert maps.shape == (600, mask.sum()) and np.array_equal(maps, random_maps(mask, 1.5, 600, seed=3))
    spread = maps.std(0)
    assert spread.max() / spread.min() < 1.4  # sampling only: no weak border
    x = np.argwhere(mask)[:, 0]
    ends = np.corrcoef(maps[:, x == 0].mean(1), maps[:, x == 8].mean(1))[0, 1]
    assert abs(ends) < 0.15
    near = np.corrcoef(maps[:, x == 3].mean(1), maps[:, x == 4].mean(1))[0, 1]
    assert near > 0.6


@pytest.mark.parametrize("width", [0, 0.8, 1.5])
def test_random_maps_become_as_smooth_as_the_map(width):
    mask = ball()
    found = [as_smooth_as(one, mask, draws=2)[1] for one in random_maps(mask, width, 5, seed=4)]
    assert abs(np.median(found) - width) <= 0.4


def test_auc_against_counts_the_null_by_hand():
    informative = np.array([True, True, False, False, False])
    null = np.array(
        [[5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [5, 1, 2, 3, 4], [1, 1, 1, 1, 1]], float
    )  # 1, 0, .5, .5
    found = auc_against(np.array([2.0, 2, 1, 2, 0]), informative, null)
    assert found[0] == pytest.approx(5 / 6)
    assert found[3] == pytest.approx(2 / 5)  # one of four reaches it, and the map itself
    assert found[1:3] == pytest.approx(np.quantile([0, 0.5, 0.5, 1], [0.025, 0.975]))


def test_auc_against_leaves_out_what_the_map_does_not_know():
    informative = np.array([True, False, True, False])
    null = np.array([[9.0, 0, 1, 2], [0, 9, 1, 2]])
    assert auc_against(np.array([3.0, 1, np.nan, 2]), informative, null)[3] == pytest.approx(2 / 3)


def test_nulls_refuse_what_does_not_fit():
    mask = ball()
    with pytest.raises(DataError, match="voxels in the mask"):
        as_smooth_as(np.ones(3), mask)
    with pytest.raises(DataError, match="finite value"):
        as_smooth_as(np.full(mask.sum(), np.nan), mask)
    with pytest.raises(DataError, match="draws"):
        auc_against(np.arange(4.0), np.array([True, False, True, False]), np.ones((5, 3)))


CHECKS = list(estimator_checks_generator(MapChoice()))


@pytest.mark.parametrize(("estimator", "check"), CHECKS, ids=[check.func.__name__ for _, check in CHECKS])
def test_scikit_learn(estimator, check):
    check(estimator)


def test_the_best_map_is_chosen_where_it_was_fitted_and_judged_elsewhere():
    draw = np.random.default_rng(0)
    informative = draw.random(400) < 0.3
    maps = draw.normal(size=(400, 5))
    maps[:, 3] += 1.5 * informative
    maps[:200, 1] += 6 * informative[:200]  # in the first half only
    for half, best in ((slice(0, 200), 1), (slice(200, 400), 3)):
        chosen = clone(MapChoice()).fit(maps[half], informative[half])
        assert chosen.map_ == best and chosen.auc_[best] == auc(maps[half, best], informative[half])
        assert balanced_accuracy_score(informative[half], chosen.predict(maps[half])) > 0.65
        assert chosen.score(maps, informative) == auc(maps[:, best], informative)
    misled = MapChoice().fit(maps[:200], informative[:200])
    assert abs(misled.score(maps[200:], informative[200:]) - 0.5) < 0.12
