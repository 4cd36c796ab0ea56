"""Write english.jsonl, lithuanian.jsonl and mmlu.jsonl, the texts and questions of evaluate.yaml, into a folder.

python recipes/gemma2-2b-lt/held_out.py runs/gemma2-2b-lt
"""

import json
import sys
from pathlib import Path

from datasets import load_dataset


def write(path: Path, rows, columns: list[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({column: row[column] for column in columns}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Wikipedia: a source that is not in CulturaX, so that nothing of it is trained on in train.yaml
    for name, language in (("english", "en"), ("lithuanian", "lt")):
        rows = load_dataset("wikimedia/wikipedia", f"20231101.{language}", split="train", streaming=True)
        write(folder / f"{name}.jsonl", rows.shuffle(seed=0, buffer_size=10_000).take(1000), ["text"])
    write(folder / "mmlu.jsonl", load_dataset("cais/mmlu", "all", split="test"), ["question", "choices", "answer"])
