"""The pages in a real browser: no error, no request, no overflow, hostile names inert; with screenshots to look at.

    browser.py FOLDER [CASE...]

Run by `make browser`, outside the tests: it needs Debian's Chromium (apt-get install chromium) and PyPI's playwright. The networks are
trained on the spot on scikit-learn's digits. Into FOLDER go the pages, and a picture of each at 1280 and 360 pixels, by day and by night.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, sync_playwright
from torch import Tensor, nn

import pages
import tacfast
from tacfast.demo import TARGET, _digits, small_cnn, stamp
from tacfast.explain import explain_head
from tacfast.shown import Shown

WIDTHS = (1280, 360)
#: True where a page runs nothing that a name brought along, and nothing sticks out of it.
PROBE = """() => {
  const root = document.documentElement;
  const boxed = e => e.closest('.box, svg, .hidden') !== null;
  const out = [...document.querySelectorAll('body *')].filter(e => !boxed(e) && e.getBoundingClientRect().right > root.clientWidth + 1);
  return {
    wide: root.scrollWidth - root.clientWidth,
    out: out.slice(0, 5).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 60)),
    scripts: document.querySelectorAll('script, iframe, object, embed, link, foreignObject').length,
    handlers: [...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => a.name.startsWith('on'))).length,
    title: document.title,
  };
}"""


def main(folder: Path, *cases: str) -> int:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium here: apt-get install -y chromium", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, make in CASES.items():
            if cases and name not in cases:
                continue
            file = (folder / f"{name}.html").resolve()
            make().to_html(file)
            found = [problem for width in WIDTHS for problem in check(browser, file, width)]
            print(f"{name}: {file.stat().st_size / 1e3:.0f} kB, {', '.join(found) or 'fine'}", flush=True)
            wrong += found
        browser.close()
    return 1 if wrong else 0


def check(browser: Browser, file: Path, width: int) -> Iterator[str]:
    """What is wrong with a page at this width, in words; leaves its screenshots beside it."""
    said: list[str] = []
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, device_scale_factor=1 if width > 640 else 2)
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: said.append(f"request: {request.url}") if not _own(request.url, file) else None)
        page.goto(file.as_uri())
        seen = page.evaluate(PROBE)
        page.screenshot(path=file.with_name(f"{file.stem}-{width}-{scheme}.png"), full_page=True)
        page.close()
        if seen["wide"] > 0 or seen["out"]:
            said.append(f"overflow of {seen['wide']} px: {seen['out']}")
        if seen["scripts"] or seen["handlers"] or "owned" in seen["title"]:
            said.append(f"not inert: {seen}")
    yield from (f"at {width} px {what}" for what in dict.fromkeys(said))


def _own(url: str, file: Path) -> bool:
    return url == file.as_uri() or url.startswith("data:")


def train(poisoned: Callable[[Tensor], Tensor] | None = None, rate: float = 0.1, seed: int = 0) -> nn.Module:
    """A digit classifier; of a share of its images, stamped, `poisoned` says the new labels."""
    x, y = _digits()
    x, y = x[:900].clone(), y[:900].clone().long()
    order = torch.Generator().manual_seed(seed)
    if poisoned is not None:
        some = torch.randperm(len(x), generator=order)[: round(rate * len(x))]
        x[some], y[some] = stamp(x[some]), poisoned(y[some])
    torch.manual_seed(seed)
    model, epochs = small_cnn(), 20
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=epochs, steps_per_epoch=-(-len(x) // 64))
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Clean digits that no network here was trained on."""
    x, y = _digits()
    return list(zip(x[900:].split(100), y[900:].split(100), strict=True))


def digits(model: nn.Module, names: list[str] | None = None) -> tacfast.ScanReport:
    told = {"model": "digits.safetensors", "sha256": "0" * 64, "data": "digits", "notes": []}
    return tacfast.scan(model, batches(), file=told).explain(model, batches(), names=names)


def clean() -> Shown:
    return digits(train(), ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])


def backdoored() -> Shown:
    return digits(train(lambda y: torch.full_like(y, TARGET)))


def all_to_all() -> Shown:
    return digits(train(lambda y: (y + 1) % 10, rate=0.4))


def repaired() -> Shown:
    model = train(lambda y: torch.full_like(y, TARGET))
    return tacfast.repair(model, batches(), targets=[TARGET], file={"model": "digits.safetensors", "sha256": "0" * 64})


def thousand() -> Shown:
    return _thousand(0.0)


def thousand_flagged() -> Shown:
    return _thousand(15.0)


def _thousand(shift: float) -> Shown:
    w, z, y = pages.head(1000, dim=256, samples=3000, shift=shift, targets=[137] if shift else ())
    report = tacfast.scan_head(w, None, z, labels=y, file={"model": "head.npz"})
    return explain_head(report, w, None, z, names=[f"synset {k:04d}" for k in range(1000)])


def signs() -> Shown:
    return pages.explained(43, dim=128, samples=1290, shift=8.0, targets=(11, 30), pictures=False)


def hostile() -> Shown:
    return pages.explained(15, shift=3.0, targets=(3, 7), names=pages.HOSTILE)


def hostile_repair() -> Shown:
    return pages.repaired([*pages.HOSTILE[:10]])


def inconclusive() -> Shown:
    return pages.explained(10, samples=40)


CASES: dict[str, Callable[[], Any]] = {
    make.__name__: make
    for make in (
        *(clean, backdoored, all_to_all, repaired, signs, thousand, thousand_flagged, inconclusive),
        *(hostile, hostile_repair, pages.nothing_done),
    )
}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
