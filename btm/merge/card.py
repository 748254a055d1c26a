"""What went into an average, for people (``README.md``) and for programs (``merge.json``)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from btm.merge.methods import MergeMethod
from btm.requests import MergeInput, MergeSpec
from btm.version import __version__

CARD_NAME = "README.md"
PROVENANCE_NAME = "merge.json"


def provenance(spec: MergeSpec, method: MergeMethod, weights: Mapping[str, float], files: Mapping[str, str]) -> str:
    """JSON that names parents, weights, hashes and code; equal merges on different machines give equal text.

    Args:
        spec: The request.
        method: Its method.
        weights: Normalised weight of each model.
        files: SHA-256 of the weight files written.
    """
    value: dict[str, Any] = {
        "name": spec.name,
        "method": spec.method.value,
        "reference": method.reference,
        "domain": spec.domain,
        "models": [
            {"name": model.name, "weight": weights[model.name], "files": dict(sorted(model.files.items()))}
            for model in spec.models
        ],
        "files": dict(sorted(files.items())),
        "code": f"branch-train-merge {__version__}",
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def model_card(
    spec: MergeSpec, method: MergeMethod, weights: Mapping[str, float], config: Mapping[str, Any], dtypes: Sequence[str]
) -> str:
    """The model card: method, paper, models with weights and hashes, and how to load the result."""
    domain = f" for the domain `{spec.domain}`" if spec.domain else ""
    rows = [f"| `{model.name}` | {weights[model.name]:.6g} | {_hash(model)} |" for model in spec.models]
    left_out = [f"`{model.name}`" for model in spec.models if not weights[model.name]]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- merge",
        "- branch-train-merge",
        "---",
        "",
        f"# {spec.name}",
        "",
        f"{method.title} of {len(spec.models)} `{config.get('model_type', 'unknown')}` language models{domain}. "
        f"{method.summary} Paper: {method.reference}",
        "",
        "| model | weight | SHA-256 of its weights |",
        "|---|---|---|",
        *rows,
        "",
        "Each tensor is the weighted mean of the models' tensors, accumulated in the order of this table "
        f"({_arithmetic(dtypes)}). One model runs at inference; nothing is routed or ensembled.",
        *(["", f"Left out (weight 0): {', '.join(left_out)}."] if left_out else []),
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("<this directory>")',
        'tokenizer = AutoTokenizer.from_pretrained("<this directory>")',
        "```",
        "",
        f"Written by branch-train-merge {__version__}; `{PROVENANCE_NAME}` says the same for programs.",
    ]
    return "\n".join(lines) + "\n"


def _hash(model: MergeInput) -> str:
    hashes = [value for name, value in sorted(model.files.items()) if name.endswith(".safetensors")]
    return ", ".join(f"`{value}`" for value in hashes) or "not recorded"


def _arithmetic(dtypes: Sequence[str]) -> str:
    wide = {"BF16": "float32", "F16": "float32", "F32": "float64", "F64": "float64"}
    return ", ".join(f"{dtype} in {wide[dtype]}" for dtype in sorted(set(dtypes)) if dtype in wide) or "copied"
