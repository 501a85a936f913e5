"""What a finding is called in other people's lists of threats. May import: nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Taxon:
    """An entry of a published list."""

    framework: str
    id: str
    name: str
    url: str


ATLAS = Taxon("MITRE ATLAS", "AML.T0018", "Manipulate AI Model", "https://atlas.mitre.org/techniques/AML.T0018")
OWASP = Taxon(
    "OWASP Machine Learning Security Top Ten",
    "ML10:2023",
    "Model Poisoning",
    "https://owasp.org/www-project-machine-learning-security-top-10/docs/ML10_2023-Model_Poisoning",
)
TAXA = (ATLAS, OWASP)


def tags(verdict: str) -> list[dict[str, str]]:
    """For a report's JSON: only a finding bears the name of a threat."""
    return [asdict(taxon) for taxon in TAXA] if verdict == "backdoored" else []
