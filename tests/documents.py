"""What README and guides show: commands, diffs, links, and how a diff is applied."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    """The content of the fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of every dpo- command in a bash block or behind `# what:` in a diff; a backslash continues a line."""
    lines = [line for block in fenced(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [
        line.split(": ", 1)[1] for block in fenced(page, "diff") for line in block.splitlines() if line[:1] == "#"
    ]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("dpo-")]


def apply(diff: str, root: Path) -> list[str]:
    """Make the change that a diff shows to the files under `root`; the names of the files it touches.

    `+++ file` is a new file, `--- file` one that is there; `@@` separates two places in it. A line that stays or goes
    must be there, with its neighbours, exactly once.
    """
    touched = []
    sections = re.split(r"^(\+\+\+|---) (\S+)\n", diff, flags=re.M)
    for kind, name, body in zip(sections[1::3], sections[2::3], sections[3::3], strict=True):
        path = root / name
        touched.append(name)
        body = re.sub(r"^#.*\n", "", body, flags=re.M)
        if kind == "+++":
            assert not path.exists(), name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line[1:]}\n" for line in body.splitlines()), encoding="utf-8")
            continue
        text = "\n" + path.read_text(encoding="utf-8")
        for place in body.split("@@\n"):
            lines = [line or " " for line in place.splitlines()]
            old, new = ("\n" + "".join(f"{line[1:]}\n" for line in lines if line[0] in marks) for marks in (" -", " +"))
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        path.write_text(text[1:], encoding="utf-8")
    return touched
