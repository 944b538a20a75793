"""What other libraries complain of, told apart from mistakes of our own."""
from contextlib import contextmanager
from traceback import walk_tb
from typing import Iterator, Type


class NotPossible(ValueError):
    """What another library complained of, in one line."""


@contextmanager
def foreign(message: str, *errors: Type[Exception]) -> Iterator[None]:
    """Around one call of another library: what it raises becomes a `NotPossible` of one line.

    timm calls our factories, and a model our layers. What one of these raises is either meant for the user already or a
    mistake of ours, and passes unchanged, unless it comes from timm in turn, which they hand the user's arguments to.

    Args:
        message: What can't be done, naming the value that the user gave; the complaint follows.
        *errors: What the call raises for wrong arguments or files. Default: any exception.

    Raises:
        NotPossible: The call raised one of `errors`.
    """
    try:
        yield
    except Exception as e:
        if errors and not isinstance(e, errors):
            raise
        # without the frames of this function and of the one with the `with` statement
        packages = [frame.f_globals.get('__name__', '').partition('.')[0] for frame, _ in walk_tb(e.__traceback__)][2:]
        if __package__ in packages:
            innermost = len(packages) - packages[::-1].index(__package__)
            if packages[innermost:innermost + 1] != ['timm']:
                raise
        raise NotPossible(f'{message}: {" ".join(str(e).split())[:400] or type(e).__name__}') from e
