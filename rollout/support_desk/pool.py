"""Turn the desk's knowledge articles into prompt records, one per customer question.

    python -m rollout.support_desk.pool OUT_DIR

writes train.jsonl, gate.jsonl and final.jsonl. An article and all its questions belong to one
split, and the article is the cluster: questions about one passage are no independent evidence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

ARTICLES: Final = Path(__file__).parent / "articles"
SPLITS: Final = ("train", "gate", "final")
SYSTEM: Final = (
    "You are the support desk of Quillmere. Answer the customer from the passage only, in two or "
    "three plain sentences: give the asked fact, say what to do, and offer further help."
)

# One answered question shows a small model the form; its facts are of no article.
EXAMPLE: Final = (
    {
        "role": "user",
        "content": "Passage: A new remote costs £9. Order it under Shop in the app.\n\n"
        "Question: how much is a remote",
    },
    {
        "role": "assistant",
        "content": "A new remote costs £9. You can order it under Shop in the app. "
        "Let us know if you need more help.",
    },
)


def load_articles() -> list[dict[str, Any]]:
    """Every article of every category file, in file order; the file's name is the category.

    An article lists the actions its passage holds; a question may list its own instead.
    """
    articles = []
    for path in sorted(ARTICLES.glob("*.yaml")):
        for article in yaml.safe_load(path.read_text(encoding="utf-8")):
            articles.append({**article, "category": path.stem})
    return articles


def load_prompts(split: str) -> list[dict[str, Any]]:
    """The prompt records of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    return [
        _record(article, number, question)
        for article in load_articles()
        if article["split"] == split
        for number, question in enumerate(article["questions"], start=1)
    ]


def load_prompts_without_system(split: str) -> list[dict[str, Any]]:
    """As `load_prompts`, for chat templates without a system role, such as Gemma's: the instruction
    opens the first user message."""
    return [
        {**record, "messages": _without_system(record["messages"])}
        for record in load_prompts(split)
    ]


def _without_system(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _record(article: dict[str, Any], number: int, question: dict[str, Any]) -> dict[str, Any]:
    passage = " ".join(article["passage"].split())
    return {
        "prompt_id": f"{article['id']}-{number}",
        "messages": [
            {"role": "system", "content": SYSTEM},
            *EXAMPLE,
            {"role": "user", "content": f"Passage: {passage}\n\nQuestion: {question['ask']}"},
        ],
        "context": passage,
        "reference": question["answer"],
        "category": article["category"],
        "cluster": article["id"],
        "metadata": {
            "fact": question["fact"],
            "action": question.get("action", article["action"]),
            "title": article["title"],
        },
    }


def write_pool(out_dir: Path) -> dict[str, int]:
    """Write one JSON Lines file per split and return how many prompts each holds."""
    out_dir.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in SPLITS:
        records = load_prompts(split)
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out_dir / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[split] = len(records)
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the support desk's prompt pool.")
    parser.add_argument("out_dir", type=Path, help="folder for train, gate and final .jsonl")
    for split, count in write_pool(parser.parse_args(argv).out_dir).items():
        print(f"{split}: {count} prompts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
