"""Numbers of things in messages."""


def counted(count: int, noun: str) -> str:
    """ "1 pair", "2,000 pairs", "0 batches" """
    plural = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"
