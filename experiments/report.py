"""Tables and figures of docs/results.md, made from the lines in experiments/results."""


def write() -> None:
    raise SystemExit('not yet')
