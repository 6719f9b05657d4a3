"""Changes of the files that a run wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def edit(path: Path, change: Callable[[Any], object]) -> Path:
    """Change the content of a JSON, YAML or JSON Lines file; returns its folder."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        content: Any = [json.loads(line) for line in text.splitlines()]
    else:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    change(content)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in content)
    else:
        text = json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    return path.parent
