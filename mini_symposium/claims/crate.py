"""The metadata of saved evidence as an RO-Crate (https://w3id.org/ro/crate/1.1), where catalogues of research data look
for it: every file with its SHA-256, the model, the registration, and which command made what from what."""

import hashlib
import mimetypes
from datetime import UTC, datetime
from pathlib import Path

from mini_symposium import __version__
from mini_symposium.claims.evidence import FILE, load_evidence
from mini_symposium.claims.ledger import hashes
from mini_symposium.claims.registration import REGISTERED
from mini_symposium.errors import InputError
from mini_symposium.files.reading import parse_json, read_text
from mini_symposium.files.writing import write_json
from mini_symposium.models.catalog import find_model

CRATE = "ro-crate-metadata.json"
LICENSE = "https://www.apache.org/licenses/LICENSE-2.0"
CARD = "https://huggingface.co/kalomaze/MiniSymposium-Demo"
ABOUT = {
    FILE: "What was measured: curves, evaluations and the base's numbers, by training and seed",
    "claims.json": "The verdict on each claim of the card, with value, interval and what would decide it",
    "ledger.csv": "The numbers of ledger.png",
    "ledger.png": "Each claim's value, interval and threshold",
    "memorization.csv": "The numbers of memorization.png",
    "memorization.png": "The share of tokens known by heart, by epoch",
}
"""What `claims --save` leaves in a folder."""


def write_crate(folder: Path) -> Path:
    """Write `folder`/CRATE for the evidence saved there; return its path.

    It keeps its date while the evidence is the same file.

    Raises
    ------
    InputError
        If there is no evidence, or it is damaged.
    """
    evidence = load_evidence(folder)
    files = [_file(folder / name) for name in ABOUT if (folder / name).is_file()]
    measured, *made = [{"@id": file["@id"]} for file in files]
    base = evidence.facts.get("base_model", "a model that is not named")
    model = {"@id": "#model", "@type": "CreativeWork", "name": base}
    if found := find_model(base):
        _, entry = found
        model |= {"identifier": entry.hub_id, "license": entry.license, "sha256": entry.sha256}
    registration = {
        **{"@id": "#registration", "@type": "CreativeWork", "name": "data/registration.yml"},
        **{"description": hashes(evidence), "sha256": REGISTERED.sha256},
    }
    kit = {"@id": "#kit", "@type": "SoftwareApplication", "name": "mini-symposium", "version": __version__}
    root = {
        **{"@id": "./", "@type": "Dataset", "name": "Evidence on the claims of the model card MiniSymposium"},
        "description": f"Fine-tunes of {base} on thirteen handwritten prompts ({evidence.scale} scale, "
        f"{evidence.device}), and the verdict that follows on each claim of the card.",
        **{"datePublished": _date(folder, files[0]), "license": {"@id": LICENSE}, "hasPart": [measured, *made]},
        **{"isBasedOn": {"@id": CARD}, "mentions": [{"@id": "#judging"}, {"@id": "#model"}]},
    }
    judging = {
        **{"@id": "#judging", "@type": "CreateAction", "name": "mini-symposium claims RUN --save DIR"},
        **{"instrument": {"@id": "#kit"}, "object": [measured, {"@id": "#registration"}], "result": made},
    }
    descriptor = {
        **{"@id": CRATE, "@type": "CreativeWork", "about": {"@id": "./"}},
        "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
    }
    license = {"@id": LICENSE, "@type": "CreativeWork", "name": "Apache License 2.0"}
    card = {"@id": CARD, "@type": "CreativeWork", "name": "Model card MiniSymposium"}
    context = ["https://w3id.org/ro/crate/1.1/context", {"sha256": "http://schema.org/sha256"}]
    graph = [descriptor, root, *files, judging, kit, model, registration, card, license]
    write_json(folder / CRATE, {"@context": context, "@graph": graph})
    return folder / CRATE


def _file(path: Path) -> dict:
    content = path.read_bytes()
    return {
        **{"@id": path.name, "@type": "File", "name": path.name, "description": ABOUT[path.name]},
        **{"encodingFormat": mimetypes.guess_type(path.name)[0], "contentSize": str(len(content))},
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _date(folder: Path, evidence: dict) -> str:
    """The date of the crate that is there, if its evidence is the same; else today's."""
    try:
        graph = {part["@id"]: part for part in parse_json(read_text(folder / CRATE), CRATE)["@graph"]}
        if graph[FILE]["sha256"] == evidence["sha256"]:
            return graph["./"]["datePublished"]
    except (InputError, LookupError, TypeError):
        pass  # none is there, or it is another's
    return datetime.now(UTC).date().isoformat()
