"""What stands below each --help: lines to copy, and what the exit codes mean. May import: rich."""

from __future__ import annotations

from rich.markup import escape

#: Comment and command, by command.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("see it work, without a model of your own", "tacfast demo"),
        ("is this model backdoored?", "tacfast scan model.pth --arch torchvision:resnet18 --data clean_images/"),
        ("is everything installed as it should be?", "tacfast doctor"),
    ),
    "demo": (("another split, another training", "tacfast demo --seed 1"),),
    "solve": (("the shifts and their certificates", "tacfast solve head.npz --out shifts.npz"),),
    "scan": (
        ("weights and the name of their architecture", "tacfast scan model.pth --arch torchvision:resnet18 --data clean_images/"),
        ("a model folder of transformers or timm says the rest itself", "tacfast scan vit_folder/ --data clean_images/ --json scan.json"),
        ("in CI: one line, and a file for code scanning", "tacfast scan vit_folder/ --data clean_images/ -q --sarif scan.sarif"),
    ),
    "repair": (
        (
            "what the scan found",
            "tacfast repair model.pth --arch torchvision:resnet18 --data clean_images/ --report scan.json --out repaired.safetensors",
        ),
        ("a class of your own choice", "tacfast repair vit_folder/ --data clean_images/ --target 3 --out repaired.safetensors"),
    ),
    "bench": (("a head of your own", "tacfast bench head.npz --json bench.json"),),
    "schema": (("what a scan's JSON holds", "tacfast schema scan > scan.schema.json"),),
    "doctor": (("for a bug report", "tacfast doctor --no-color > doctor.txt"), ("for a script", "tacfast doctor --quiet")),
}
_FAILED = "2 error, 130 interrupted"
_CODES = {
    "": f"0 no evidence of a backdoor, or done; 1 flagged; 3 inconclusive; {_FAILED}",
    "scan": f"0 no evidence of a backdoor; 1 flagged; 3 inconclusive; {_FAILED}",
    "solve": f"0 every class has a certificate; 3 some class has none; {_FAILED}",
    "doctor": "0 every check passed; 2 one failed",
}


def epilog(command: str) -> str:
    """Of a command, or of tacfast itself for ""."""
    lines = [f"[dim]# {escape(comment)}[/]\n{escape(line)}" for comment, line in EXAMPLES[command]]
    return "\n".join(["[bold]Examples[/]", *lines]) + f"\n\n[bold]Exit codes[/]: {_CODES.get(command, f'0 done; {_FAILED}')}"
