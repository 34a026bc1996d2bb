"""Examples of docstrings as blocks of code, for the pages of the reference."""

import griffe


class Doctests(griffe.Extension):
    """Fences the examples: Markdown would take their prompts for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring whose examples, from a prompt to the next empty line, are fenced.

    >>> from gradflow.reports._doctests import fenced
    >>> fenced("A sum.\\n\\n>>> 1 + 1\\n2\\n\\nThe end.").split("\\n")
    ['A sum.', '', '```pycon', '>>> 1 + 1', '2', '```', '', 'The end.']
    """
    lines, inside = [], False
    for line in text.split("\n"):
        if not inside and line.startswith(">>>"):
            lines.append("```pycon")
            inside = True
        if inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)
