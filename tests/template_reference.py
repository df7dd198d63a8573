"""What transformers makes of chat templates; run by a Python that has it.

    python tests/template_reference.py < jobs.json > answers.json
    python tests/template_reference.py tests/golden/templates.json    # fills in "answer" again

A job is {"template", "messages", ...}: arguments of `render`. An answer is a text, or null for a
template that fails.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

#: The time of all renderings.
NOW = datetime(2026, 3, 4, 5, 6, 7)


class Clock(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return NOW


def answer(job: dict[str, Any]) -> str | None:
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = Clock
    job = dict(job)
    template, messages, variables = job.pop("template"), job.pop("messages"), job.pop("variables")
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[messages], chat_template=template, **job, **variables
        )
    except Exception:
        return None
    return texts[0]


def main() -> None:
    """Answer jobs from standard input, or those of a file in place."""
    if len(sys.argv) < 2:
        json.dump([answer(job) for job in json.load(sys.stdin)], sys.stdout)
        return
    path = Path(sys.argv[1])
    cases = json.loads(path.read_text("utf-8"))
    for case in cases:
        case["answer"] = answer(case["job"])
    path.write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
