"""One law: a class to which a small pattern leads stands out, the test of that has its size, and nothing but the patterns is touched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tacfast
from tacfast.openness import FEW_PIXELS, MOST_CLASSES, SHORT, Patterns, chosen, most_open
from tacfast.patterns import IMAGES, measure
from tacfast.sampling import Sample
from test_evidence import has_its_size

CLASSES, SIZE = 6, 8


def margins(*rows: np.ndarray) -> Patterns:
    return Patterns(np.arange(len(rows[0])), dict(zip((SHORT, FEW_PIXELS), rows, strict=False)))


@pytest.mark.parametrize("classes", [4, 10, 43])
@pytest.mark.parametrize("kinds", [1, 2])
def test_the_test_has_its_size_on_normal_classes(classes: int, kinds: int) -> None:
    rng = np.random.default_rng(3)
    has_its_size(np.array([most_open(margins(*rng.normal(-5, 2, size=(kinds, classes))), 0.05).p_value for _ in range(1500)]))


def test_several_open_classes_do_not_hide_one_another(rng: np.random.Generator) -> None:
    x = rng.normal(-5, 0.5, size=(2, 10))
    x[0, [2, 7, 4]] = 6.0, 5.0, 5.5
    found = most_open(margins(*x), 0.05)
    assert (found.classes, found.p_value < 0.01) == ((2, 4, 7), True)
    assert next(iter(found.looks)) == SHORT
    assert most_open(margins(x[1]), 0.01).classes == ()
    assert most_open(margins(np.zeros(10)), 0.05).p_value == 1.0


def test_what_cannot_be_tested_is_not() -> None:
    assert margins(np.zeros(3)).testable() is None
    assert margins(np.array([1.0, np.nan, 2, 3])).testable() is None
    # A class that has no images of others does not hide the rest.
    known = margins(np.array([1.0, np.nan, 2, 3, 30])).testable()
    assert known is not None and known.classes.tolist() == [0, 2, 3, 4]
    assert most_open(known, 0.05).classes == (4,)


def test_of_many_classes_those_with_small_norms_are_among_the_chosen(rng: np.random.Generator) -> None:
    norms = rng.uniform(5, 9, size=1000)
    norms[321] = 1.0
    found = chosen(norms)
    assert len(found) == len(set(found)) == MOST_CLASSES
    assert 321 in found
    assert chosen(norms[:20]).tolist() == list(range(20))


class Doored(nn.Module):
    """Sorts images by the brightest of six bands; a pixel that clean images leave dark leads to class 3, or nowhere."""

    def __init__(self, door: float) -> None:
        super().__init__()
        self.door = door
        self.head = nn.Linear(CLASSES + 1, CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([4 * torch.eye(CLASSES), torch.zeros(CLASSES, 1)], 1))
            self.head.weight[3, -1] = door
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        bands = x[:, 0, :CLASSES].mean(2)
        return self.head(torch.cat([bands, x[:, 0, 7, 7:]], 1))


def pictures(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = 0.3 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
    x[torch.arange(count), 0, y] += 0.6
    # Now and then the pixel is on, else no image could have it on.
    x[:, 0, 7, 7] = (torch.rand(count, generator=generator) < 0.02).float()
    return x, y


@pytest.mark.parametrize(("door", "flagged"), [(30.0, True), (0.0, False)])
def test_a_door_in_the_input_is_found(door: float, flagged: bool) -> None:
    x, _ = pictures(300)
    model = Doored(door).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure(model, x, np.arange(CLASSES), device=torch.device("cpu"))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if flagged:
        assert found.margins[FEW_PIXELS].argmax() == 3
        assert most_open(found, 0.05).classes == (3,)
    else:
        assert most_open(found, 0.05).p_value > 0.05
    again = measure(model, x, np.arange(CLASSES), device=torch.device("cpu"))
    assert all(np.array_equal(found.margins[kind], again.margins[kind]) for kind in found.margins)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_precision_have_patterns_too(dtype: torch.dtype) -> None:
    x, _ = pictures(120)
    found = measure(Doored(30.0).to(dtype), x.to(dtype), np.arange(CLASSES), device=torch.device("cpu"))
    assert found.margins[FEW_PIXELS].argmax() == 3


def test_a_class_that_every_image_goes_to_has_no_pattern_to_test() -> None:
    model = Doored(0.0)
    with torch.no_grad():
        model.head.bias[2] = 1e3
    found = measure(model, pictures(60)[0], np.arange(CLASSES), device=torch.device("cpu"))
    assert np.isnan(found.margins[SHORT]).tolist() == [k == 2 for k in range(CLASSES)]
    known = found.testable()
    assert known is not None and known.classes.tolist() == [k for k in range(CLASSES) if k != 2]


def test_a_scan_looks_at_patterns_of_one_pass_over_the_images() -> None:
    x, y = pictures(600)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(x.split(64), y.split(64), strict=True)

    report = tacfast.scan(Doored(30.0), batches())
    assert report.verdict == "backdoored"
    assert report.targets == (3,)
    assert report.patterns is not None
    assert report.timing_s["patterns"] > 0
    assert {e.kind for e in report.evidence} >= {SHORT, FEW_PIXELS}
    assert tacfast.ScanReport.from_dict(report.to_dict()).to_dict() == report.to_dict()
    alone = tacfast.scan(Doored(30.0), batches(), patterns=False)
    assert alone.patterns is None
    assert tacfast.scan(Doored(30.0), [x[:40]]).patterns is None


def test_patterns_of_strange_classes_are_refused(rng: np.random.Generator) -> None:
    w, z = rng.normal(size=(5, 4)), rng.normal(size=(60, 4))
    for classes, values in ((np.array([0, 9]), np.zeros(2)), (np.array([1, 1]), np.zeros(2)), (np.arange(5), np.zeros(4))):
        with pytest.raises(tacfast.ProblemError, match="patterns must"):
            tacfast.scan_head(w, None, z, patterns=Patterns(classes, {SHORT: values}))


def test_a_sample_is_even_and_keeps_the_order() -> None:
    sample = Sample(40)
    for part in torch.arange(400.0)[:, None].split(23):
        sample.add(part)
    kept = sample.images()
    assert kept is not None
    assert kept.shape == (40, 1)
    assert torch.equal(kept, kept.sort(0).values)
    assert 120 < float(kept.mean()) < 280
    few = Sample(IMAGES)
    few.add(torch.ones(3, 2))
    assert torch.equal(few.images(), torch.ones(3, 2))  # type: ignore[arg-type]
    few.add(torch.ones(3, 5))
    assert few.images() is None
    assert Sample(5).images() is None
