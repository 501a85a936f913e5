"""One law: each p-value is what simulation under its own null says, and each kind of evidence sees what it is for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

import tacfast
from tacfast import outliers, verdict
from tacfast.asymmetry import most_abnormal_shift, odd_source
from tacfast.correlations import correlation
from tacfast.deviations import deviations
from tacfast.geometry import FEWEST_PER_CLASS, Traits, class_alignment, shift_spread
from tacfast.outliers import ALIGNMENT, NORM, QUIET, extreme, mad_index, most_abnormal, step_down


def has_its_size(p: np.ndarray) -> None:
    for level in (0.05, 0.2, 0.5):
        # Four standard errors of the share.
        assert abs(np.mean(p <= level) - level) < 4 * np.sqrt(level * (1 - level) / len(p))


def p_values(classes: int, known: int, spread: bool, with_norm: float, of_traits: float, number: int = 1500) -> np.ndarray:
    """Of models whose log norms and traits are normal, with these correlations from class to class."""
    correlation = np.array([[1, with_norm, with_norm], [with_norm, 1, of_traits], [with_norm, of_traits, 1]])
    rng, p = np.random.default_rng(7), []
    for _ in range(number):
        norm, aligned, quiet = rng.multivariate_normal(np.zeros(3), correlation, size=classes).T
        alignment = np.where(np.arange(classes) < known, 0.9 + 0.01 * aligned, np.nan)
        p.append(most_abnormal(np.exp(2 + 0.3 * norm), Traits(alignment, np.exp(quiet) if spread else np.full(classes, np.nan))).p_value)
    return np.array(p)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tenth of them: models with other correlations are compared with other ones."""
    monkeypatch.setattr(outliers, "_DRAWS", 2000)
    outliers._null.cache_clear()
    yield
    outliers._null.cache_clear()


@pytest.mark.parametrize(("classes", "known"), [(4, 0), (10, 10), (43, 40), (90, 0), (10, 3)])
@pytest.mark.parametrize("spread", [True, False])
def test_the_class_test_has_its_size_on_normal_classes(classes: int, known: int, spread: bool, few_draws: None) -> None:
    has_its_size(p_values(classes, known, spread, 0.25, 0.5))


@pytest.mark.parametrize(("classes", "known"), [(10, 10), (43, 40), (10, 3)])
@pytest.mark.parametrize(("with_norm", "of_traits"), [(-0.4, 0.3), (0.0, 0.0), (0.25, 0.5), (0.6, 0.7)])
def test_the_class_test_has_its_size_whatever_the_correlations(
    classes: int, known: int, with_norm: float, of_traits: float, few_draws: None
) -> None:
    has_its_size(p_values(classes, known, True, with_norm, of_traits, 600))


@pytest.mark.parametrize("true", [-0.6, 0.0, 0.3])
def test_a_correlation_is_that_of_the_normal_classes(true: float) -> None:
    rng, plain, found, clean = np.random.default_rng(2), [], [], []
    for _ in range(400):
        x, y = rng.multivariate_normal([0, 0], [[1, true], [true, 1]], size=10).T
        clean.append(correlation(x, y))
        x[0] -= 6
        y[0] -= 6
        plain.append(np.corrcoef(x, y)[0, 1])
        found.append(correlation(x, y))
    assert np.median(clean) == pytest.approx(true, abs=0.06)
    assert true < np.median(found) < np.median(plain) - 0.1
    assert correlation(np.arange(9.0), np.ones(9)) == correlation(np.ones(9), np.ones(9)) == 0


def test_a_norm_alone_counts_only_where_alignment_is_not_known(rng: np.random.Generator) -> None:
    norms, trait = np.exp(0.1 * rng.normal(size=10)), 0.9 + 0.02 * rng.normal(size=10)
    norms[4], trait[4] = 0.05, 0.95
    assert most_abnormal(norms).p_value < 1e-3
    assert most_abnormal(norms, Traits(trait, trait)).p_value > 0.2
    unknown = np.where(np.arange(10) == 4, np.nan, trait)
    found = most_abnormal(norms, Traits(unknown, trait))
    assert (found.looks[NORM].position, found.p_value < 0.01) == (4, True)
    others = np.where(np.arange(10) == 5, np.nan, trait)
    assert most_abnormal(norms, Traits(others, trait)).looks[NORM].position == 5


@pytest.mark.parametrize("tail", ["normal", "laplace", "gumbel"])
def test_with_many_classes_heavy_tails_raise_no_alarm(tail: str) -> None:
    rng = np.random.default_rng(11)
    draw = {"normal": rng.normal, "laplace": rng.laplace, "gumbel": lambda size: -rng.gumbel(size=size)}[tail]
    p = np.array([most_abnormal(np.exp(0.05 * draw(size=300))).p_value for _ in range(1000)])
    for level in (0.01, 0.05, 0.2):
        assert np.mean(p <= level) < level + 4 * np.sqrt(level * (1 - level) / len(p))
    norms = np.exp(0.05 * draw(size=300))
    norms[17] = norms.min() * 0.5
    found = most_abnormal(norms)
    assert (found.position, found.p_value < 0.01) == (17, True)


def test_the_statistic_ignores_units_and_grows_with_the_gap(rng: np.random.Generator) -> None:
    norms = np.exp(rng.normal(size=20) * 0.1)
    found = most_abnormal(norms).looks[NORM]
    assert found.statistic == pytest.approx(most_abnormal(norms * 1e5).looks[NORM].statistic)
    assert found.position == norms.argmin()
    lower = np.where(norms == norms.min(), norms * 0.5, norms)
    assert most_abnormal(lower).looks[NORM].statistic > found.statistic
    assert most_abnormal(lower).p_value < 1e-3
    assert most_abnormal(np.ones(8)).p_value == 1.0
    assert most_abnormal(np.array([0.5, *np.ones(8)])).looks[NORM].statistic == np.inf


def test_deviations_leave_the_class_itself_out(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 9)) * 5 + 100
    for row, found in zip(x, deviations(x), strict=True):
        for k in range(9):
            others = np.delete(row, k)
            assert found[k] == pytest.approx((others.mean() - row[k]) / others.std(ddof=1))


@pytest.mark.parametrize("kind", [ALIGNMENT, QUIET])
def test_a_second_trait_tells_a_target_from_an_easy_class(kind: str, rng: np.random.Generator) -> None:
    norms, trait = np.exp(0.1 * rng.normal(size=10)), 0.9 + 0.02 * rng.normal(size=10)
    norms[2], trait[2] = np.exp(-0.3), 0.95
    norms[5], trait[5] = np.exp(-0.29), 0.82
    other = 0.9 + 0.02 * rng.normal(size=10)
    traits = Traits(trait, other) if kind == ALIGNMENT else Traits(other, trait)
    assert most_abnormal(norms).position == 2
    found = most_abnormal(norms, traits)
    assert found.position == 5
    assert found.looks[kind].position == extreme(norms, traits, kind) == 5
    assert found.p_value < most_abnormal(norms).p_value
    assert list(found.looks) == sorted(found.looks, key=lambda name: found.looks[name].p_value)


def test_two_targets_are_set_aside_one_after_the_other(rng: np.random.Generator) -> None:
    norms = np.exp(rng.normal(size=50) * 0.05)
    norms[[11, 30]] = 0.3, 0.45
    steps = step_down(norms, None, 0.05)
    assert [s.position for s in steps if s.abnormal] == [11, 30]
    assert all(a.p_value <= b.p_value for a, b in itertools.pairwise(steps))
    assert mad_index(norms) > 2


def test_alignment_is_the_cosine_of_centred_weights_and_means(rng: np.random.Generator) -> None:
    w, z, y = rng.normal(size=(4, 6)), rng.normal(size=(100, 6)), np.arange(100) % 3
    means = np.array([z[y == k].mean(0) for k in range(3)])
    got = class_alignment(w, z, y)
    for k in range(3):
        a, b = w[k] - w.mean(0), means[k] - means.mean(0)
        assert got[k] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert np.isnan(got[3])
    assert np.isnan(class_alignment(w, z[: 3 * FEWEST_PER_CLASS - 1], y[: 3 * FEWEST_PER_CLASS - 1])[2])


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_traits_do_not_depend_on_units(scale: float, rng: np.random.Generator) -> None:
    w, z, y, s = rng.normal(size=(4, 6)), rng.normal(size=(100, 6)), np.arange(100) % 4, rng.normal(size=(4, 6))
    assert class_alignment(w * scale, z / scale, y) == pytest.approx(class_alignment(w, z, y))
    assert shift_spread(s * scale, z / scale) * scale == pytest.approx(shift_spread(s, z))


def test_spread_is_that_of_the_channels_in_use(rng: np.random.Generator) -> None:
    z = rng.normal(size=(20_000, 3)) * [0.5, 2.0, 1e-9]
    got = shift_spread(np.array([[7.0, 0, 0], [0, -3, 0], [0, 0, 1], [1, 4, 0], [0, 0, 0], [np.nan, 0, 0]]), z)
    assert got[:2] == pytest.approx([0.5, 2.0], rel=0.05)
    assert got[2] == pytest.approx(2e-3, rel=0.05)
    assert 0.5 < got[3] < 2.0
    assert np.isnan(got[4:]).all()


def test_the_source_of_a_source_specific_backdoor_is_named(rng: np.random.Generator) -> None:
    logs = 0.1 * rng.normal(size=(12, 12)) + rng.normal(size=(12, 1)) + rng.normal(size=(1, 12))
    assert odd_source(np.exp(logs), 5).p_value > 0.01  # type: ignore[union-attr]
    logs[8, 5] -= 1.5
    found = odd_source(np.exp(logs), 5)
    assert found is not None
    assert (found.source, found.p_value < 0.01) == (8, True)


def test_the_shift_test_has_its_size_on_independent_pairs() -> None:
    rng, p = np.random.default_rng(5), []
    for _ in range(2000):
        effects = rng.normal(size=(2, 9))
        found = most_abnormal_shift(np.exp(effects[0][:, None] + effects[1][None] + 0.2 * rng.normal(size=(9, 9))))
        assert found is not None
        p.append(found.p_value)
    has_its_size(np.array(p))


def test_a_shift_of_labels_is_seen_and_named(rng: np.random.Generator) -> None:
    logs = 0.1 * rng.normal(size=(12, 12))
    y = np.arange(12)
    logs[y, (y + 4) % 12] -= 0.25
    norms = np.exp(logs)
    np.fill_diagonal(norms, np.nan)
    found = most_abnormal_shift(norms)
    assert found is not None
    assert found.shift == 4
    assert found.p_value < 1e-3
    assert most_abnormal_shift(np.ones((12, 12))) is None
    norms[3, 4] = np.inf
    assert most_abnormal_shift(norms) is None


def test_a_scan_finds_an_all_to_all_backdoor(rng: np.random.Generator) -> None:
    """Latents of ten classes, and one more direction per class that sends it to the next."""
    classes = 10
    y = np.arange(1500) % classes
    w = np.hstack([np.eye(classes), np.roll(np.eye(classes), 1, axis=0)]) + 0.03 * rng.normal(size=(classes, 2 * classes))
    z = 0.1 * np.abs(rng.normal(size=(1500, 2 * classes)))
    z[:, :classes] += 3 * np.eye(classes)[y]
    z[:, classes:] -= 2 * (1 - np.eye(classes)[y])
    report = tacfast.scan_head(w, None, z, labels=y)
    assert (report.verdict, report.kind, report.suspects) == ("backdoored", "all-to-all", ())
    assert set(report.pairs) == {(k, (k + 1) % classes) for k in range(classes)}
    assert report.targets == tuple(range(classes))
    assert tacfast.ScanReport.from_dict(report.to_dict()).to_dict() == report.to_dict()


def test_several_questions_together_have_their_size(rng: np.random.Generator) -> None:
    shares = (0.4, 0.4, 0.2)
    answers = rng.uniform(size=(4000, 3))
    together = np.array([[verdict._among_all(p, share) for p, share in zip(row, shares, strict=True)] for row in answers])
    has_its_size(together.min(axis=1))
    assert together == pytest.approx(1 - (1 - answers) ** (1 / np.array(shares)))
    assert verdict._among_all(1.0, 0.4) == 1.0
    assert verdict._among_all(1e-12, 0.4) == pytest.approx(2.5e-12)
