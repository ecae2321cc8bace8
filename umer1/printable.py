"""Text from data, teachers and peers as it may reach a terminal or a file that people read."""


def printable(text: object, limit: int | None = None) -> str:
    """`text` with control characters as escapes, and cut to about `limit` characters.

    Line ends and tabs stay.  Escape sequences could otherwise rename a terminal's window or erase what stands there,
    and half surrogate pairs would end a program that prints them.
    """
    shown = "".join(letter if letter.isprintable() or letter in "\n\t " else _escaped(letter) for letter in str(text))
    if limit is not None and len(shown) > limit:
        return f"{shown[: limit * 2 // 3]}...{shown[-limit // 3 :]} ({len(shown)} characters)"
    return shown


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
