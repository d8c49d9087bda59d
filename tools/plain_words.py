"""Find words that are hard to read in comments, docstrings, messages and documents, and name what to write instead.

python tools/plain_words.py [FILE ...]    every tracked .py, .md, .sh, .sbatch and .toml file if none is named
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".md", ".sh", ".sbatch", ".toml")
WORDS = {
    r"told|tells|telling": "report(ed), print(ed), raise(d), message",
    r"(a)?mend(s|ed|ing)?": "fix",
    r"anew": "again, from scratch",
    r"of (its|your|their|one'?s|our|his|my) own": "its own, your own, separate, custom",
    r"stands at|lies (behind|beyond|before|there)": "is at, follows, precedes",
    r"(is|was|are|were|be) asked for|what is wanted": "the requested …",
    r"be had": "available, possible",
    r"(is|are|has|have|there) (?-i:none)": "0, has no … with a subject",
    r"(?<!there )is no (?!longer\b|more\b)\w+": "is not a(n) …, has no … with a subject",
    r"so that none|nobody|somebody": "name the rank, process or user",
    r"a word too many": "unexpected argument",
    r"taken or told": "accepted or reported as an error",
    r"go(es)? (by|on|with)|went on": "follows, continues, resumes, matches",
    r"by turns": "alternately, in alternation",
    r"(a|each|every|another|this|one|first|last|earlier|later|several|other|all|its) (life|lives)": "attempt",
    r"links? of (a|the) chain": "job of the chain",
    r"(is|are|was|were|be|been) asked to": "request, stop requested",
    r"hand(s|ed|ing)? over|deal(s|t)? (out|to)|carr(y|ies|ied|ying)": "the collective or the data structure",
    r"same bits": "bit-identical",
    r"left out": "skipped",
    r"\w*(colour|centre(d|s)?\b|grey|neighbour)\w*": "American spelling: color, center, gray, neighbor",
    r"\w*(normal|standard|initial|quant|synchron|recogn)is(e|i|a)\w*": "American spelling: …ize",
}
PATTERN = re.compile("|".join(rf"(?P<w{k}>\b(?:{word})\b)" for k, word in enumerate(WORDS)), re.IGNORECASE)

# Lines that may hold a word, and why.
ALLOWED = {
    "tools/plain_words.py": r".*",  # the list itself
    "LICENSE": r".*",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and texts of a file: of Python, comments, strings and names; of others, every line."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from enumerate(token.string.splitlines(), start=token.start[0])
        elif token.type == tokenize.NAME:
            yield token.start[0], token.string.replace("_", " ")


def findings(path: Path) -> Iterator[str]:
    """Yield a line for each word of the list in a file: where it is, and what to write instead."""
    name = path.relative_to(ROOT).as_posix()
    for number, line in texts(path):
        for found in PATTERN.finditer(line):
            if not re.search(ALLOWED.get(name, r"(?!)"), line):
                instead = list(WORDS.values())[int((found.lastgroup or "w0")[1:])]
                yield f"{name}:{number}: {found[0]!r}; write: {instead}"


def main() -> int:
    """Print the findings; 1 if there are any."""
    named = [Path(word).resolve() for word in sys.argv[1:]]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    paths = named or [ROOT / name for name in tracked if name.endswith(SUFFIXES)]
    lines = [line for path in paths if path.is_file() for line in findings(path)]
    print("\n".join(lines) or "no word of the list")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
