"""How claims, verdicts and their counts read, in the READMEs, on the page and in a terminal."""

import re
from collections.abc import Callable
from html import escape
from pathlib import Path

from results import claims
from results.claims import Claim, Side
from results.printing import DASH, link, number_text
from results.tables import Project

HEADS = ("Claim", "In the paper", "Metric", "Paper", "Here", "Verdict")
TITLES = ("What the paper claims, and what comes out here", "Checks of ours: above no training, above no method")
MEANING = """What a verdict says: in which direction a difference goes on rendered people, with small networks on one
core, without ImageNet weights; not what the papers' data sets, networks and weights would give, and nothing about the
size of their numbers. *holds*: our means differ as claimed, by more than two standard errors of the difference; *does
not hold*: by as much the other way; *cannot be told*: less than that, or fewer than three seeds on a side; *not run*: a
row has no result. Behind a verdict stand the differences, each with the two standard errors that it needs. At three
seeds two equal methods pass two standard errors in 12 to 18 of 100 comparisons, so that a single verdict is weak
evidence. A claim to be the best of several must pass every comparison and fails with one: of equal methods it fails in
10 to 17 of 100 and holds in about 1, and one that is truly best by a deviation is found so in fewer than 10."""
COUNT_HEADS = ("Paper", "claims", *claims.VERDICTS, "checks of ours that hold")


def markdown(found: list[Claim], base: Path) -> str:
    """The claims of a project as tables, with links relative to `base`; "" without claims."""
    parts = []
    for title, part in zip(TITLES, claims.split(found)):
        if not part:
            continue
        lines = [list(HEADS), ["---"] * len(HEADS)]
        for claim in part:

            def ours(side: Side, claim=claim) -> str:
                return f"[{_number(claim, side)}]({_target(side, base)}){_seeds(side)}"

            lines.append([cell.replace("|", "\\|") for cell in _cells(claim, ours, "**{}**")])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = "".join(f"- {claim.text} {claim.note}\n" for claim in part if claim.note)
        parts.append(f"### {title}\n\n{table}\n" + (f"\n{notes}" if notes else ""))
    return "\n".join(parts)


def text(found: list[Claim]) -> str:
    """The same for a terminal, a line a claim."""
    lines = []
    for claim in found:
        cells = _cells(claim, lambda side, claim=claim: _number(claim, side) + _seeds(side), "{}")
        _, where, metric, paper, here, verdict = cells
        said = [where, metric, f"paper {paper}"] if claim.of_paper else [metric]
        lines.append(f"{claim.project}: {claim.text} [{'; '.join([*said, here])}] {verdict}")
    return "\n".join(lines)


def html(found: list[Claim], base: Path) -> str:
    """The same as tables of the page."""
    out = ""
    for title, part in zip(TITLES, claims.split(found)):
        if part:
            lines = "".join(_html_line(claim, base) for claim in part)
            heads = "".join(f"<th>{name}</th>" for name in HEADS)
            out += (
                f'\n<h4>{title}</h4><div class="scroll" tabindex="0" role="region" aria-label="{title}">'
                f'<table class="claims"><thead><tr>{heads}</tr></thead>{lines}</table></div>'
            )
    return out


def _html_line(claim: Claim, base: Path) -> str:
    def ours(side: Side) -> str:
        return f'<a href="{_target(side, base)}">{_number(claim, side)}</a><span class="mark">{_seeds(side)}</span>'

    first, where, metric, paper, here, verdict = _cells(claim, ours, "<b>{}</b>", escape)
    kind = {claims.HOLDS: "up", claims.FAILS: "down", claims.MISSING: "empty"}.get(claim.verdict, "")
    note = f'<br><span class="mark">{escape(claim.note)}</span>' if claim.note else ""
    return (
        f'<tbody><tr><th scope="row">{first}{note}</th><td>{where}</td><td>{metric}</td><td>{paper}</td>'
        f'<td class="long">{here}</td><td class="long"><span class="{kind}">{verdict}</span></td></tr></tbody>'
    )


def counts(found: list[Claim]) -> list[str]:
    """Of a project: number of the paper's claims, of each verdict, and our checks that hold as "2 of 3"."""
    paper, own = claims.split(found)
    above = f"{claims.count(own)[claims.HOLDS]} of {len(own)}" if own else DASH
    return [str(len(paper)), *(str(number) for number in claims.count(paper).values()), above]


def summary(found: list[Project]) -> str:
    """The first table of results/README.md: each project's claims counted, and what a verdict means; "" for none."""
    if not any(project.claims for project in found):
        return ""
    lines = [COUNT_HEADS, ["---"] * len(COUNT_HEADS), *([project.name, *counts(project.claims)] for project in found)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"## Claims of the papers\n\n{table}\n\n{MEANING}\n"


def meaning_html() -> str:
    text = re.sub(r"[*]([^*]+)[*]", r"<em>\1</em>", escape(MEANING))
    return f"<p>{text}</p>"


# --------------------------------------------------------------------------------------------------------------- cells


def _cells(claim: Claim, ours: Callable[[Side], str], strong: str, safe: Callable[[str], str] = str) -> list[str]:
    """Text, place in the paper, metric, the paper's numbers, ours and the verdict of a claim, as HEADS names them."""
    names = _short([side.name for side in claim.sides])
    here = [
        f"{safe(name)} " + (f"{side.times:g} × " if side.times != 1 else "") + (ours(side) if side.ours else DASH)
        for name, side in zip(names, claim.sides)
    ]
    paper = "; ".join(number_text(side.paper, claim.column) for side in claim.sides) if claim.of_paper else DASH
    verdict = strong.format(claim.verdict + (f" at n={claim.n}" if claim.verdict == claims.OPEN else ""))
    differences = ", ".join(_difference(claim, each) for each in claim.differences if each is not None)
    missing = ", ".join(safe(name) for name, side in zip(names, claim.sides) if side.ours is None)
    verdict += f": {missing}" if missing else f": {differences}"
    return [safe(claim.text), safe(claim.where) or DASH, safe(claim.column.metric), paper, "; ".join(here), verdict]


def _difference(claim: Claim, found: claims.Difference) -> str:
    """`+2.3 (needs 1.1)`: the difference, and what it must be above or below for a verdict."""
    scale, digits = claim.column.scale, claim.column.digits
    value = f"{found.value * scale:+.{digits}f}".replace("-", "−")
    return value if found.error is None else f"{value} (needs {2 * found.error * scale:.{digits}f})"


def _number(claim: Claim, side: Side) -> str:
    return number_text(side.ours, claim.column)


def _seeds(side: Side) -> str:
    return "" if side.exact else f" (n={side.ours.n}{', best on test' if side.ours.best_on_test else ''})"


def _target(side: Side, base: Path) -> str:
    return link(base, side.ours.files[0] if side.ours.n == 1 else side.ours.files[0].parent)


def _short(names: list[str]) -> list[str]:
    """Row names without the folders that all of them are in; a name without folders is a baseline's and stays."""
    rows = [name.split("/") for name in names if "/" in name]
    shared = 0
    while len(rows) > 1 and all(len(parts) > shared + 1 for parts in rows) and len({p[shared] for p in rows}) == 1:
        shared += 1
    return [name if "/" not in name else "/".join(name.split("/")[shared:]) for name in names]
