"""One law: images reach the model as its own library would have given them, and what was done can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tacfast import CheckpointError
from tacfast.folders import load_folder
from tacfast.preprocessing import METADATA, Preprocessing, of_metadata, of_timm, of_torchvision, of_transformers

#: (height, width): upright, wide, odd, smaller than the crop.
SHAPES = [(300, 420), (421, 300), (97, 131), (40, 31)]


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def ours(p: Preprocessing, image: Image.Image) -> np.ndarray:
    return p.inputs(np.asarray(p.sized(image))[None])[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0", "vit_b_16", "swin_t", "inception_v3"])
def test_torchvision_to_the_last_bit(name: str, shape: tuple[int, int]) -> None:
    models = pytest.importorskip("torchvision.models")
    preprocessing = of_torchvision(name)
    assert preprocessing is not None
    image = picture(*shape)
    theirs = models.get_model_weights(name).DEFAULT.transforms()(image).numpy()
    np.testing.assert_allclose(ours(preprocessing, image), theirs, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "beit_base_patch16_224", "squash"])
def test_timm_to_the_last_bit(name: str, shape: tuple[int, int]) -> None:
    data = pytest.importorskip("timm.data")
    config: dict[str, Any] = {
        "squash": {"input_size": (3, 60, 48), "crop_mode": "squash", "crop_pct": 0.9, "mean": (0.5,) * 3, "std": (0.5,) * 3},
    }.get(name) or pytest.importorskip("timm").get_pretrained_cfg(name).to_dict()
    image = picture(*shape)
    transform = data.create_transform(**data.resolve_data_config({}, pretrained_cfg=config), is_training=False)
    np.testing.assert_allclose(ours(of_timm(config, name), image), transform(image).numpy(), atol=1e-5)


PROCESSORS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": {"height": 48, "width": 48}},
    "DeiTImageProcessor": {"size": {"height": 60, "width": 60}, "crop_size": {"height": 48, "width": 48}},
    "BeitImageProcessor": {"size": {"height": 60, "width": 60}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": True},
    "ConvNextImageProcessor": {"size": {"shortest_edge": 48}, "crop_pct": 0.875},
    "ConvNextImageProcessor, large": {"size": {"shortest_edge": 384}, "crop_pct": 1.0},
    "BitImageProcessor": {"size": {"shortest_edge": 57}, "crop_size": {"height": 48, "width": 48}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
    "MobileNetV2ImageProcessor": {"size": {"shortest_edge": 57}, "crop_size": {"height": 48, "width": 48}},
    "PoolFormerImageProcessor": {"size": {"shortest_edge": 48}, "crop_pct": 0.9, "crop_size": {"height": 48, "width": 48}},
    "ViTImageProcessor, not normalised": {"size": {"height": 48, "width": 48}, "do_normalize": False},
    "ViTImageProcessor, not scaled": {
        "size": {"height": 48, "width": 48},
        "do_rescale": False,
        "image_mean": [120.0] * 3,
        "image_std": [60.0] * 3,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_transformers_to_rounding_of_pixels(name: str, shape: tuple[int, int]) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, name.partition(",")[0])(**PROCESSORS[name])
    image = picture(*shape)
    theirs = np.asarray(processor(image, return_tensors="pt")["pixel_values"][0])
    preprocessing = of_transformers(processor, "here")
    # transformers resizes tensors; PIL rounds once more on the way.
    allowed = 2.5 * preprocessing.scale / min(preprocessing.std)
    assert np.abs(ours(preprocessing, image) - theirs).max() <= allowed


@pytest.mark.parametrize("name", ["MobileViTImageProcessor", "EfficientNetImageProcessor", "LevitImageProcessor"])
def test_a_processor_that_does_more_is_refused(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = {"rescale_offset": True} if name.startswith("Efficient") else {}
    with pytest.raises(CheckpointError, match=f"{name}.* does more than resize, crop, scale and normalise; give --size"):
        of_transformers(getattr(transformers, name)(**arguments), "here")


def test_flags_stand_above_what_was_written_down() -> None:
    written = Preprocessing(256, (224, 224), mean=(0.5,), std=(0.25,), origin="a file")
    changed = written.override(64, None, (1.0,))
    assert (changed.resize, changed.crop, changed.mean, changed.std) == ((64, 64), None, (0.5,), (1.0,))
    assert str(changed) == "64 x 64, bilinear, mean 0.5, std 1 (size and std as given, else a file)"
    assert written.override(None, None, None) is written
    assert str(written) == "shorter side to 256, bilinear, centre crop 224 x 224, mean 0.5, std 0.25 (a file)"
    assert json.loads(json.dumps(changed.to_dict()))["resize"] == [64, 64]


@pytest.mark.parametrize(
    "wrong",
    [{"resize": 10**9}, {"resize": (0, 3)}, {"crop": (5, -1)}, {"interpolation": "box"}, {"std": (0.0,)}, {"mean": (1.0, 2.0)},
     {"mean": (float("nan"),)}, {"scale": float("inf")}],
)  # fmt: skip
def test_impossible_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"a file: .*must be"):
        Preprocessing(**wrong, origin="a file")


@pytest.mark.parametrize("config", [{"crop_pct": "x"}, {"input_size": 3}, {"mean": "abc"}, {"crop_pct": 1e-9}, {"crop_mode": "border"}])
def test_timm_settings_that_make_no_sense_are_refused(config: dict[str, Any]) -> None:
    pytest.importorskip("timm")
    with pytest.raises(CheckpointError, match="timm's settings of x"):
        of_timm({"input_size": (3, 32, 32), **config}, "x")


@pytest.mark.parametrize(
    "config",
    [{"size": {"height": 10**9, "width": 10**9}}, {"size": "big"}, {"image_std": [0, 0, 0]}, {"resample": 77}, {"image_mean": None}],
)
def test_transformers_settings_that_make_no_sense_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    )
    model.save_pretrained(tmp_path)
    written = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, **config}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError):
        load_folder(tmp_path, model.state_dict()).expected()


def test_batches_do_not_depend_on_their_size() -> None:
    p = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5,))
    x = np.random.default_rng(0).integers(0, 256, (5, 7, 9, 3), dtype=np.uint8)
    expected = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / 0.5
    np.testing.assert_allclose(p.inputs(x), expected.numpy(), atol=1e-6)
    image = Image.fromarray(x[0])
    assert p.sized(image) is image


def test_a_note_in_a_file_is_read_or_refused() -> None:
    made = Preprocessing(resize=(32, 32), crop=(28, 28), mean=(0.4, 0.5, 0.6), std=(0.25,), origin="somewhere")
    noted = of_metadata({METADATA: json.dumps(made.to_dict())})
    assert noted is not None
    assert noted.to_dict() == {**made.to_dict(), "origin": "the file's own note"}
    assert of_metadata({}) is of_metadata({METADATA: 3}) is None
    for text in (
        "",
        "[]",
        "{",
        "[" * 9000,
        '{"resize": [1, 2, 3]}',
        '{"mean": "x"}',
        '{"std": [0]}',
        '{"resize": 1e9}',
        '{"odd": 1}',
        " " * 10_001,
    ):
        with pytest.raises(CheckpointError, match="the file's own note"):
            of_metadata({METADATA: text})
