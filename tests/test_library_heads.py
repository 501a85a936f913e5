"""One law: the last layer of every common architecture is found as its library defines it, and proven on the data; SqueezeNet has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tacfast
from tacfast.heads import Captured, MeanHead, capture, head_of

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 7
#: Name: (side of the images, arguments).
TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "vgg11": (32, {"init_weights": False}),
    "densenet121": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "efficientnet_b0": (32, {}),
    "convnext_tiny": (32, {}),
    "swin_t": (32, {}),
    "vit_b_16": (32, {"image_size": 32}),
    "inception_v3": (80, {"init_weights": False}),
    "googlenet": (64, {"init_weights": False}),
    "regnet_y_400mf": (32, {}),
}
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32}),
    "swin_tiny_patch4_window7_224": (32, {"img_size": 32}),
    "convnext_atto": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "dpn68": (32, {}),  # a convolution is its head
    "resnetv2_50x1_bit": (32, {}),  # and this one's
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32}),
    "levit_128s": (224, {}),
}
_SMALL = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_STAGES = {"depths": [1, 1], "hidden_sizes": [16, 24]}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", "classifier", _SMALL),
    "DeiT": ("DeiTForImageClassification", "classifier", _SMALL),
    "DeiT, two heads": ("DeiTForImageClassificationWithTeacher", "cls_classifier + distillation_classifier", _SMALL),
    "BEiT": ("BeitForImageClassification", "classifier", _SMALL),
    "Swin": ("SwinForImageClassification", "classifier",
             {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    "ConvNeXt": ("ConvNextForImageClassification", "classifier", {**_STAGES, "num_stages": 2}),
    "ResNet": ("ResNetForImageClassification", "classifier.1", {**_STAGES, "embedding_size": 16, "layer_type": "basic"}),
}  # fmt: skip


def prove(model: nn.Module, side: int) -> Captured:
    """Capture the head, and check its arithmetic and its predictions against the model's own output."""
    with torch.no_grad():
        for p in model.parameters():  # some heads start at zero, which would prove nothing
            if not p.any():
                p.normal_(std=0.1)
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    captured = capture(model, [x], device="cpu")
    with torch.no_grad():
        output: Any = model.eval()(x)
    logits = getattr(output, "logits", output)
    bias = 0 if captured.bias is None else captured.bias
    made = torch.from_numpy(captured.latents @ captured.weight.T + bias)
    assert captured.weight.shape[0] == CLASSES
    assert logits.abs().max() > 0
    assert captured.proof_error <= 1e-4
    assert (made - logits).abs().max() <= 1e-4 * logits.abs().max()
    return captured


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    side, arguments = TORCHVISION[name]
    model = models.get_model(name, weights=None, num_classes=CLASSES, **arguments)
    captured = prove(model, side)
    # torchvision's heads are the last modules that they register; auxiliary ones come before and are off in eval mode.
    assert captured.name == [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES][-1]


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    side, arguments = TIMM[name]
    model = timm.create_model(name, num_classes=CLASSES, **arguments)
    captured = prove(model, side)
    classifier, head = model.get_classifier(), head_of(model, captured.name)
    theirs = classifier if isinstance(classifier, tuple) else (classifier,)
    ours = tuple(head.parts) if isinstance(head, MeanHead) else (head,)
    # LeViT normalises inside its classifiers; the linear layers there are the heads.
    assert ours == tuple(getattr(part, "linear", part) for part in theirs)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, head, settings = TRANSFORMERS[name]
    model_class = getattr(transformers, kind)
    assert prove(model_class(model_class.config_class(num_labels=CLASSES, **settings)), 32).name == head


def test_squeezenet_is_refused_because_of_its_relu() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.get_model("squeezenet1_1", weights=None, num_classes=CLASSES)
    with pytest.raises(tacfast.ModelError, match=r"'classifier.1' \(Conv2d\).*a ReLU, which is non-linear, follows it"):
        capture(model, [torch.randn(2, 3, 64, 64)], device="cpu")


class Distilled(nn.Module):
    """Two tokens, two heads, their mean in eval mode; or two tasks in a tuple, or in a dict."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 12), nn.ReLU())
        self.head = nn.Linear(12, 5)
        self.second = nn.Linear(12, 5 if kind == "mean" else 4)

    def forward(self, x: Tensor) -> Any:
        z = self.trunk(x)
        one, two = self.head(z), self.second(z * 2)
        return {"mean": lambda: (one + two) / 2, "tuple": lambda: (one, two), "dict": lambda: {"colour": one, "shape": two},
                "latents": lambda: (one, z)}[self.kind]()  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("tuple", r"several heads: 'head' with 5 outputs and 'second' with 4; wrap"),
        ("dict", r"a dict of 'colour' \(2, 5\), 'shape' \(2, 4\)"),
    ],
)
def test_a_model_with_several_heads_is_refused_by_their_names(kind: str, reason: str) -> None:
    with pytest.raises(tacfast.ModelError, match=reason):
        capture(Distilled(kind), [torch.randn(2, 3, 8, 8)], device="cpu")


def test_latents_beside_the_logits_are_no_second_head() -> None:
    assert capture(Distilled("latents"), [torch.randn(2, 3, 8, 8)], device="cpu").name == "head"


@pytest.mark.parametrize("method", ["auto", "unlearn", "finetune", "equalize", "head", "prune"])
def test_a_mean_of_two_heads_is_repaired_like_one(method: Any) -> None:
    x, y = torch.randn(200, 3, 8, 8), torch.arange(200) % 5
    x[:, 0, 0] += 4 * torch.nn.functional.one_hot(y, 8)
    model = Distilled("mean")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    captured = capture(model, [(x, y)], device="cpu")
    assert captured.name == "head + second"
    assert captured.weight.shape == (5, 24)
    solved = tacfast.scan(model, [(x, y)]).status == "solved"
    result = tacfast.repair(model, [(x, y)], targets=[int(solved.argmax())], method=method)
    assert result.model is not None
    assert result.after is not None
    changed = [k for k, v in result.model.state_dict().items() if not torch.equal(v, before[k])]
    assert {"head.weight", "second.weight"} <= set(changed)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_half_precision_weights_say_what_to_do() -> None:
    with pytest.raises(tacfast.ModelError, match=r"torch.float16 and the images torch.float32: try model.float\(\)"):
        capture(Distilled("mean").half(), [torch.randn(2, 3, 8, 8)], device="cpu")
