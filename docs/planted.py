"""Measure every planted model, draw its circuit, and write both into docs/planted.md: `python docs/planted.py`."""

from inspect import getdoc
from pathlib import Path

import mechhier as mh
from mechhier.models import planted
from mechhier.models.planted import PLANTED, SCORES
from mechhier.report.calibration import calibration_table, measured
from mechhier.report.images import write_images

HERE = Path(__file__).resolve().parent
PAGE = HERE / "planted.md"
MARK = "<!-- Below this line the page is written by docs/planted.py. -->\n"


def main() -> None:
    """Rewrite what is below the mark, and the pictures."""
    figures, sections = {}, []
    for name, make in PLANTED.items():
        model = make()
        figures[HERE / f"planted_{name}.png"] = mh.plot(model)
        # A variant's first line is that of the function which makes it.
        function = getattr(make, "func", make).__name__
        options = ", ".join(f"{key}={value!r}" for key, value in getattr(make, "keywords", {}).items())
        first_line = (getdoc(getattr(planted, function)) or "").split("\n")[0]
        sections.append(
            f"## {name}\n\n`{function}({options})`: calibrates {model.purpose}.\n\n{first_line}\n\n"
            f"![The circuit of {name}](planted_{name}.png)\n\n{calibration_table(model, measured(model))}\n"
        )
    definitions = "\n".join(f"- `{score}`: {definition}." for score, definition in SCORES.items())
    hand_written = PAGE.read_text().split(MARK)[0]
    models = "\n".join(sections)
    PAGE.write_text(f"{hand_written}{MARK}\n{models}\n## The scores\n\n{definitions}\n")
    write_images(figures)


if __name__ == "__main__":
    main()
